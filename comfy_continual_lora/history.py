"""Stage 6: going back in a stack's history: undo the last change, restore a version, say how many
versions are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import StackError
from .files import real_file, set_aside
from .results import UndoResult
from .stackfile import read_header
from .store import (
    change,
    explain_failed_write,
    keep,
    open_stack,
    prune,
    save_version,
    write,
    writing,
)
from .versions import (
    Version,
    change_of,
    earlier,
    in_use,
    parent_of,
    takes_off_newest,
    undo_preview,
    versions,
)


def undo(path: Path, version: int | None = None) -> UndoResult:
    """Take the last change back, whatever it was: the stack is again exactly as before it.

    What is left stays in the history. Where the version before is no longer kept, the newest
    concept is
    taken off, if learning it was the last change. `version`: the number of the version that is
    meant.
    Errors: StackError if there is nothing to take back, or the stack is at another version by
    now.
    """
    path = real_file(path)
    with writing(path):
        was = read_header(path)
        current = in_use(path)
        assert current  # its header was just read
        if version is not None and version != current.number:
            raise StackError(
                f"The stack {path} has changed: it is at version {current.number} now "
                f"({current.change}). Look again, then undo."
            )
        if (parent := parent_of(path)) is not None:
            _go_back(path, parent)
        elif takes_off_newest(path):
            stack = open_stack(path).undone()
            save_version(stack, path, change("undone", stack.records), knows_parent=False)
        else:
            raise StackError(undo_preview(path))
        now = read_header(path)
    return _undone(was, now, current)


def _undone(was: dict[str, Any], now: dict[str, Any], left: Version) -> UndoResult:
    """The change is about the last concept that is on one side alone, else about the newest."""
    before = {record["id"]: record for record in was["concepts"]}
    after = {record["id"]: record for record in now["concepts"]}
    differs = before.keys() ^ after.keys()
    about = [record for one, record in (*before.items(), *after.items()) if one in differs]
    concept = (about or was["concepts"] or [{"token": "", "noun": ""}])[-1]
    tokens = [record["token"] for record in now["concepts"]]
    return UndoResult(left.change, concept["token"], concept["noun"], tokens, left.number)


def restore(path: Path, number: int) -> Version:
    """Go to the version with this number; the one in use now stays in the history. A damaged one is
    set aside as <name>.damaged.

    Errors: StackError for a number that is not kept, or a version that can't be read.
    """
    path = real_file(path)
    with writing(path):
        try:
            known = versions(path)
        except StackError:
            known = earlier(path)
        chosen = next((one for one in known if one.number == number), None)
        if chosen is None:
            numbers = ", ".join(str(one.number) for one in known) or "none"
            raise StackError(f"There is no version {number} of {path}. Kept are: {numbers}.")
        if not chosen.current:
            _go_back(path, chosen)
        now = in_use(path)
        assert now  # it was just written
        return now


def _go_back(path: Path, chosen: Version) -> None:
    stack, header = open_stack(chosen.file), read_header(chosen.file)
    with explain_failed_write(path):
        try:
            current = in_use(path)
        except StackError:
            current = None
            set_aside(path)
        if current is not None:
            stack.history = read_header(path)["history"]
            if stack.history:
                keep(path, current, versions(path)[0].number + 1)
        if (header["number"], header["history"]) == (chosen.number, stack.history):
            chosen.file.replace(path)  # needs no room on the disk
        else:
            write(stack, path, chosen.number, chosen.parent, change_of(header))
            chosen.file.unlink()


def keep_versions(path: Path, count: int) -> None:
    """Say how many earlier versions this stack keeps; those that are too many go at once.

    Errors: StackError for a number out of range.
    """
    if not 0 <= count <= 1000:
        raise StackError(f"A stack can keep 0 to 1000 earlier versions; {count} was asked for.")
    path = real_file(path)
    with writing(path):
        stack, current = open_stack(path), in_use(path)
        assert current  # it was just read
        stack.history = count
        with explain_failed_write(path):
            write(stack, path, current.number, current.parent, change_of(read_header(path)))
            prune(path, count)
