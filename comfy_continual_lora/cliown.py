"""The command line's own commands, which are no operations. Light."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from .cliparser import Parser
from .cliprogress import Bar
from .clirun import Run, show
from .errors import Cancelled, SettingError, excerpt

_LAST_PORT = 65_535


def _demo(arguments: argparse.Namespace, bar: Bar) -> None:
    from .demo import run_demo

    def say(text: str) -> None:
        bar.clear()
        print(text, flush=True)

    try:
        report = run_demo(arguments.out, bar, say, arguments.steps)
    except Cancelled:
        raise Cancelled("The demo starts from scratch when it is run again.") from None
    bar.clear()
    print(f"The report: {report}")
    if sys.stdout.isatty() and not arguments.no_browser:
        import webbrowser

        webbrowser.open(report.resolve().as_uri())


def _mini(arguments: argparse.Namespace, bar: Bar) -> None:
    from .mini.weights import write_checkpoint

    write_checkpoint(arguments.path, stock=arguments.stock)
    print(f"Wrote {arguments.path} ({arguments.path.stat().st_size / 2**20:.0f} MiB)")


def _list(arguments: argparse.Namespace, bar: Bar) -> None:
    from .upkeep import stacks_in

    show(stacks_in(arguments.folder), arguments, bar)


def _ui(arguments: argparse.Namespace, bar: Bar) -> None:
    port: int | None = arguments.port
    if port is not None and not 1 <= port <= _LAST_PORT:
        raise SettingError(f"--port is {excerpt(port)}; the range is 1 to {_LAST_PORT}.")
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise SettingError(
            "The tab needs gradio, which is not installed: pip install 'comfy-continual-lora[ui]'."
        ) from None
    from .listing import checkpoints_in
    from .mini.weights import write_checkpoint
    from .webui.alone import launch

    models: Path = arguments.models
    if not checkpoints_in(models):
        write_checkpoint(models / "mini-sd.safetensors")
        print(
            f"There was no checkpoint in {models}, so the mini-SD was put there for trying it out."
        )
    bar.close()  # the page shows progress, and Ctrl-C ends it
    try:
        launch(models, port, not arguments.no_browser)
    except OSError as error:
        if error.errno is not None:  # of a file: Gradio's own, about ports, has no number
            raise
        asked = f"the port {port}" if port else "a port from 7860 on"
        raise SettingError(
            f"The page can't be served: {asked} is taken, or this user may not use it. Name another "
            "with --port, or end the program that has it."
        ) from None


def _install_webui(arguments: argparse.Namespace, bar: Bar) -> None:
    from .webui.install import install

    print(install(arguments.path, copy=arguments.copy))


# --- their flags ---------------------------------------------------------------------------------


def _add_to_demo(command: Parser) -> None:
    command.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for the report (default: demo)"
    )
    command.add_argument(
        "--steps", type=int, help="training steps of each concept (default: the mini-SD's 300)"
    )
    command.add_argument(
        "--no-browser", action="store_true", help="do not open the report in a browser"
    )


def _add_to_mini(command: Parser) -> None:
    command.add_argument("path", type=Path, help="where to write it, such as mini.safetensors")
    command.add_argument(
        "--stock",
        action="store_true",
        help="the same net with SD1.5's layer sizes, for programs that accept nothing else",
    )


def _add_to_list(command: Parser) -> None:
    command.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path(),
        metavar="FOLDER",
        help="where to look, with the folders below it (default: this folder)",
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_to_ui(command: Parser) -> None:
    command.add_argument(
        "--models",
        type=Path,
        default=Path("models"),
        help="folder of checkpoints; the mini-SD is put there if it has none (default: models)",
    )
    command.add_argument(
        "--port", type=int, help="port of the page (default: the first free one from 7860 on)"
    )
    command.add_argument("--no-browser", action="store_true", help="do not open a browser")


def _add_to_install(command: Parser) -> None:
    command.add_argument("path", type=Path, help="the web UI's folder (or its --data-dir)")
    command.add_argument(
        "--copy",
        action="store_true",
        help="copy the files; otherwise a clone is linked, so that updating it updates the tab",
    )


OWN: tuple[tuple[str, Run, str, Callable[[Parser], None]], ...] = (
    ("demo", _demo, "learn two concepts on the mini-SD and write a report", _add_to_demo),
    (
        "mini",
        _mini,
        "write the mini-SD, a small Stable Diffusion for trying things out, as a checkpoint",
        _add_to_mini,
    ),
    (
        "list",
        _list,
        "list the checkpoints of a folder and what they have learned",
        _add_to_list,
    ),
    ("ui", _ui, "open the tab by itself, in a browser on this machine", _add_to_ui),
    (
        "install-webui",
        _install_webui,
        "put the tab into AUTOMATIC1111, reForge, Forge or Forge Neo as an extension",
        _add_to_install,
    ),
)
