"""Front end: the command `continual-lora`.

It builds a request, shows progress, translates our exceptions, shows the result. The commands of
`operations` get their flags from their requests (`cliflags`); a few others exist only here.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cliconfig import CONFIG_HELP, with_config, write_config
from .cliflags import add_fields, add_settings, hide_experts, names_in, request_of
from .cliparser import Parser
from .cliprogress import FIRST, Bar
from .cliterminal import styled, wrapped
from .errors import Cancelled, ContinualLoraError, SettingError
from .operations import OPERATIONS, Operation
from .progress import Progress
from .requests import settings_of

if TYPE_CHECKING:
    from .requests import LearnRequest
    from .results import Result

EPILOG = (
    "Everything a checkpoint has learned is in one file beside it: "
    "<checkpoint>.concepts.safetensors. Nothing is ever downloaded."
)
GROUPS = {
    "to begin with": ("demo", "mini"),
    "every day": ("learn", "draw", "export", "info", "list"),
    "changing what was learned": ("undo", "history", "restore", "rename", "forget"),
    "looking closer": ("evaluate", "scores"),
    "several stacks and programs": ("merge", "import", "consolidate"),
    "with a page or a web UI": ("ui", "install-webui"),
    "for the shell": ("completion",),
}
Run = Callable[[argparse.Namespace, Bar], None]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user error (explained in one paragraph), 130 stopped with Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console may lack letters of a name
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    all_commands = parser()
    if not words:
        all_commands.print_help()
        return 0
    try:
        words = with_config(words, all_commands)
    except ContinualLoraError as error:
        _complain(str(error))
        return 2
    arguments = all_commands.parse_args(words)
    names = names_in(arguments.command)
    bar = Bar(names)
    try:
        with nullcontext() if FIRST else redirect_stdout(io.StringIO()):
            arguments.run(arguments, bar)
            sys.stdout.flush()
    except ContinualLoraError as error:
        bar.clear()
        _complain(error.spelled(names))
        return 2
    except Cancelled as stopped:
        bar.clear()
        _complain(f"stopped. {stopped}", "yellow")
        return 130
    except BrokenPipeError:
        # the reader has exited, as `| head` does; discard what is still written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        bar.clear()
        _complain(_problem(error))
        return 2
    finally:
        bar.close()
    return 0


def _problem(error: OSError) -> str:
    """In words, of a file or folder that nothing else checks."""
    if error.filename is None:
        return f"A file can't be read or written ({error.strerror or error})."
    return f"{error.filename} can't be read or written ({error.strerror})."


def _complain(message: str, style: str = "red") -> None:
    name, _, rest = wrapped(f"continual-lora: {message}").partition(":")
    print(f"{styled(name, style, sys.stderr)}:{rest}", file=sys.stderr)


# --- the commands of operations ------------------------------------------------------------------


def _operate(arguments: argparse.Namespace, bar: Bar) -> None:
    _run(arguments.command, arguments, bar)


def _run(name: str, arguments: argparse.Namespace, bar: Bar, **other: Any) -> None:
    """Run an operation and show its result; `other`: fields that do not come from flags."""
    operation = OPERATIONS[name]
    request = _checked(operation, request_of(operation, arguments, **other))
    _show(operation(request, bar), arguments, bar)


def _checked(operation: Operation, request: Any) -> Any:
    """The request, without the mistakes that can be found before anything heavy is imported."""
    if operation.module == "pipeline":
        from .early import check

        check(request)
    return request


def _show(result: Result, arguments: argparse.Namespace, bar: Bar) -> None:
    bar.clear()
    if arguments.json:
        print(json.dumps(result.as_json()))
        return
    for number, line in enumerate(result.summary().splitlines()):
        # what was done, and the version that is in use
        is_first = number == 0 and arguments.command in _CHANGING
        style = "green" if is_first else "bold" if line.startswith("* ") else ""
        print(styled(line, style, sys.stdout) if style else line)


def _learn(arguments: argparse.Namespace, bar: Bar) -> None:
    operation = OPERATIONS["learn"]
    request: Any = _checked(operation, request_of(operation, arguments))
    if arguments.plan:
        return _plan(request, arguments.json)
    preview = _preview_file(request)
    if request.settings.preview_every:
        from .imagefile import check_output

        check_output(preview)

    def show(progress: Progress) -> None:
        if progress.preview is not None:
            from .imagefile import save_own

            save_own(progress.preview, preview)
        bar(progress)

    result: Any = operation(request, show)
    plot = _plot_looks(request, result) if not result.again and result.record.watched else None
    _show(result, arguments, bar)
    if plot and not arguments.json:
        print(f"The curve: {plot}")
    if not arguments.json and not result.again:
        command = ["continual-lora", "draw", "--checkpoint", str(arguments.checkpoint)]
        if arguments.stack:
            command += ["--stack", str(arguments.stack)]
        command += ["--prompt", f"a photo of a {result.record.name}"]
        print(f"Try: {_pasted(command)}")
    if not result.again:
        file = request.stack_file
        beside = f"{file.name.removesuffix('.safetensors')}.{result.record.token}.toml"
        written = write_config(file.with_name(beside), parser().commands()["learn"], arguments)
        if written and not arguments.json:
            print(f"What was run: {written}")


def _pasted(command: Sequence[str]) -> str:
    """A command as this system's shell takes it."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def _plot_looks(request: LearnRequest, result: Any) -> Path | None:
    """Draw how it went beside the stack; None if there is no room."""
    from .curves import looks_picture
    from .imagefile import save_own

    path = _preview_file(request, "likeness")
    caption = "likeness to the pictures held out (blue), how far earlier ones moved (red)"
    try:
        save_own(looks_picture(result.record.watched, caption), path)
    except SettingError as error:
        print(f"continual-lora: {error}", file=sys.stderr)
        return None
    return path


