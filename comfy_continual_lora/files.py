"""File names that the backend and every front end share, and safe replacement of files.

Light: front ends inside a host import it too.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import StackError

try:
    import fcntl
except ImportError:  # Windows, where an open file can't be removed
    fcntl = None

WINDOWS = sys.platform == "win32"
_LONGEST_PATH = 259  # characters, on Windows
# Windows refuses to replace a file while a virus scanner, a search index or a program that lists
# stacks reads it, which takes moments
_PATIENCE = 5.0  # seconds
_DEAD_AFTER = 3600.0  # seconds after which a temporary file is a dead writer's, without locks

PICTURES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
)
STACKS = ".concepts.safetensors"
OWN_FOLDER = "continual-lora"  # beside checkpoints: exports and pictures of the page by itself
HOST = "CONTINUAL_LORA_HOST"  # folders of a ComfyUI or web UI that has Anima's files, as in PATH
WORDS = (
    "continual_lora.words"  # in a LoRA: JSON, the class noun of each word by its embedding's name
)
WORD = "continual_lora.token"  # in an embedding: its word, which it may not be named by
OWNER = "continual_lora.stack"  # in an export: the identity of the stack it is of
PRESET = "continual_lora.preset"  # in a LoRA: the kind of checkpoint it is for
CLIP_SKIP = "ss_clip_skip"  # in a LoRA, kohya's name of it; absent or "None" for 1
TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a concept's word, also used in file names
_TEMPORARY = re.compile(r"\.continual-lora-[0-9a-f]{16}\.tmp")
# Device names that Windows reserves, whatever the suffix; it drops dots and spaces at the end
_RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE | re.DOTALL
)


def stack_path(checkpoint: str | Path, name: str = "") -> Path:
    """`<checkpoint stem>.concepts.safetensors` in the checkpoint's folder, or beside a diffusers
    folder.

    A checkpoint may have several stacks, distinguished by `name`. A symlinked checkpoint has its
    target's stack, unless there is one beside the link.
    Errors: StackError for a name that can't be part of a file name, or a path without one.
    """
    checkpoint = with_name(Path(checkpoint))
    if not checkpoint.name:
        raise StackError(
            f"{str(checkpoint)!r} is not a checkpoint. Give the path of its file or folder."
        )
    if name and not re.fullmatch(r"[\w-]{1,64}", name):
        raise StackError(
            f"The stack's name {name!r} may contain only letters, digits, - and _ (at most 64): it "
            "becomes part of a file name."
        )
    path = _stack_beside(checkpoint, name)
    if checkpoint.is_symlink() and not os.path.lexists(path):
        target = Path(os.path.realpath(checkpoint))  # `resolve` raises for a loop of links
        # any other suffix: a blob of a download cache, named by its hash
        if target.is_dir() or target.suffix == ".safetensors":
            return _stack_beside(target, name)
    return path


def with_name(path: Path) -> Path:
    """A path that ends in . or .. as the folder it stands for; any other path as it is."""
    return Path(os.path.realpath(path)) if path.name in ("", "..") else path


def _stack_beside(checkpoint: Path, name: str) -> Path:
    stem = checkpoint.stem if checkpoint.is_file() else checkpoint.name
    return checkpoint.with_name(f"{stem}.{name}{STACKS}" if name else f"{stem}{STACKS}")


def stack_stem(stack: Path) -> str:
    """The name that a stack's exports begin with."""
    return stack.name.removesuffix(STACKS).removesuffix(".safetensors")


def history_folder(stack: Path) -> Path:
    """The folder of a stack's earlier versions."""
    return stack.with_name(f"{stack.name.removesuffix('.safetensors')}.history")


def cache_folder(stack: Path) -> Path:
    """The folder of a stack's cached text moments; it may be deleted at any time."""
    return stack.with_name(f"{stack.name.removesuffix('.safetensors')}.cache")


