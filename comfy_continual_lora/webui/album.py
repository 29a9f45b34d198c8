"""What the page shows of each concept beside its photograph: how it was last drawn, and how much of
it was kept at the last evaluation.

    <folder>/<hash of the stack's path>/<id>.jpg     a drawing; the id is the concept's
    <folder>/<hash of the stack's path>/kept.json    {id: share}

What belongs to a concept that is no longer on the stack is removed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from .. import imagefile
from ..errors import ConceptImagesError
from ..files import write_whole
from ..mentions import named, previewed
from ..words import name_in
from .shown import picture_of

_SIDE = 384  # pixels of a drawing


class Album:
    """The drawings and shares of all stacks, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def drawing(self, stack: Path, concept: Mapping[str, Any]) -> bytes:
        """A JPEG; empty if it was not drawn yet."""
        with suppress(OSError):
            return self._file(stack, concept).read_bytes()
        return b""

    def kept(self, stack: Path) -> dict[str, float]:
        """By id, the share of each concept that was kept at the last evaluation."""
        try:
            shares = json.loads((self._of(stack) / "kept.json").read_text())
            return {name: float(share) for name, share in shares.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def add(self, stack: Path, concepts: Sequence[Mapping[str, Any]], job: Any) -> None:
        """Keep what an ended job shows of the stack's concepts. Errors: OSError."""
        self._remove_others(stack, concepts)
        for concept, picture in _drawn(concepts, job):
            small = picture.convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=90)
            self._write(self._file(stack, concept), buffer.getvalue())
        if measured := job.results.get("evaluate", {}).get("kept"):
            shares = {one["id"]: measured.get(name_in(one)) for one in concepts}
            known = {name: share for name, share in shares.items() if share is not None}
            self._write(self._of(stack) / "kept.json", json.dumps(known).encode())

    def _remove_others(self, stack: Path, concepts: Sequence[Mapping[str, Any]]) -> None:
        mine = {one["id"] for one in concepts}
        for file in self._of(stack).glob("*.jpg"):
            if file.stem not in mine:
                file.unlink(missing_ok=True)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)

    def _of(self, stack: Path) -> Path:
        return self.folder / hashlib.sha256(str(stack.absolute()).encode()).hexdigest()[:16]

    def _file(self, stack: Path, concept: Mapping[str, Any]) -> Path:
        return self._of(stack) / f"{concept['id']}.jpg"


def _drawn(
    concepts: Sequence[Mapping[str, Any]], job: Any
) -> list[tuple[Mapping[str, Any], Image.Image]]:
    """The concepts that a job has drawn, each alone in its picture."""
    by_token = {one["token"]: one for one in concepts}
    pictures = _previews_of(by_token, job)
    for prompt, file in drawings_of(job).items():
        with suppress(ConceptImagesError):
            pictures.append((prompt, imagefile.read(file).image))
    found = []
    for prompt, picture in pictures:
        tokens = named([prompt], by_token)
        if len(tokens) == 1:
            found.append((by_token[tokens[0]], picture))
    return found


def _previews_of(
    by_token: Mapping[str, Mapping[str, Any]], job: Any
) -> list[tuple[str, Image.Image]]:
    """The prompts of a job's last preview and their pictures, which stand side by side; none unless
    it has learned.
    """
    learned = by_token.get(job.results.get("learn", {}).get("token"))
    preview = picture_of(job.preview)
    if learned is None or preview is None:
        return []
    settings = dict(job.jobs)["learn"].get("settings", {})
    shown = [name_in(learned), name_in(next(iter(by_token.values())))]  # unless it says otherwise
    prompts = previewed(settings.get("preview_prompts", ""), dict.fromkeys(shown))
    side = preview.height
    return [
        (prompt, preview.crop((left, 0, left + side, side)))
        for prompt, left in zip(prompts, range(0, preview.width, side), strict=False)
    ]


def drawings_of(job: Any) -> dict[str, Path]:
    """The first picture of each prompt that a job has drawn."""
    request = dict(job.jobs).get("draw")
    files = job.results.get("draw", {}).get("files", ())
    if not request or not files:
        return {}
    count = request["settings"].get("count", 1)
    return {
        prompt: Path(files[number * count])
        for number, prompt in enumerate(request["prompts"])
        if number * count < len(files)
    }
