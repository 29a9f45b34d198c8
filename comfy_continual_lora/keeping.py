"""Stage 6: what keeping a stack's versions takes besides tensors: the lock, the files of the history,
a file with another header. Light.
"""

from __future__ import annotations

import glob
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import StackError
from .files import check_names, clean_temporary, copy_whole, history_folder, real_file, write_whole
from .stackfile import opened, read_header
from .stackschema import checked
from .stacktensors import BYTES
from .versions import Change, Version, parent_among, versions

_NUMPY = {"F32": "<f4", "F16": "<f2", "I8": "i1"}


def new_change(kind: str, names: Sequence[str]) -> Change:
    """The change that is about to be stored, with the current time; `names` as in `Change`."""
    return Change(kind, names, datetime.now(timezone.utc).isoformat(timespec="seconds"))


# --- the history ---------------------------------------------------------------------------------


def add_version(
    path: Path, history: int, write: Callable[[int, int | None], None], *, knows_parent: bool = True
) -> None:
    """Make what `write(number, parent)` writes to a real path the newest version; the previous one
    goes into the history, which keeps `history` versions.

    `knows_parent` false: undo has no version to go back to. Errors: StackError if it can't be written.
    """
    existing = versions(path)
    current = next((one for one in existing if one.current), None)
    free = max((one.number for one in existing), default=0) + 1
    parent = None
    with explain_failed_write(path):
        if current is not None:
            parent = keep(path, current, free) if history else current.number
        number = free if parent is None else max(free, parent + 1)
        write(number, parent if knows_parent else None)
        prune(path, history)


def keep(path: Path, current: Version, free: int) -> int:
    """Put the version in use into the history; returns its number there. `free` is an unused number."""
    folder = history_folder(path)
    folder.mkdir(exist_ok=True)
    number = current.number
    target = folder / f"{number}.stack"
    if target.exists() and not _same_version(target, path):  # the file came from elsewhere
        number = free
        target = folder / f"{number}.stack"
    copy_whole(path, target)
    return number


def _same_version(one: Path, other: Path) -> bool:
    """Whether both are the same change of the same stack."""
    try:
        headers = [
            {**read_header(path), "number": None, "parent": None, "identity": "", "history": 0}
            for path in (one, other)
        ]
    except StackError:
        return False
    return headers[0] == headers[1]


def prune(path: Path, most: int) -> None:
    """Keep `most` earlier versions: the one that undo goes back to, and the newest others."""
    existing = versions(path)
    earlier = [one for one in existing if not one.current]
    parent = parent_among(existing) if most else None
    spare = [one for one in earlier if parent is None or one.number != parent.number]
    for one in spare[max(0, most - (parent is not None)) :]:
        with suppress(OSError):  # the stack is stored, and the next change removes it
            one.file.unlink(missing_ok=True)
    if not most:
        with suppress(OSError):
            history_folder(path).rmdir()


# --- a file with another header ------------------------------------------------------------------


def rewrite(source: Path, target: Path, changed: Mapping[str, Any]) -> None:
    """Write a stack file's tensors, untouched, with these fields of its header changed.

    Errors: StackError as `opened`; OSError.
    """
    with opened(source) as (file, header, shapes):
        file.seek(0)
        data = file.read()
    (length,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + length])
    content["__metadata__"]["stack"] = json.dumps(_stored({**header, **changed}))
    checked(target, content["__metadata__"], shapes)
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    write_whole(target, struct.pack("<Q", len(text)) + text + data[8 + length :])


def _stored(part: Any) -> Any:
    """A part of a checked header as it is stored: fields of later releases among the others."""
    if isinstance(part, list):
        return [_stored(one) for one in part]
    if not isinstance(part, dict):
        return part
    fields = {name: _stored(value) for name, value in part.items() if name != "later"}
    return {**fields, **part.get("later", {})}


def check_finite(path: Path) -> None:
    """Errors: StackError for a stack file with infinite or NaN values, and as `opened`."""
    import numpy as np

    with opened(path) as (file, _, shapes):
        for name, shape in shapes.items():
            file.seek(shape.start)
            data = file.read(BYTES[shape.dtype] * math.prod(shape.sizes))
            if not np.isfinite(np.frombuffer(data, _NUMPY[shape.dtype])).all():
                raise not_finite(path, name)


def not_finite(path: Path, tensor: str) -> StackError:
    """The error for a stack whose first bad tensor is this one."""
    return StackError(
        f"The concept stack {path} contains infinite or NaN values (first in {tensor}), which would "
        "make every picture black. Go back to an earlier version (`restore`), or get the file again."
    )


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
    """Turn an OSError into a StackError that gives the reason."""
    try:
        yield
    except OSError as error:
        raise StackError(
            f"The concept stack {path} can't be written ({error.strerror or error}): no room or "
            "no permission there. The concepts stored before are untouched."
        ) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Lock the stack for one writer, from reading it to replacing it; files that killed writers
    left are cleaned up first.

    Errors: StackError, immediately, if another program holds it or the folder is not writable.
    """
    path = real_file(path)
    check_names(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StackError(
            f"Another program is changing {path} right now. Wait until it is done, or stop it."
        ) from None
    except OSError as error:
        raise StackError(
            f"The folder {path.parent} can't be written to ({error.strerror or error}). Allow "
            "writing there, or put the stack elsewhere."
        ) from None
    try:
        _clean(path)
        yield
    finally:
        lock.release()


def _clean(path: Path) -> None:
    with suppress(OSError):
        for folder in (path.parent, history_folder(path)):
            clean_temporary(folder)
        # temporary files of earlier versions of this program
        for stray in path.parent.glob(f".{glob.escape(path.name)}.????????"):
            stray.unlink()
