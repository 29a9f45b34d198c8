"""Copies of the pictures that jobs learn from, and the charts they draw: where they are stored, and
when they are removed.

    <folder>/copies/<process>/lock                 held as long as the process runs
    <folder>/copies/<process>/<digest>/1/IMG.png   a copy under its own name, which messages say,
                                                   with its caption and mask beside it
    <folder>/copies/<process>/<digest>/of.json     the stack and the word it is for
    <folder>/copies/<process>/charts-<number>/     the charts of a job

A copy is removed when its job has ended, unless the snapshot of an unfinished run beside the stack
still needs it. Charts are removed when the next job has ended. The same rules apply to files that a
dead process left.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import secrets
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from .. import imagefile
from ..files import is_reserved, snapshots_of
from ..inventory import as_caption

_OF = "of.json"
_UNSAFE = frozenset('/\\:*?"<>|')  # in names of files
_LONGEST = 60  # characters of a name, of up to four bytes; captions and masks add to it


@dataclass(frozen=True)
class Sent:
    """A picture as it was sent: its name, its file, a caption or "", a mask's file if it has one."""

    name: str
    data: bytes
    caption: str = ""
    mask: bytes | None = None


@dataclass(frozen=True)
class Batch:
    """The files of one request by their paths in the folder, checked but not written yet;
    `pictures` are those of the pictures.
    """

    folder: Path
    files: Mapping[str, bytes]
    pictures: Sequence[str]
    stack: str
    token: str

    @property
    def paths(self) -> list[str]:
        """Where the pictures will be."""
        return [str(self.folder / name) for name in self.pictures]


class Copies:
    """The copies of this process.

    Its lock shows other programs that share the folder that it is still running.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "copies"
        self.mine = self.root / secrets.token_hex(8)
        self._alive: FileLock | None = None
        self._numbers = itertools.count(1)

    def batch(self, pictures: Sequence[Sent], stack: str | Path, token: str = "") -> Batch:
        """A batch of pictures. Nothing is written yet.

        Errors: ConceptImagesError for a picture, a mask or a caption that is none.
        """
        files, copies = {}, []
        for number, one in enumerate(pictures, 1):
            copy = f"{number}/{file_name(one.name)}"
            copies.append(copy)
            files[copy] = _checked(one.data, one.name)
            caption, _ = as_caption(one.caption, f"The caption of {one.name}")
            if caption:
                files[f"{copy}.txt"] = caption.encode()
            if one.mask is not None:
                files[f"{copy}.mask.png"] = _checked(one.mask, f"The mask of {one.name}")
        digest = hashlib.sha256(repr((str(stack), token, list(files))).encode())
        for data in files.values():
            digest.update(hashlib.sha256(data).digest())
        folder = self.mine / digest.hexdigest()[:24]
        return Batch(folder, files, copies, str(stack), token)

    def write(self, batch: Batch) -> None:
        """Errors: OSError, after which `tidy` removes the incomplete batch."""
        self.live()
        batch.folder.mkdir(exist_ok=True)
        (batch.folder / _OF).write_text(json.dumps({"stack": batch.stack, "token": batch.token}))
        for name, data in batch.files.items():
            file = batch.folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)

    def charts(self) -> str:
        """A folder for a job's charts; the job creates it."""
        return str(self.mine / f"charts-{next(self._numbers)}")

    def tidy(self, shown: Collection[str] = ()) -> None:
        """Remove what no job and no snapshot needs, except the chart folders in `shown`.

        Call it only while no job of this process is running.
        """
        if not self.root.is_dir():
            return
        with FileLock(self.root / "lock"):
            for one in self.root.iterdir():
                if one == self.mine:
                    self._remove_from(one, shown)
                elif one.is_dir() and not one.is_symlink() and (lock := _free(one / "lock")):
                    self._remove_from(one, ())
                    _close(one, lock)
            if self._alive and [one.name for one in self.mine.iterdir()] == ["lock"]:
                _close(self.mine, self._alive)
                self._alive = None

    def live(self) -> None:
        """Create our folder and hold its lock, so that other processes leave its content alone."""
        if self._alive is None:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / "lock"):
                self.mine.mkdir(exist_ok=True)
                self._alive = _acquired(self.mine / "lock")

    def _remove_from(self, folder: Path, shown: Collection[str]) -> None:
        for one in folder.iterdir():
            if one.name != "lock" and str(one) not in shown and not _is_needed(one):
                shutil.rmtree(one, ignore_errors=True)


def file_name(name: str) -> str:
    """A picture's own name as that of a file on any system: what no name may hold becomes _."""
    spaced = re.sub(r"\s", " ", name)
    safe = "".join(c if c.isprintable() and c not in _UNSAFE else "_" for c in spaced).strip(". ")
    stem, suffix = Path(safe or "picture").stem[:_LONGEST], Path(safe).suffix[:10]
    return f"{stem}{suffix}" if not is_reserved(stem) else f"_{stem}{suffix}"


def _checked(data: bytes, name: str) -> bytes:
    """A picture's data, after it was read once. Errors: ConceptImagesError for any other data."""
    imagefile.read(io.BytesIO(data), name=name)
    return data


def _is_needed(folder: Path) -> bool:
    """Whether an unfinished run that uses these copies may still be resumed."""
    try:
        run = json.loads((folder / _OF).read_text())
        return bool(run["token"] and snapshots_of(Path(run["stack"]), run["token"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _free(path: Path) -> FileLock | None:
    """A dead process's lock, now held by us; None if the process is running."""
    try:
        return _acquired(path)
    except (Timeout, OSError):
        return None


def _acquired(path: Path) -> FileLock:
    """Errors: Timeout if another process holds it."""
    lock = FileLock(path, thread_local=False)  # any thread may release it
    lock.acquire(timeout=0)
    return lock


def _close(folder: Path, lock: FileLock) -> None:
    """Release the lock, and remove the folder if nothing is left in it."""
    lock.release()
    if all(one.name == "lock" for one in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
