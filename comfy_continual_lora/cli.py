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
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cliflags import add_fields, add_settings, flag_of, request_of
from .cliprogress import FIRST, Bar
from .errors import Cancelled, ContinualLoraError, SettingError
from .operations import OPERATIONS
from .progress import Progress
from .requests import settings_of

if TYPE_CHECKING:
    from .requests import LearnRequest
    from .results import Result

EPILOG = (
    "Everything a checkpoint has learned is in one file beside it: "
    "<checkpoint>.concepts.safetensors. Nothing is ever downloaded."
)
Run = Callable[[argparse.Namespace, Bar], None]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user error (explained in one paragraph), 130 stopped with Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console may lack letters of a name
            stream.reconfigure(errors="backslashreplace")
    arguments = parser().parse_args(argv)
    bar = Bar()
    try:
        with nullcontext() if FIRST else redirect_stdout(io.StringIO()):
            arguments.run(arguments, bar)
            sys.stdout.flush()
    except ContinualLoraError as error:
        bar.clear()
        message = error.spelled(lambda name: flag_of(name, arguments.command))
        print(_wrapped(f"continual-lora: {message}"), file=sys.stderr)
        return 2
    except Cancelled as stopped:
        bar.clear()
        print(f"continual-lora: stopped. {stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader has exited, as `| head` does; discard what is still written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        bar.clear()
        print(_wrapped(f"continual-lora: {_problem(error)}"), file=sys.stderr)
        return 2
    finally:
        bar.close()
    return 0


def _problem(error: OSError) -> str:
    """In words, of a file or folder that nothing else checks."""
    if error.filename is None:
        return f"A file can't be read or written ({error.strerror or error})."
    return f"{error.filename} can't be read or written ({error.strerror})."


def _wrapped(text: str) -> str:
    lines = [
        textwrap.fill(line, 110, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    ]
    return "\n".join(lines)


# --- the commands of operations ------------------------------------------------------------------


def _operate(arguments: argparse.Namespace, bar: Bar) -> None:
    operation = OPERATIONS[arguments.command]
    _show(operation(request_of(operation, arguments), bar), arguments, bar)


def _show(result: Result, arguments: argparse.Namespace, bar: Bar) -> None:
    bar.clear()
    print(json.dumps(result.as_json()) if arguments.json else result.summary())


def _learn(arguments: argparse.Namespace, bar: Bar) -> None:
    operation = OPERATIONS["learn"]
    request: Any = request_of(operation, arguments)
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
        operation = OPERATIONS["closed_form"]
        return _show(operation(request_of(operation, arguments), bar), arguments, bar)
    if arguments.images is None:
        raise SettingError(
            "DSC needs `images`, the pictures the newest concept was learned from; without "
            "pictures there is `closed_form`."
        )
    _operate(arguments, bar)


def _draw(arguments: argparse.Namespace, bar: Bar) -> None:
    operation = OPERATIONS["draw"]
    prompts = [(prompt, *arguments.beside) for prompt in arguments.prompts]
    _show(operation(request_of(operation, arguments, prompts=prompts), bar), arguments, bar)


RUNS: dict[str, Run] = {"learn": _learn, "consolidate": _consolidate, "draw": _draw}


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
    launch(models, arguments.port, not arguments.no_browser)


def _install_webui(arguments: argparse.Namespace, bar: Bar) -> None:
    from .webui.install import install

    print(install(arguments.path, copy=arguments.copy))


# --- the parser ----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """All commands with their flags."""
    whole = argparse.ArgumentParser(
        "continual-lora",
        description="Teach a Stable Diffusion checkpoint one thing after another.",
        epilog=EPILOG,
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, run, help, add in OWN:
        add(_command(commands, name, run, help))
    for name, operation in OPERATIONS.items():
        if name == "closed_form":
            continue  # consolidate --closed-form
        command = _command(commands, name, RUNS.get(name, _operate), operation.help)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        add_fields(command, operation, optional=("images",) if name == "consolidate" else ())
        if name in _MORE:
            _MORE[name](command)
    return whole


def _command(commands: Any, name: str, run: Run, help: str) -> argparse.ArgumentParser:
    description = help[0].upper() + help[1:] + "."
    command = commands.add_parser(name, help=help, description=description, epilog=EPILOG)
    command.set_defaults(run=run, command=name)
    return command


def _add_to_learn(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--plan",
        action="store_true",
        help="learn nothing: show what memory, files and time it would take, without loading the "
        "checkpoint",
    )


def _add_to_consolidate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--closed-form",
        action="store_true",
        help="solve for all concepts at once instead, in seconds, without pictures",
    )
    solving = settings_of(OPERATIONS["closed_form"].request)
    assert solving
    add_settings(command, solving, "consolidate", heading="closed form")


def _add_to_draw(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--beside",
        action="append",
        default=[],
        help="a prompt to draw to the right in the same, wider picture, such as "
        '"a photo of a V2 dog"; may be given several times. Each has an area of its own, where one '
        "prompt leaves it to the picture where things are",
    )


_MORE = {"learn": _add_to_learn, "consolidate": _add_to_consolidate, "draw": _add_to_draw}


def _add_to_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for the report (default: demo)"
    )
    command.add_argument(
        "--steps", type=int, help="training steps of each concept (default: the mini-SD's 300)"
    )
    command.add_argument(
        "--no-browser", action="store_true", help="do not open the report in a browser"
    )


def _add_to_mini(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=Path, help="where to write it, such as mini.safetensors")
    command.add_argument(
        "--stock",
        action="store_true",
        help="the same net with SD1.5's layer sizes, for programs that accept nothing else",
    )


def _add_to_ui(command: argparse.ArgumentParser) -> None:
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


def _add_to_install(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=Path, help="the web UI's folder (or its --data-dir)")
    command.add_argument(
        "--copy",
        action="store_true",
        help="copy the files; otherwise a clone is linked, so that updating it updates the tab",
    )


OWN: tuple[tuple[str, Run, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("demo", _demo, "learn two concepts on the mini-SD and write a report", _add_to_demo),
    (
        "mini",
        _mini,
        "write the mini-SD, a small Stable Diffusion for trying things out, as a checkpoint",
        _add_to_mini,
    ),
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