def _preview_file(request: LearnRequest, kind: str = "preview") -> Path:
    from .files import with_name

    name = f"{with_name(request.checkpoint).stem}.{Path(request.token).name}.{kind}.png"
    return request.stack_file.with_name(name)


def _plan(request: LearnRequest, as_json: bool) -> None:
    from . import pipeline

    plan = pipeline.plan(request)
    if as_json:
        print(json.dumps(dataclasses.asdict(plan)))
        return
    on_cpu = plan.device == "cpu"
    print(
        f"{plan.family}, {plan.size} x {plan.size} pixels, {plan.rows} at once, on {plan.device}. "
        "Memory, at least:"
    )
    for name, (size, dtype) in plan.weights.items():
        note = "in main memory while learning" if name == "VAE" and not on_cpu else ""
        _size(name, size, f"{dtype} {note}")
    _size("adapter and word", plan.learned)
    _size("their gradients and optimizer", plan.optimizer)
    _size("activations", plan.activations)
    _size("peak", plan.peak, "" if on_cpu else "plus the driver's own")
    print("Files:")
    _size("stack", plan.stack_file, "plus the version before it")
    _size("exported LoRA and embedding", plan.exported)
    least, most = plan.seconds
    units = [("hours", 3600), ("minutes", 60), ("seconds", 1)]
    unit, seconds = next(one for one in units if least >= 2 * one[1] or one[1] == 1)
    print(
        f"Time: {least / seconds:,.0f} to {most / seconds:,.0f} {unit} of training, judged by how "
        "fast this device computes."
    )


def _size(name: str, size: int, note: str = "") -> None:
    print(f"  {name:<36} {size / 1e6:>9,.0f} MB  {note}".rstrip())


def _consolidate(arguments: argparse.Namespace, bar: Bar) -> None:
    if arguments.closed_form:
        return _run("closed_form", arguments, bar)
    if arguments.images is None:
        raise SettingError(
            "DSC needs `images`, the pictures the newest concept was learned from; without "
            "pictures there is `closed_form`."
        )
    _operate(arguments, bar)


def _draw(arguments: argparse.Namespace, bar: Bar) -> None:
    beside = arguments.beside or []
    prompts = [(prompt, *beside) for prompt in arguments.prompts]
    _run("draw", arguments, bar, prompts=prompts)


RUNS: dict[str, Run] = {"learn": _learn, "consolidate": _consolidate, "draw": _draw}
# The first line of their results says what was done
_CHANGING = (*("learn", "consolidate", "forget", "merge", "import", "rename", "undo", "restore"),)


