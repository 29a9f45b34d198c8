"""Stage 6: the versions of a stack that are kept, read from their headers. Light.

Each version is a complete stack file with its number, the change that made it and the version that
was changed (its parent). Undo goes back to the parent; the version that was undone can be restored
too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import StackError
from .files import real_file
from .stackfile import opened, read_header
from .stackschema import CHANGES, history_files, previous_file

_MOST_NUMBER = 10**8  # no stack has been changed as often: a larger number is a stranger's


@dataclass(frozen=True)
class Change:
    """What made a version of a stack."""

    kind: str  # a key of CHANGES
    names: Sequence[str]  # of the concepts it is about, as in prompts
    when: str  # ISO 8601, UTC
    later: Mapping[str, Any] = field(default_factory=dict)  # what later releases added

    def __str__(self) -> str:
        return CHANGES[self.kind].format(", ".join(self.names) or "nothing")


@dataclass(frozen=True)
class Version:
    """One version of a stack."""

    number: int
    parent: int | None  # the number of the version that was changed; None if unknown
    change: str
    when: str
    tokens: list[str]
    identity: str  # of the stack
    size: int  # in bytes
    current: bool
    file: Path


def versions(path: Path) -> list[Version]:
    """All versions of a stack that are kept, the newest first; unreadable files are left out.

    Errors: StackError if the version in use can't be read.
    """
    path = real_file(path)
    kept = earlier(path)
    if path.exists():
        now = _version(path, next((one.number + 1 for one in kept), 1), current=True)
        kept = [now, *(one for one in kept if one.number != now.number)]
    return sorted(kept, key=lambda one: one.number, reverse=True)


def in_use(path: Path) -> Version | None:
    """The version in use; None if there is no stack. Errors: StackError if it can't be read."""
    return next((one for one in versions(path) if one.current), None)


def earlier(path: Path) -> list[Version]:
    """The readable versions besides the one in use, the newest first."""
    files = [*history_files(path).items(), (0, previous_file(path))]
    return [one for number, file in files if (one := _readable(file, number)) is not None]


def _readable(file: Path, number: int) -> Version | None:
    try:
        return _version(file, number, current=False)
    except StackError:
        return None


def _version(file: Path, number: int, *, current: bool) -> Version:
    with opened(file) as (stream, header, _):
        size = os.fstat(stream.fileno()).st_size
    parent = header["parent"]
    stored = header["number"]
    if current and stored is not None and stored < _MOST_NUMBER:
        number = stored
    if stored is None and number:  # an early version of this program overwrote its parent
        parent = number - 1
    records = header["concepts"]
    tokens = [record["token"] for record in records]
    if change := change_of(header):
        text, when = str(change), change.when
    else:
        text = f"a change by an earlier version; newest: {tokens[-1] if tokens else 'none'}"
        when = records[-1]["learned"] if records else ""
    return Version(number, parent, text, when, tokens, header["identity"], size, current, file)


def parent_of(path: Path) -> Version | None:
    """The version that undo goes back to, if it is kept.

    Errors: StackError if there is no stack.
    """
    return parent_among(versions(path))


def parent_among(existing: Sequence[Version]) -> Version | None:
    """The same among these versions of a stack."""
    current = next(one for one in existing if one.current)
    others = (one for one in existing if not one.current)
    parent = next((one for one in others if one.number == current.parent), None)
    if parent is None:
        return None
    is_other = current.identity and parent.identity and current.identity != parent.identity
    return None if is_other or not _follows(current.file, parent.file) else parent


def _follows(file: Path, before: Path) -> bool:
    """Whether the change that made a version can be one of the version `before`, by the concepts of
    both. Numbers alone don't say: a stack that was copied to another computer, changed there and
    copied back has given the same ones to other versions.
    """
    header = read_header(file)
    change = change_of(header)
    now, then = _concepts(header), _concepts(read_header(before))
    if change is None or change.kind == "undone":
        return True
    if change.kind in ("learned", "imported", "merged"):
        return len(now) > len(then) and now[: len(then)] == then
    if change.kind == "forgot":
        return len(now) == len(then) - 1 and now == [one for one in then if one in now]
    if change.kind == "replaced":
        return len(now) == len(then) and now[:-1] == then[:-1]
    if change.kind == "renamed":
        return [one for one, _ in now] == [one for one, _ in then]
    return now == then


def _concepts(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Their ids and words."""
    return [(record["id"], record["token"]) for record in header["concepts"]]


def undo_preview(path: Path) -> str:
    """A sentence on what undo would do, or that there is nothing to undo.

    Errors: StackError for a file that can't be read.
    """
    current = in_use(path)
    if current is None:
        return "There is nothing to undo: no concept has been learned yet."
    parent, change = parent_of(path), change_of(read_header(path))
    count = taken_off(path)
    added = change is not None and change.kind in ("learned", "imported", "merged")
    if parent is not None or (added and count):
        tokens = parent.tokens if parent else current.tokens[:-count]
        return f"Undo takes back: {current.change} ({current.when[:10]}). {_then(tokens)}"
    if not current.tokens:
        return "There is nothing to undo: the stack is empty, and no earlier version of it is kept."
    if not count:
        return (
            f"There is nothing to undo: the version before this change ({current.change}) is no "
            "longer kept."
        )
    return f"Undo takes {current.tokens[-1]} off. {_then(current.tokens[:-1])}"


def _then(tokens: Sequence[str]) -> str:
    return f"The stack then holds {', '.join(tokens) or 'no concept'}."


def taken_off(path: Path) -> int:
    """How many of the newest concepts have to be taken off to undo the last change, without the
    previous version; 0 if that takes more.
    """
    if takes_off_newest(path):
        return 1
    header = read_header(path)
    change = change_of(header)
    if change is None or change.kind != "merged":
        return 0
    return min(len(change.names), len(header["concepts"]))


def takes_off_newest(path: Path) -> bool:
    """Whether the last change was about the newest concept alone, so that `taken_off` is 1."""
    header = read_header(path)
    change = change_of(header)
    return bool(header["concepts"]) and (
        change is None or change.kind in ("learned", "imported", "undone")
    )


def change_of(header: Mapping[str, Any]) -> Change | None:
    """What made this version; None if an early version of this program wrote it."""
    return Change(**header["change"]) if header["change"] else None
