"""Names of files that the backend and every front end agree on, and how a file is replaced.

Light: front ends inside a host ask it too.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import StackError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open can't be removed
    fcntl = None

PICTURES = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
)
STACKS = ".concepts.safetensors"
TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a concept's word, which names files too
_TEMPORARY = re.compile(r"\.continual-lora-[0-9a-f]{16}\.tmp")
# What Windows keeps for devices, whatever the ending
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])", re.IGNORECASE)


def stack_path(checkpoint: str | Path, name: str = "") -> Path:
    """`<checkpoint stem>.concepts.safetensors` in the checkpoint's folder, or beside a diffusers
    folder.

    A checkpoint may have several stacks, told apart by `name`. A linked checkpoint has its target's
    stack, unless there is one beside the link.
    Errors: StackError for a name that can't be part of a file's, or no checkpoint's.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.name:
        raise StackError(f"{str(checkpoint)!r} is no checkpoint. Name its file or its folder.")
    if name and not re.fullmatch(r"[\w-]{1,64}", name):
        raise StackError(
            f"The stack's name {name!r} may hold only letters, digits, - and _ (at most 64): it "
            "becomes part of a file name."
        )
    path = _stack_beside(checkpoint, name)
    if checkpoint.is_symlink() and not os.path.lexists(path):
        target = checkpoint.resolve()
        if (
            target.is_dir() or target.suffix == ".safetensors"
        ):  # not a download cache's blob, named by its hash
            return _stack_beside(target, name)
    return path


def _stack_beside(checkpoint: Path, name: str) -> Path:
    stem = checkpoint.stem if checkpoint.is_file() else checkpoint.name
    return checkpoint.with_name(f"{stem}.{name}{STACKS}" if name else f"{stem}{STACKS}")


def stack_stem(stack: Path) -> str:
    """The name that a stack's exports begin with."""
    return stack.name.removesuffix(STACKS).removesuffix(".safetensors")


def history_folder(stack: Path) -> Path:
    """Where the earlier versions of a stack lie."""
    return stack.with_name(f"{stack.name.removesuffix('.safetensors')}.history")


def cache_folder(stack: Path) -> Path:
    """Where what is known of a stack's prompts lies; it may be deleted at any time."""
    return stack.with_name(f"{stack.name.removesuffix('.safetensors')}.cache")


def snapshot_path(stack: Path, token: str, run: str, part: str = "") -> Path:
    """Where an unfinished run waits; the ending keeps it out of the hosts' checkpoint lists.

    `run` tells apart the runs that learn the same word.
    """
    end = f"{part}.snapshot" if part else "snapshot"
    return stack.with_name(f"{stack.name.removesuffix('.safetensors')}.{token}.{run}.{end}")


def snapshots_of(stack: Path, token: str) -> list[Path]:
    """The snapshots of all unfinished runs of a token, earlier versions' names included."""
    start = f"{stack.name.removesuffix('.safetensors')}.{token}."
    if not stack.parent.is_dir():
        return []
    return sorted(
        p
        for p in stack.parent.iterdir()
        if p.name.startswith(start) and p.name.endswith("snapshot")
    )


def real_file(path: Path) -> Path:
    """The file that a path stands for: a link is written through, never replaced by a file.

    Errors: StackError for a link that leads nowhere, or a folder that this user may not look into.
    """
    try:
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            return path
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as error:
        raise StackError(
            f"{path} can't be reached ({error.strerror}). See that this user may read and write "
            "there."
        ) from None
    target = Path(os.path.realpath(path))
    if not target.exists():
        raise StackError(
            f"{path} is a link to {target}, which is not there. Put the file back, or remove the "
            "link."
        )
    return target


def check_names(stack: Path, token: str = "") -> None:
    """Refuse what will not fit the file system, before any work is done.

    Errors: StackError when the stack's file, or a snapshot of a run that learns `token`, has too
    long a name.
    """
    longest = snapshot_path(stack, token or "V1", "0" * 12, "dsc").name + ".damaged"
    most = _longest_name(stack.parent)
    if (length := len(os.fsencode(longest))) > most:
        raise StackError(
            f"The name {longest} has {length} bytes, which is too long: the file system of "
            f"{stack.parent} allows {most}. "
            "Shorten the checkpoint's name, the stack's or the word."
        )


def _longest_name(folder: Path) -> int:
    """In bytes."""
    with suppress(AttributeError, OSError, ValueError):
        return os.pathconf(folder, "PC_NAME_MAX")
    return 255


def is_reserved(name: str) -> bool:
    """Whether Windows would not let a file have this stem."""
    return bool(_RESERVED.fullmatch(name))


# --- writing -------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes, *, new: bool = False) -> None:
    """Write a file so that at every moment the old or the new one is whole on disk.

    It goes through a temporary name in the same folder, synced and renamed. The file keeps the mode
    it
    had; a new one gets what the umask leaves. Errors: OSError; FileExistsError if `new` and it
    is there.
    """
    with _temporary(path.parent) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        _like_before(file.fileno(), path)
        if os.name == "nt":  # which renames no file that is open
            file.close()
        if new:
            _rename_new(file.name, path)
        else:
            os.replace(file.name, path)


@contextmanager
def _temporary(folder: Path) -> Iterator[IO[bytes]]:
    """An open file under a temporary name, locked so that nobody takes it for a dead writer's; gone
    afterwards.
    """
    while True:
        name = os.path.join(folder, f".continual-lora-{secrets.token_hex(8)}.tmp")
        with open(name, "xb") as file:  # the umask decides the mode
            try:
                if _locked(file.fileno()) is False or not os.path.exists(name):
                    continue  # it was cleaned away before it was locked
                yield file
                return
            finally:
                with suppress(OSError):
                    os.unlink(name)


def _locked(handle: int) -> bool | None:
    """Lock this file: true if it is ours now, false if somebody else has it, None if nobody can
    tell.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None


def _like_before(handle: int, path: Path) -> None:
    """Mode and owner of the file that is to be replaced, as far as this user may give them."""
    try:
        was = os.stat(path)
    except OSError:
        return
    if hasattr(os, "fchown"):
        with suppress(OSError):
            os.fchown(handle, was.st_uid, was.st_gid)
        with suppress(OSError):
            os.fchmod(handle, was.st_mode & 0o777)


def _rename_new(name: str, path: Path) -> None:
    """Errors: FileExistsError if the path is taken, by another program a moment ago too."""
    try:
        os.link(name, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(f"{path} is there already") from None
        os.replace(name, path)


def copy_whole(source: Path, target: Path) -> None:
    """`target` becomes the very file `source` is, without a copy where the file system has hard
    links.
    """
    with suppress(OSError):
        target.unlink(missing_ok=True)
        os.link(source, target)
        return
    write_whole(target, source.read_bytes())


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that nothing is lost with it; returns where it is now."""
    names = (path.with_name(f"{path.name}.damaged{f'-{n}' if n else ''}") for n in range(10_000))
    target = next(name for name in names if not os.path.lexists(name))
    os.replace(path, target)
    return target


def clean_temporary(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; those of living ones are left alone."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        names = list(entries)
    for entry in names:
        if not _TEMPORARY.fullmatch(entry.name):
            continue
        with suppress(OSError):
            handle = os.open(entry.path, os.O_RDONLY)
            try:
                dead = _locked(handle)
            finally:
                os.close(handle)
            if dead or fcntl is None:
                os.unlink(entry.path)
