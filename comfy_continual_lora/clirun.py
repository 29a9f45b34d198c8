"""Running an operation for the command line, and showing its result. Light."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .cliflags import request_of
from .cliprogress import Bar
from .cliterminal import styled
from .operations import OPERATIONS, Operation

if TYPE_CHECKING:
    from .results import Result

Run = Callable[[argparse.Namespace, Bar], None]
# The first line of their results says what was done
_CHANGING = (*("learn", "consolidate", "forget", "merge", "import", "rename", "undo", "restore"),)


def operate(arguments: argparse.Namespace, bar: Bar) -> None:
    run(arguments.command, arguments, bar)


def run(name: str, arguments: argparse.Namespace, bar: Bar, **other: Any) -> None:
    """Run an operation and show its result; `other`: fields that do not come from flags."""
    operation = OPERATIONS[name]
    request = checked(operation, request_of(operation, arguments, **other))
    show(operation(request, bar), arguments, bar)


def checked(operation: Operation, request: Any) -> Any:
    """The request, without the mistakes that can be found before anything heavy is imported."""
    if operation.module != "upkeep":  # which loads nothing
        from .early import check

        check(request)
    return request


def show(result: Result, arguments: argparse.Namespace, bar: Bar) -> None:
    bar.clear()
    if arguments.json:
        print(json.dumps(result.as_json()))
        return
    for number, line in enumerate(result.summary().splitlines()):
        # what was done, and the version that is in use
        is_first = number == 0 and arguments.command in _CHANGING
        style = "green" if is_first else "bold" if line.startswith("* ") else ""
        print(styled(line, style, sys.stdout) if style else line)