def snapshot_path(stack: Path, token: str, run: str, part: str = "") -> Path:
    """The file of an unfinished run; its suffix keeps it out of the hosts' checkpoint lists.

    `run` distinguishes runs that learn the same word.
    """
    suffix = f"{part}.snapshot" if part else "snapshot"
    return stack.with_name(f"{stack.name.removesuffix('.safetensors')}.{token}.{run}.{suffix}")


def snapshots_of(stack: Path, token: str) -> list[Path]:
    """The snapshots of all unfinished runs of a token, including those that old versions wrote."""
    start = f"{stack.name.removesuffix('.safetensors')}.{token}."
    if not stack.parent.is_dir():
        return []
    return sorted(
        p
        for p in stack.parent.iterdir()
        if p.name.startswith(start) and p.name.endswith("snapshot")
    )


def check_regular(path: Path) -> None:
    """Errors: OSError for a pipe or a device, which could be read for ever; nothing if there is no
    file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError("it is a pipe or a device, not a file")


def real_file(path: Path) -> Path:
    """The file behind a path: a symlink is written through, never replaced by a file.

    Errors: StackError for a dangling link, or a folder this user has no access to.
    """
    try:
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            return path
        target = Path(os.path.realpath(path))
        exists = target.exists()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as error:
        raise StackError(
            f"{path} can't be accessed ({error.strerror}). Give this user permission to read and "
            "write there."
        ) from None
    if not exists:
        raise StackError(
            f"{path} is a link to {target}, which does not exist. Put the file back, or remove the "
            "link."
        )
    return target


def check_names(stack: Path, token: str = "") -> None:
    """Refuse names and paths that the system does not take, before any work is done.

    Errors: StackError if the name or the path of a file beside the stack, such as a snapshot of a
    run that learns `token`, is too long, or if Windows does not take the stack's name.
    """
    if WINDOWS and (is_reserved(stack.name) or stack.name != stack.name.rstrip(". ")):
        raise StackError(
            f"The file name {stack.name!r} can't be used on Windows: it is a device, or ends in a dot "
            "or a space. Give the stack another name."
        )
    longest = snapshot_path(stack, token or "V1", "0" * 12, "dsc").name + ".damaged"
    temporary = f".continual-lora-{'0' * 16}.tmp"
    for folder, name in (
        (stack.parent, longest),
        (history_folder(stack), temporary),
        (cache_folder(stack), temporary),
    ):
        check_path_length(folder / name)
    most = _longest_name(stack.parent)
    if (length := len(os.fsencode(longest))) > most:
        raise StackError(
            f"The file name {longest} is {length} bytes long; the file system of {stack.parent} "
            f"allows {most}. Shorten the checkpoint's name, the stack's name or the word."
        )


def check_path_length(path: Path) -> None:
    """Errors: StackError for a path that has more characters than this Windows takes."""
    length = len(os.path.abspath(path).encode("utf-16-le", "surrogatepass")) // 2
    if length > _LONGEST_PATH and not _takes_long_paths():
        raise StackError(
            f"The path {path} has {length} characters; Windows takes {_LONGEST_PATH}, unless long "
            "paths are enabled there (LongPathsEnabled). Move the files to a folder with a shorter "
            "path, or enable long paths and restart."
        )


def _takes_long_paths() -> bool:
    """Whether paths of more than 259 characters can be used, on Windows as its registry says."""
    if not WINDOWS:
        return True
    import ctypes

    try:
        return bool(ctypes.windll.ntdll.RtlAreLongPathsEnabled())  # pyright: ignore[reportAttributeAccessIssue]
    except (AttributeError, OSError):  # before Windows 10 1607
        return False


def _longest_name(folder: Path) -> int:
    """In bytes."""
    with suppress(AttributeError, OSError, ValueError):
        return os.pathconf(folder, "PC_NAME_MAX")
    return 255


def is_reserved(name: str) -> bool:
    """Whether Windows reserves this name for a device, so that no file can have it, or have it as its
    stem.
    """
    return bool(_RESERVED.fullmatch(name.strip()))


# --- writing -------------------------------------------------------------------------------------


def metadata_in(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for any other."""
    from safetensors import SafetensorError, safe_open  # not light

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def write_whole(
    path: Path, data: bytes | Iterable[bytes | memoryview], *, new: bool = False
) -> None:
    """Write a file atomically: at every moment either the old or the new one is complete on disk.

    It is written under a temporary name in the same folder, synced and renamed. The file keeps its
    mode; a new one gets the umask's. Errors: OSError; FileExistsError if `new` and it exists.
    """
    try:
        with _temporary(path.parent) as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
            _like_before(file.fileno(), path)
            if WINDOWS:  # it can't rename an open file
                file.close()
            if new:
                _rename_new(file.name, path)
            else:
                replace(file.name, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of an open file
            error.filename = str(path)
        raise


def standing_at(folder: Path) -> tuple[Path, bool]:
    """The nearest file or folder that there is at a path or above it, and whether files can be made
    in it.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there, there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def stamp_of(path: Path) -> tuple[int, int] | None:
    """What differs once another file is put at a path: its time and its size; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def replace(source: str | Path, target: Path) -> None:
    """`os.replace`, tried again for some seconds on Windows, where it fails while any program has the
    target open. Errors: OSError.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not WINDOWS or time.monotonic() > until:
                raise
        time.sleep(0.05)


@contextmanager
def _temporary(folder: Path) -> Iterator[IO[bytes]]:
    """An open file under a temporary name, locked so that no process takes it for a dead writer's;
    removed afterwards.
    """
    while True:
        name = os.path.join(folder, f".continual-lora-{secrets.token_hex(8)}.tmp")
        with open(name, "xb") as file:  # the umask decides the mode
            try:
                if _locked(file.fileno()) is False or not os.path.exists(name):
                    continue  # another process removed it before it was locked
                yield file
                return
            finally:
                with suppress(OSError):
                    os.unlink(name)


def _locked(handle: int) -> bool | None:
    """Lock this file: true if we hold the lock now, false if another process does, None if the
    system has no locks.
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
    """Copy mode and owner of the file that is to be replaced, as far as this user may set them."""
    try:
        old = os.stat(path)
    except OSError:
        return
    if hasattr(os, "fchown"):
        with suppress(OSError):
            os.fchown(handle, old.st_uid, old.st_gid)
        with suppress(OSError):
            os.fchmod(handle, old.st_mode & 0o777)


def _rename_new(name: str, path: Path) -> None:
    """Errors: FileExistsError if the path exists, even if another program created it just now."""
    try:
        os.link(name, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(f"{path} already exists") from None
        replace(name, path)


def copy_whole(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system has no hard links."""
    with suppress(OSError):
        target.unlink(missing_ok=True)
        os.link(source, target)
        return
    write_whole(target, source.read_bytes())


def set_aside(path: Path) -> Path:
    """Rename a damaged file instead of overwriting it; returns its new path."""
    names = (path.with_name(f"{path.name}.damaged{f'-{n}' if n else ''}") for n in range(10_000))
    target = next(name for name in names if not os.path.lexists(name))
    replace(path, target)
    return target


def clean_temporary(folder: Path) -> None:
    """Remove the temporary files of writers that were killed, but not those of running ones: they
    hold a lock, or, on a system without locks, began less than an hour ago.
    """
    if not folder.is_dir():
        return
    with os.scandir(folder) as scan:
        entries = list(scan)
    for entry in entries:
        if not _TEMPORARY.fullmatch(entry.name):
            continue
        with suppress(OSError):
            if fcntl is None:
                is_dead = time.time() - entry.stat().st_mtime > _DEAD_AFTER
            else:
                handle = os.open(entry.path, os.O_RDONLY)
                try:
                    is_dead = _locked(handle)
                finally:
                    os.close(handle)
            if is_dead:
                os.unlink(entry.path)
