"""Stage 6: going back in a stack's history: undo the last change, restore a version, set how many
versions are kept. Light: whole files are moved, and tensors stay as they are.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import StackError
from .files import real_file, replace, set_aside
from .keeping import check_finite, explain_failed_write, keep, prune, rewrite, writing
from .results import UndoResult
from .stackfile import read_header
from .versions import (
    Version,
    earlier,
    in_use,
    parent_of,
    taken_off,
    undo_preview,
    versions,
)


def undo(path: Path, version: int | None = None) -> UndoResult:
    """Undo the last change, whatever it was: the stack is exactly as it was before.

    The version that is undone stays in the history. If its parent is not kept, or there was none,
    but the change was to put concepts on top, these are taken off. `version`: the number of the
    version to undo.
    Errors: StackError if there is nothing to undo, or if another version is in use by now.
    """
    path = real_file(path)
    with writing(path):
        before = read_header(path)
        current = in_use(path)
        assert current  # its header has just been read
        if version is not None and version != current.number:
            raise StackError(
                f"The stack {path} has changed: it is at version {current.number} now "
                f"({current.change}). Look at its history (`history`), then undo."
            )
        if (parent := parent_of(path)) is not None:
            _go_back(path, parent)
        elif count := taken_off(path):
            _take_off(path, count)
        else:
            raise StackError(undo_preview(path))
        after = read_header(path)
    return _undone(before["concepts"], after["concepts"], current)


def _take_off(path: Path, count: int) -> None:
    from .consolidation import as_of
    from .store import change, open_stack, save_version

    stack = open_stack(path)
    stack = as_of(stack, len(stack.records) - count)
    save_version(stack, path, change("undone", stack.records), knows_parent=False)


def _undone(
    before: list[dict[str, Any]], after: list[dict[str, Any]], undone: Version
) -> UndoResult:
    """The change is about the last concept that only one side has, or else the newest."""
    changed = {record["id"] for record in before} ^ {record["id"] for record in after}
    about = [record for record in (*before, *after) if record["id"] in changed]
    concept = (about or before or [{"token": "", "noun": ""}])[-1]
    tokens = [record["token"] for record in after]
    return UndoResult(undone.change, concept["token"], concept["noun"], tokens, undone.number)


def restore(path: Path, number: int) -> Version:
    """Go back to the version with this number. The one in use stays in the history; if it is
    damaged, it is renamed to <name>.damaged.

    Errors: StackError for a number that is not kept, or a version that can't be read.
    """
    path = real_file(path)
    with writing(path):
        try:
            available = versions(path)
        except StackError:
            available = earlier(path)
        chosen = next((one for one in available if one.number == number), None)
        if chosen is None:
            numbers = ", ".join(str(one.number) for one in available) or "none"
            raise StackError(f"There is no version {number} of {path}. Available: {numbers}.")
        if not chosen.current:
            _go_back(path, chosen)
        restored = in_use(path)
        assert restored  # it has just been written
        return restored


def _go_back(path: Path, chosen: Version) -> None:
    check_finite(chosen.file)
    header = read_header(chosen.file)
    history = header["history"]
    with explain_failed_write(path):
        try:
            current = in_use(path)
        except StackError:
            current = None
            set_aside(path)
        if current is not None:
            history = read_header(path)["history"]
            if history:
                keep(path, current, versions(path)[0].number + 1)
        if (header["number"], header["history"]) == (chosen.number, history):
            replace(chosen.file, path)  # needs no disk space
            with suppress(OSError):  # programs see by its time that the stack has changed
                os.utime(path)
        else:
            changed = {"number": chosen.number, "parent": chosen.parent, "history": history}
            rewrite(chosen.file, path, changed)
            with suppress(OSError):  # of the same number, so it counts no more
                chosen.file.unlink()


def keep_versions(path: Path, count: int) -> None:
    """Set how many earlier versions this stack keeps; any more are deleted immediately.

    Errors: StackError for a number out of range.
    """
    if not 0 <= count <= 1000:
        raise StackError(f"`keep` is {count}; a stack can keep 0 to 1000 earlier versions.")
    path = real_file(path)
    with writing(path):
        check_finite(path)
        current = in_use(path)
        assert current  # it has just been read
        changed = {"number": current.number, "parent": current.parent, "history": count}
        with explain_failed_write(path):
            rewrite(path, path, changed)
            prune(path, count)
