"""The command line's parser: help in two levels, mistakes in one line that says what was meant. Light."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, NoReturn

from .cliterminal import styled
from .errors import excerpt

_NEAR = 0.65  # how alike a mistyped flag has to be, of 1


class Parser(argparse.ArgumentParser):
    """A parser whose commands and flags have to be spelled out, or nearly.

    `--help` leaves out what `expert` marked, and `--help-all` shows it.
    """

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]] | None = None, **rest: Any):
        """`groups`: the commands under their headings."""
        self.groups = groups or {}
        self.experts: list[argparse.Action] = []
        super().__init__(*args, formatter_class=_Help, add_help=False, **rest)
        self._optionals.title = "flags"
        self._positionals.title = "what to give"
        self.add_argument("-h", "--help", action="help", help="show this help")

    def expert(self, actions: Iterable[argparse.Action]) -> None:
        """Keep these flags for `--help-all`."""
        self.experts += actions
        if self.experts and "--help-all" not in self._option_string_actions:
            self.add_argument("--help-all", action=_HelpAll, help="show all flags")

    def commands(self) -> dict[str, Parser]:
        """The commands' parsers by name; none in a command's own."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)  # type: ignore[arg-type]
        return {}

    def flag(self, name: str) -> argparse.Action | None:
        """What has this flag or name."""
        by_name = {action.dest: action for action in self._actions if not action.option_strings}
        return self._option_string_actions.get(name) or by_name.get(name)

    def flag_of(self, word: str) -> argparse.Action | None:
        """What a word of the command line gives, also if its flag is shortened or its value is part of
        it (`--step=9`, `-s9`); None for what is no flag, or could be several.
        """
        known, name = self._option_string_actions, word.partition("=")[0]
        if name in known:
            return known[name]
        if not word.startswith("--"):
            return known.get(word[:2])
        meant = [one for one in known if one.startswith(name)]
        return known[meant[0]] if len(meant) == 1 else None

    # --- mistakes -----------------------------------------------------------------------------

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        given, rest = self.parse_known_args(args, namespace)
        if rest:
            command = self.commands().get(getattr(given, "command", ""), self)
            command.error(
                f"no flag takes {excerpt(' '.join(rest))}. Most take one value: put a text of several "
                "words in quotes, and pictures in one folder"
            )
        return given

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        words = sys.argv[1:] if args is None else list(args)
        self._check_flags(words)
        return super().parse_known_args(words, namespace)

    def _check_flags(self, words: Sequence[str]) -> None:
        """End with an error at the first flag that does not exist: argparse would only find what is
        missing instead.
        """
        if self.commands():
            words = [*takewhile(lambda word: word.startswith("-"), words)]
        known = self._option_string_actions
        for word in takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if word.startswith("--") and " " not in word:
                exists = any(one.startswith(name) for one in known)
            else:
                name = word[:2]
                exists = not name[1:].isalpha() or not word.startswith("-") or name in known
            if not exists and " " not in word:
                self.error(f"there is no flag {name}.{_meant(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [*action.choices]
        meant = _meant(str(value), choices) or f" There are: {', '.join(map(str, choices))}."
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"there is no command {excerpt(value)}.{meant}")
        name = "/".join(action.option_strings) or action.dest
        self.error(f"{name} can't be {excerpt(value)}.{meant}")

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and status 2."""
        missing = "the following arguments are required: "
        if message.startswith(missing):
            message = f"{message.removeprefix(missing)} missing"
        message = message.removeprefix("argument ")
        message += "" if message.endswith((".", "?")) else "."
        print(
            f"{styled(self.prog, 'red', sys.stderr)}: {message} See {self.prog} --help.",
            file=sys.stderr,
        )
        raise SystemExit(2)

    # --- help ---------------------------------------------------------------------------------

    def format_help(self, everything: bool = False) -> str:
        if self.groups:
            return self._overview()
        hidden = [] if everything else self.experts
        helps = [(action, action.help) for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        self.usage = self._usage()
        try:
            return super().format_help()
        finally:
            for action, text in helps:
                action.help = text

    def format_usage(self) -> str:
        self.usage = self._usage()
        return super().format_usage()

    def _usage(self) -> str:
        """What has to be given."""
        words = [self.prog]
        for action in self._actions:
            value = action.metavar or action.dest.upper()
            if not action.option_strings:
                words.append(f"[{value}]" if action.nargs == "?" else str(value))
            elif action.required:
                words.append(f"{action.option_strings[0]} {value}")
        return " ".join([*words, "[flags]"]).replace("%", "%%")

    def _overview(self) -> str:
        """The commands under their headings."""
        (action,) = (one for one in self._actions if isinstance(one, argparse._SubParsersAction))
        helps = {one.dest: one.help or "" for one in action._choices_actions}
        formatter = self._get_formatter()
        formatter.add_usage(f"{self.prog} COMMAND [flags]", [], [])
        formatter.add_text(self.description)
        for heading, names in self.groups.items():
            formatter.start_section(heading)
            for name in names:
                formatter.add_argument(argparse.Action([], name, help=helps[name], metavar=name))
            formatter.end_section()
        formatter.start_section("flags")
        formatter.add_arguments([one for one in self._actions if one.option_strings])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _HelpAll(argparse.Action):
    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, nargs=0, default=argparse.SUPPRESS, **rest)

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        print(parser.format_help(everything=True), end="")
        raise SystemExit(0)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str, **rest: Any) -> None:
        width = min(shutil.get_terminal_size().columns, 110) - 2
        super().__init__(prog, max_help_position=26, width=width)

    def start_section(self, heading: str | None) -> None:
        super().start_section(styled(heading, "bold", sys.stdout) if heading else heading)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """ "-c, --checkpoint FILE", where argparse repeats the value."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def _meant(given: str, known: Iterable[str]) -> str:
    near = get_close_matches(given, [*known], 1, _NEAR)
    return f" Did you mean {near[0]}?" if near else ""
