"""Copies of the pictures that jobs learn from, and the charts they draw: where they are stored, and
when they are removed.

    <folder>/copies/<process>/lock                held as long as the process runs
    <folder>/copies/<process>/<digest>/000.png    a copy, with its caption beside it as 000.txt
    <folder>/copies/<process>/<digest>/of.json    the stack and the word it is for
    <folder>/copies/<process>/charts-<number>/    the charts of a job

A copy is removed when its job has ended, unless the snapshot of an unfinished run beside the stack
still needs it. Charts are removed when the next job has ended. The same rules apply to files that a
dead process left.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import secrets
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from .. import imagefile
from ..errors import ConceptImagesError
from ..files import snapshots_of

_SUFFIXES = {
    "PNG": ".png",
    "GIF": ".png",
    "PPM": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "DIB": ".bmp",
    "TIFF": ".tif",
    "AVIF": ".avif",
    "HEIF": ".heic",
}
_OF = "of.json"


@dataclass(frozen=True)
class Batch:
    """The pictures of one request, checked but not written yet; `suffixes` fit their formats."""

    folder: Path
    pictures: Sequence[bytes]
    suffixes: Sequence[str]
    captions: Sequence[str]
    stack: str
    token: str

    @property
    def paths(self) -> list[str]:
        """Where the pictures will be."""
        return [
            str(self.folder / f"{number:03d}{suffix}")
            for number, suffix in enumerate(self.suffixes)
        ]


class Copies:
    """The copies of this process.

    Its lock shows other programs that share the folder that it is still running.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "copies"
        self.mine = self.root / secrets.token_hex(8)
        self._alive: FileLock | None = None
        self._numbers = itertools.count(1)

    def batch(
        self,
        pictures: Sequence[tuple[str, bytes]],
        captions: Sequence[str],
        stack: str | Path,
        token: str = "",
    ) -> Batch:
        """A batch of named pictures, with a caption or "" for each. Nothing is written yet.

        Errors: ValueError for a file that is not a picture.
        """
        suffixes = [suffix_of(name, data) for name, data in pictures]
        texts = [*captions, *[""] * len(pictures)][: len(pictures)]
        digest = hashlib.sha256(repr((str(stack), token, suffixes, texts)).encode())
        for _, data in pictures:
            digest.update(hashlib.sha256(data).digest())
        folder = self.mine / digest.hexdigest()[:24]
        return Batch(folder, [data for _, data in pictures], suffixes, texts, str(stack), token)

    def write(self, batch: Batch) -> None:
        """Errors: OSError, after which `tidy` removes the incomplete batch."""
        self.live()
        batch.folder.mkdir(exist_ok=True)
        (batch.folder / _OF).write_text(json.dumps({"stack": batch.stack, "token": batch.token}))
        for path, data, caption in zip(
            map(Path, batch.paths), batch.pictures, batch.captions, strict=True
        ):
            path.write_bytes(data)
            if caption:
                path.with_suffix(".txt").write_text(caption, encoding="utf-8", errors="replace")

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


def suffix_of(name: str, data: bytes) -> str:
    """The file suffix for a picture's format; the pixels are not decoded.

    Errors: ValueError for data that is not a picture.
    """
    try:
        with imagefile.opened(io.BytesIO(data)) as picture:
            picture.verify()
            return _SUFFIXES.get(str(picture.format), ".jpg")
    except ConceptImagesError as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # Pillow may raise anything
        raise ValueError(
            f"{name} can't be read as an image ({error}). It may be truncated; replace or remove it."
        ) from None


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