# --- the command line's own commands -------------------------------------------------------------


def _demo(arguments: argparse.Namespace, bar: Bar) -> None:
    from .demo import run_demo

    def say(text: str) -> None:
        bar.clear()
        print(text, flush=True)

    report = run_demo(arguments.out, bar, say, arguments.steps)
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

    _show(stacks_in(arguments.folder), arguments, bar)


def _completion(arguments: argparse.Namespace, bar: Bar) -> None:
    try:
        import shtab  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingError(
            "Completion needs shtab, which is not installed: pip install shtab."
        ) from None
    whole = parser()
    for command in whole.commands().values():
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, arguments.shell))


def _ui(arguments: argparse.Namespace, bar: Bar) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise SettingError(
            "The tab needs gradio, which is not installed: pip install 'comfy-continual-lora[ui]'."
        ) from None
    from .files import checkpoints_in
    from .mini.weights import write_checkpoint
    from .webui.alone import launch

    models: Path = arguments.models
    if not checkpoints_in(models):
        write_checkpoint(models / "mini-sd.safetensors")
        print(
            f"There was no checkpoint in {models}, so the mini-SD was put there for trying it out."
        )
    bar.close()  # the page shows progress, and Ctrl-C ends it
    launch(models, arguments.port, not arguments.no_browser)


def _install_webui(arguments: argparse.Namespace, bar: Bar) -> None:
    from .webui.install import install

    print(install(arguments.path, copy=arguments.copy))


# --- the parser ----------------------------------------------------------------------------------


def parser() -> Parser:
    """All commands with their flags."""
    whole = Parser(
        "continual-lora",
        description="Teach a Stable Diffusion checkpoint one thing after another.",
        epilog=EPILOG,
        groups=GROUPS,
    )
    whole.add_argument(
        "--version", action=_Version, nargs=0, help="show the versions of this program and torch"
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, run, help, add in OWN:
        add(_command(commands, name, run, help))
    for name, operation in OPERATIONS.items():
        if name == "closed_form":
            continue  # consolidate --closed-form
        command = _command(commands, name, RUNS.get(name, _operate), operation.help)
        add_fields(command, operation, optional=("images",) if name == "consolidate" else ())
        if name in _MORE:
            _MORE[name](command)
        command.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        hide_experts(command, name)
    return whole


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            torch = version("torch")
        except PackageNotFoundError:
            torch = "not installed"
        print(f"continual-lora {__version__}, Python {platform.python_version()}, torch {torch}")
        raise SystemExit(0)


def _command(commands: Any, name: str, run: Run, help: str) -> Parser:
    description = help[0].upper() + help[1:] + "."
    command = commands.add_parser(name, help=help, description=description, epilog=EPILOG)
    command.set_defaults(run=run, command=name)
    return command


def _add_to_learn(command: Parser) -> None:
    command.add_argument(
        "--plan",
        action="store_true",
        help="learn nothing: show what memory, files and time it would take, without loading the "
        "checkpoint",
    )


def _add_to_consolidate(command: Parser) -> None:
    command.add_argument(
        "--closed-form",
        action="store_true",
        help="solve for all concepts at once instead, in seconds, without pictures",
    )
    solving = settings_of(OPERATIONS["closed_form"].request)
    assert solving
    add_settings(command, solving, "consolidate", heading="closed form")


def _add_to_draw(command: Parser) -> None:
    command.add_argument(
        "--beside",
        action="append",
        metavar="PROMPT",
        help="a prompt to draw to the right in the same, wider picture, such as "
        '"a photo of a V2 dog"; may be given several times. Each has an area of its own, where one '
        "prompt leaves it to the picture where things are",
    )


_MORE = {"learn": _add_to_learn, "consolidate": _add_to_consolidate, "draw": _add_to_draw}


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


def _add_to_completion(command: Parser) -> None:
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell to write it for")


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
    ("completion", _completion, "print what makes a shell complete commands", _add_to_completion),
    ("ui", _ui, "open the tab by itself, in a browser on this machine", _add_to_ui),
    (
        "install-webui",
        _install_webui,
        "put the tab into AUTOMATIC1111, reForge, Forge or Forge Neo as an extension",
        _add_to_install,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
