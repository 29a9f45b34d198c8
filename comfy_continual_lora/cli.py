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
import signal
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cliconfig import CONFIG_HELP, with_config, write_config
from .cliflags import add_fields, add_settings, hide_experts, names_in, request_of
from .cliown import OWN
from .cliparser import Parser
from .cliprogress import FIRST, Bar
from .clirun import Run, checked, operate, run, show
from .cliterminal import said
from .errors import Cancelled, ContinualLoraError, SettingError
from .operations import OPERATIONS
from .progress import Progress, unit_for
from .requests import settings_of
from .waiting import wait_briefly

if TYPE_CHECKING:
    from .requests import LearnRequest

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
_COMPLETION = "print what makes a shell complete commands"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user error (explained in one paragraph), 128 and the signal's number
    if one stopped it, so 130 for Ctrl-C, and 130 for a second one of any kind.
    """
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()  # at exit an error would no longer be told
    except KeyboardInterrupt:  # a second Ctrl-C, or one while no `Bar` takes note of it
        _complain("stopped.", "yellow")
        return 130
    except BrokenPipeError:  # the reader has exited, as `| head` does
        _discard_output()
        return 1
    except OSError as error:
        _discard_output()
        _complain(_problem(error))
        return 2


def _main(argv: list[str] | None) -> int:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started it has closed them
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console may lack letters of a name
            stream.reconfigure(errors="backslashreplace")
    if argv is None:  # the process is the command's own
        wait_briefly()
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
    except ContinualLoraError as error:
        bar.clear()
        _complain(error.spelled(names))
        return 2
    except Cancelled as stopped:
        bar.clear()
        _complain(f"stopped. {stopped}", "yellow")
        return 128 + (bar.stopped_by or signal.SIGINT)
    finally:
        bar.close()
    return 0


def _complain(message: str, style: str = "red") -> None:
    print(said(message, style, sys.stderr), file=sys.stderr)


def _discard_output() -> None:
    """What could not be written would be written again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _problem(error: OSError) -> str:
    """In words, of the output, or of a file or folder that nothing else checks."""
    if error.filename is None:
        return f"A file or the output can't be read or written ({error.strerror or error})."
    return f"{error.filename} can't be read or written ({error.strerror})."


# --- the commands of operations ------------------------------------------------------------------


def _learn(arguments: argparse.Namespace, bar: Bar) -> None:
    operation = OPERATIONS["learn"]
    request: Any = checked(operation, request_of(operation, arguments))
    if arguments.plan:
        return _plan(request, arguments.json)
    preview = _preview_file(request)
    if request.settings.preview_every:
        from .imagefile import check_output

        check_output(preview)

    def report(progress: Progress) -> None:
        if progress.preview is not None:
            from .imagefile import save_own

            save_own(progress.preview, preview)
        bar(progress)

    result: Any = operation(request, report)
    plot = _plot_looks(request, result) if not result.again and result.record.watched else None
    show(result, arguments, bar)
    if plot and not arguments.json:
        print(f"The curve: {plot}")
    if not arguments.json and not result.again:
        from .reportpage import pasted

        command = ["continual-lora", "draw", "--checkpoint", str(arguments.checkpoint)]
        if arguments.stack:
            command += ["--stack", str(arguments.stack)]
        command += ["--prompt", f"a photo of a {result.record.name}"]
        print(f"Try: {pasted(command)}")
    if not result.again:
        file = request.stack_file
        beside = f"{file.name.removesuffix('.safetensors')}.{result.record.token}.toml"
        written = write_config(file.with_name(beside), parser().commands()["learn"], arguments)
        if written and not arguments.json:
            print(f"What was run: {written}")


def _plot_looks(request: LearnRequest, result: Any) -> Path | None:
    """Draw how it went beside the stack; None if there is no room."""
    from .curves import looks_picture
    from .imagefile import save_own

    path = _preview_file(request, "likeness")
    try:
        save_own(looks_picture(result.record.watched), path)
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
    if plan.again:
        print(
            f"{request.token} was learned before, by the same request: nothing would be done now."
        )
    on_cpu = plan.device == "cpu"
    print(
        f"{plan.family}, {plan.size} x {plan.size} pixels, {plan.rows} at once, on {plan.device}. "
        "Memory, at least:"
    )
    for name, (size, dtype) in plan.weights.items():
        note = "in main memory while learning" if name in plan.resting else ""
        _size(name, size, f"{dtype} {note}")
    _size("adapter and word", plan.learned)
    _size("their gradients and optimizer", plan.optimizer)
    if plan.penalties:
        _size("the method's penalties", plan.penalties)
    _size("activations", plan.activations)
    _size("peak", plan.peak, "" if on_cpu else "plus the driver's own")
    print("Files:")
    _size("stack", plan.stack_file, "plus the version before it")
    _size("exported LoRA and embedding", plan.exported)
    least, most = plan.seconds
    unit, seconds = unit_for(least)
    print(
        f"Time: {least / seconds:,.0f} to {most / seconds:,.0f} {unit} of training, judged by how "
        "fast this device computes."
    )


def _size(name: str, size: int, note: str = "") -> None:
    print(f"  {name:<36} {size / 1e6:>9,.1f} MB  {note}".rstrip())


def _consolidate(arguments: argparse.Namespace, bar: Bar) -> None:
    closed_form = arguments.closed_form
    unused = (
        _settings_of("consolidate") + ["images"] if closed_form else _settings_of("closed_form")
    )
    if given := [name for name in unused if getattr(arguments, name) is not None]:
        here, there = ("the closed form", "DSC") if closed_form else ("DSC", "the closed form")
        raise SettingError(
            f"`{given[0]}` is for {there} and changes nothing in {here}. Leave it out, or "
            f"{'leave out' if closed_form else 'add'} --closed-form."
        )
    if closed_form:
        return run("closed_form", arguments, bar)
    if arguments.images is None:
        raise SettingError(
            "DSC needs `images`, the pictures the newest concept was learned from; without "
            "pictures there is `closed_form`."
        )
    operate(arguments, bar)


def _settings_of(name: str) -> list[str]:
    """The names of an operation's settings."""
    kind = settings_of(OPERATIONS[name].request)
    assert kind
    return [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]


def _draw(arguments: argparse.Namespace, bar: Bar) -> None:
    beside = arguments.beside or []
    prompts = [(prompt, *beside) for prompt in arguments.prompts]
    run("draw", arguments, bar, prompts=prompts)


RUNS: dict[str, Run] = {"learn": _learn, "consolidate": _consolidate, "draw": _draw}
# --- the command line's own commands -------------------------------------------------------------


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
    own = (*OWN, ("completion", _completion, _COMPLETION, _add_to_completion))
    for name, work, help, add in own:
        add(_command(commands, name, work, help))
    for name, operation in OPERATIONS.items():
        if name == "closed_form":
            continue  # consolidate --closed-form
        command = _command(commands, name, RUNS.get(name, operate), operation.help)
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


def _add_to_completion(command: Parser) -> None:
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell to write it for")


if __name__ == "__main__":
    sys.exit(main())
