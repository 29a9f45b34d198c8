"""The command line's flags, made from the fields of requests and settings, and its names for
messages. Light.

A flag is named after its field, with the exceptions of FLAGS; help, type, choices and heading come
from the field's declaration.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from .cliparser import Parser
from .fields import Settings, in_words, suiting
from .operations import NAMES, OPERATIONS, Operation
from .requests import Request, settings_of

FLAGS = {"rate": "--lr", "prompts": "--prompt"}
FLAGS_OF = {  # of one command
    ("evaluate", "images"): "--concepts",
    ("merge", "other"): "other",
    ("restore", "version"): "version",
    ("rename", "token"): "token",
    ("rename", "to"): "to",
}
SHORT = {  # in every command that has the field
    "checkpoint": "-c",
    "images": "-i",
    "token": "-t",
    "noun": "-n",
    "prompts": "-p",
    "out": "-o",
    "steps": "-s",
    "count": "-n",
}
# What `--help` shows of a command; `--help-all` shows the rest, and that of commands not listed here
# is all shown
FIRST = {
    "learn": (
        *("checkpoint", "images", "token", "noun", "kind", "steps", "until", "method"),
        *("replace", "plan", "config"),
    ),
    "consolidate": ("checkpoint", "images", "closed_form", "dsc_steps", "config"),
    "draw": (
        *("checkpoint", "prompts", "count", "seed", "width", "height", "steps", "negative"),
        *("beside", "only", "out"),
    ),
    "scores": ("checkpoint", "images", "plot", "trials"),
    "evaluate": ("checkpoint", "images", "plot", "pictures"),
    "forget": ("checkpoint", "token"),
    "merge": ("checkpoint", "other"),
    "import": ("checkpoint", "lora", "token", "noun", "embedding", "trigger", "strength"),
}
COMMANDS = {name: f"continual-lora {name}" for name in OPERATIONS} | {
    "closed_form": "continual-lora consolidate --closed-form"
}
DEFAULTS: dict[tuple[str, str], Any] = {("draw", "out"): Path("drawn")}
_PROMPT_HELP = 'what to draw, such as "a photo of a V1 teapot"; may be given several times'
_METAVARS = {
    "checkpoint": "FILE",
    "stack": "FILE",
    "images": "FOLDER",
    "token": "WORD",
    "noun": "NOUN",
    "prompts": "PROMPT",
    "only": "WORD",
    "out": "FOLDER",
    "embeddings": "FOLDER",
    "clip": "FOLDER",
    "plot": "FILE",
    "lora": "FILE",
    "embedding": "FILE",
    "keep": "N",
    "version": "NUMBER",
    "other": "STACK",
    "to": "NEW",
}
_WITHOUT_DEVICE = ("rename", "undo", "restore", "history", "info")  # they compute nothing
_LONGEST = 50  # letters of the choices in front of a help text
_NUMBERS = {"int": int, "float": float}


def flag_of(name: str, command: str = "") -> str:
    """The flag of a field or a setting; a name without dashes is a positional argument."""
    return FLAGS_OF.get((command, name)) or FLAGS.get(name) or f"--{name.replace('_', '-')}"


def names_in(command: str) -> dict[str, str]:
    """What messages call operations, fields and settings while this command runs."""
    return {name: COMMANDS.get(name) or flag_of(name, command) for name in NAMES}


def hide_experts(parser: Parser, command: str) -> None:
    """Leave all but the FIRST flags to `--help-all`."""
    if first := FIRST.get(command):
        parser.expert([a for a in parser._actions if a.dest not in ("help", *first)])


def add_fields(
    parser: argparse.ArgumentParser, operation: Operation, optional: tuple[str, ...] = ()
) -> None:
    """Add flags for all fields of the operation's request and for its settings.

    `optional`: required fields of the request that this command does not require.
    """
    for field in dataclasses.fields(operation.request):
        if isinstance(field.default, Settings):
            add_settings(parser, type(field.default), operation.name)
        elif field.name not in ("device", "prediction") or operation.name not in _WITHOUT_DEVICE:
            _add_field(parser, operation.name, field, field.name in optional)


def _add_field(
    parser: argparse.ArgumentParser, command: str, field: dataclasses.Field, optional: bool
) -> None:
    name, declared = field.name, str(field.type)
    flag = flag_of(name, command)
    default = DEFAULTS.get((command, name), None if field.default is MISSING else field.default)
    required = field.default is MISSING and not optional
    help = _PROMPT_HELP if name == "prompts" else str(field.metadata["help"])
    if default not in (None, "", (), False):
        help += f" (default: {default})"
    rest: dict[str, Any] = {"help": help.replace("%", "%%"), "default": default}
    if declared == "bool":
        parser.add_argument(flag, dest=name, action="store_true", help=rest["help"])
        return
    kind = declared.split(" ")[0]
    rest["type"] = Path if "Path" in declared else _NUMBERS.get(kind, str)
    rest["metavar"] = _METAVARS.get(name)
    if field.metadata["choices"]:
        rest["choices"] = field.metadata["choices"]
    if declared.startswith("Sequence["):
        rest |= {"action": "append"} if name == "prompts" else {"nargs": "+"}
    if flag.startswith("-"):
        parser.add_argument(*_names(name, flag), dest=name, required=required, **rest)
    else:
        metavar = rest["metavar"]
        parser.add_argument(flag, help=rest["help"], type=rest["type"], metavar=metavar)


def _names(name: str, flag: str) -> list[str]:
    return [SHORT[name], flag] if name in SHORT else [flag]


def add_settings(
    parser: argparse.ArgumentParser, settings: type[Settings], command: str, heading: str = ""
) -> None:
    """Add one flag per setting, under its own heading or `heading`."""
    groups: dict[str, Any] = {"": parser}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        title = heading or field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_setting(groups[title], command, field)


def _add_setting(group: Any, command: str, field: dataclasses.Field) -> None:
    name = field.name
    names = _names(name, flag_of(name, command))
    help = f"{field.metadata['help']} (default: {_default(field)})".replace("%", "%%")
    kind = str(field.type).split(" ")[0]
    if kind == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(*names, dest=name, action=action, default=None, help=help)
        return
    choices = field.metadata["choices"] or None
    metavar = None if choices else "N" if kind in _NUMBERS else name.upper()
    if choices and len(" ".join(choices)) > _LONGEST:
        metavar, help = name.upper(), f"{help}: {', '.join(choices)}"
    group.add_argument(
        *names, dest=name, type=_NUMBERS.get(kind, str), choices=choices, help=help, metavar=metavar
    )


def _default(field: dataclasses.Field) -> str:
    """The default in words."""
    if field.default is not None:
        return in_words(field.default)
    if not field.metadata["by_checkpoint"]:
        return "none"
    return suiting(field) or "the checkpoint's own"


# --- flags -> request ----------------------------------------------------------------------------


def request_of(operation: Operation, arguments: argparse.Namespace, **other: Any) -> Request:
    """The request made from the flags; `other`: fields that do not come from flags."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(operation.request):
        value = getattr(arguments, field.name, None)
        if value is not None:
            values[field.name] = value
    if (kind := settings_of(operation.request)) is not None:
        values["settings"] = settings_from(arguments, kind)
    return operation.request(**{**values, **other})


def settings_from(arguments: argparse.Namespace, kind: type[Settings]) -> Settings:
    """The settings made from the flags; others keep their defaults."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {name: getattr(arguments, name) for name in names}
    return kind(**{name: value for name, value in values.items() if value is not None})
