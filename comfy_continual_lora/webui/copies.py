"""Copies of the pictures that jobs learn from, and the charts they draw: where they lie, and when
they go.

    <folder>/copies/<process>/lock                held as long as the process lives
    <folder>/copies/<process>/<digest>/000.png    a copy, with its caption beside it as 000.txt
    <folder>/copies/<process>/<digest>/of.json    the stack and the word it is for
    <folder>/copies/<process>/charts-<number>/    what a job has drawn

A copy goes when its job is over, unless a snapshot of an unfinished run beside the stack still
needs it.
Charts go when the next job is over. What a process that is gone has left is judged by the same
rule.
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
    """The pictures of one request, checked and not yet written; `suffixes` fit what they hold."""

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
    """Those that this process makes.

    Its lock tells other programs that share the folder that it lives.
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
        """Named pictures as a request's, with a caption or "" for each. Nothing is written yet.

        Errors: ValueError for what is no picture.
        """
        suffixes = [suffix_of(name, data) for name, data in pictures]
        texts = [*captions, *[""] * len(pictures)][: len(pictures)]
        digest = hashlib.sha256(repr((str(stack), token, suffixes, texts)).encode())
        for _, data in pictures:
            digest.update(hashlib.sha256(data).digest())
        folder = self.mine / digest.hexdigest()[:24]
        return Batch(folder, [data for _, data in pictures], suffixes, texts, str(stack), token)

    def write(self, batch: Batch) -> None:
        """Errors: OSError, after which `tidy` removes what was begun."""
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
        """A folder for what a job draws; it is made by the job."""
        return str(self.mine / f"charts-{next(self._numbers)}")

    def tidy(self, shown: Collection[str] = ()) -> None:
        """Remove what no job and no snapshot needs; `shown` are folders of charts that are still
        looked at.

        Call it while no job of this process is under way.
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
        """Make our folder, and hold its lock, so that others leave alone what is in it."""
        if self._alive is None:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / "lock"):
                self.mine.mkdir(exist_ok=True)
                self._alive = _taken(self.mine / "lock")

    def _remove_from(self, folder: Path, shown: Collection[str]) -> None:
        for one in folder.iterdir():
            if one.name != "lock" and str(one) not in shown and not _is_needed(one):
                shutil.rmtree(one, ignore_errors=True)


def suffix_of(name: str, data: bytes) -> str:
    """The ending that fits what a picture holds.

    Errors: ValueError for what is none; the pixels are not decoded.
    """
    try:
        with imagefile.opened(io.BytesIO(data)) as picture:
            picture.verify()
            return _SUFFIXES.get(str(picture.format), ".jpg")
    except ConceptImagesError as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # Pillow raises what it likes
        raise ValueError(
            f"{name} can't be read as an image ({error}). It may be cut short; replace it or take "
            "it out."
        ) from None


def _is_needed(folder: Path) -> bool:
    """Whether an unfinished run of what these copies are for may still go on."""
    try:
        need = json.loads((folder / _OF).read_text())
        return bool(need["token"] and snapshots_of(Path(need["stack"]), need["token"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _free(path: Path) -> FileLock | None:
    """A dead process's lock, taken; None if it lives."""
    try:
        return _taken(path)
    except (Timeout, OSError):
        return None


def _taken(path: Path) -> FileLock:
    """Errors: Timeout if another process has it."""
    lock = FileLock(path, thread_local=False)  # any thread may let it go
    lock.acquire(timeout=0)
    return lock


def _close(folder: Path, lock: FileLock) -> None:
    """Let the lock go, and the folder if nothing is left in it."""
    lock.release()
    if all(one.name == "lock" for one in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
