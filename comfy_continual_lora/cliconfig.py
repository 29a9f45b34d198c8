"""A command's flags in a TOML file, and what was run as such a file. Light.

    # continual-lora learn --config dog.toml
    checkpoint = "models/sd15.safetensors"
    images = "photos/dog"
    token = "V1"
    noun = "dog"
    steps = 500

A line is a flag without its dashes; `_` may stand for `-`. Paths are relative to the file's folder. A
flag that is given on the command line too counts there.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Action, Namespace, _AppendAction
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from . import __version__
from .cliparser import Parser
from .errors import SettingError, excerpt
from .files import write_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

CONFIG_HELP = "a TOML file with flags of this command, a line each, without their dashes"
_MARK = "# Written by continual-lora"
_NOT_RUN = ("help", "help_all", "config", "plan", "json")  # flags that are not part of a run


def with_config(words: Sequence[str], parser: Parser) -> list[str]:
    """The command line with the flags of its `--config` file in front of its own.

    Errors: SettingError for a file that can't be read, or that has no flags of this command.
    """
    command = next((word for word in words if word in parser.commands()), "")
    if not command:
        return [*words]
    at = words.index(command) + 1
    own = parser.commands()[command]
    file = _config_in(words[at:], own)
    if file is None:
        return [*words]
    return [*words[:at], *_words_of(file, own, words[at:]), *words[at:]]


def _config_in(given: Sequence[str], parser: Parser) -> Path | None:
    for number, word in enumerate(given):
        action = parser.flag_of(word)
        if action is not None and action.dest == "config":
            _, equals, value = word.partition("=")
            if equals:
                return Path(value)
            return Path(given[number + 1]) if number + 1 < len(given) else None
    return None


def _words_of(file: Path, parser: Parser, given: Sequence[str]) -> list[str]:
    """The file as words of a command line, without the flags that are given there."""
    own = {parser.flag_of(word) for word in given}
    first: list[str] = []
    flags: list[str] = []
    for name, value in _read(file).items():
        action = parser.flag(f"--{name.replace('_', '-')}") or parser.flag(name)
        if action is None or action.dest in _NOT_RUN:
            flags_of_runs = [one for one in parser._actions if one.dest not in _NOT_RUN]
            names = [
                flag.lstrip("-")
                for one in flags_of_runs
                for flag in one.option_strings
                if flag.startswith("--")
            ]
            settings = {
                one.dest: one.option_strings[-1].lstrip("-")
                for one in flags_of_runs
                if one.option_strings
            }
            near = [settings[name]] if name in settings else get_close_matches(name, names, 1)
            advice = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(names)}."
            raise SettingError(f"{file}: there is no flag --{excerpt(name)[1:-1]}. {advice}")
        if action in own:
            continue
        _check(file, name, value, action)
        values = [str(one) for one in (value if isinstance(value, list) else [value])]
        if action.type is Path:
            values = [str(file.parent / one) for one in values]
        flag = next((one for one in action.option_strings if one.startswith("--")), "")
        if not flag:
            first += values
        elif isinstance(value, bool):
            opposite = f"--no-{flag.removeprefix('--')}"
            flags += [flag] if value else [opposite] if opposite in action.option_strings else []
        elif action.nargs == "+":
            flags += [flag, *values]
        else:
            flags += [f"{flag}={one}" for one in values]
    return [*first, *flags]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingError(f"The file {file} can't be read ({error.strerror}).") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise SettingError(
            f"{file} is not TOML ({error}). A line is a flag without its dashes, such as steps = 500."
        ) from None


def _check(file: Path, name: str, value: Any, action: Action) -> None:
    """Errors: SettingError for a value of a kind that the flag does not take."""

    def is_text(one: Any) -> bool:
        return isinstance(one, (str, int, float)) and not isinstance(one, bool)

    if action.nargs == 0:
        fits, expected = isinstance(value, bool), "true or false"
    elif action.nargs == "+" or isinstance(action, _AppendAction):
        several = value if isinstance(value, list) else [value]
        fits, expected = bool(several) and all(map(is_text, several)), "texts, in a list"
    else:
        fits, expected = is_text(value), "one text or number"
    if not fits:
        shown = str(value).lower() if isinstance(value, bool) else excerpt(value)
        advice = "" if action.required else " Leave the line out for the default."
        if action.dest == "images":
            advice = " Put the pictures in one folder, and name that."
        raise SettingError(f"{file}: {name} is {shown}. Expected {expected}.{advice}")


# --- writing -------------------------------------------------------------------------------------


def write_config(path: Path, parser: Parser, arguments: Namespace) -> Path | None:
    """Write the flags of a run; what this program did not write is left as it is.

    Returns the path, or None if it was not written.
    """
    lines = [
        f"{_MARK} {__version__}. Run again with",
        f"#     {parser.prog} --config {path.name}",
        *(f"{name} = {_toml(value)}" for name, value in _given(parser, arguments)),
    ]
    with suppress(OSError, UnicodeError):
        if path.exists() and not path.read_text(encoding="utf-8").startswith(_MARK):
            return None
        write_whole(path, ("\n".join(lines) + "\n").encode())
        return path
    return None


def _given(parser: Parser, arguments: Namespace) -> list[tuple[str, Any]]:
    """The flags that are not at their default, by name."""
    given = []
    for action in parser._actions:
        value = getattr(arguments, action.dest, None)
        if action.dest in _NOT_RUN or value is None or value == action.default:
            continue
        flags = [one for one in action.option_strings if one.startswith("--")]
        given.append((flags[0].removeprefix("--") if flags else action.dest, value))
    return given


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Path):
        return _toml(os.path.abspath(value))
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
