"""Stage 2: pictures on disk -> `ConceptImages`, ready to learn from.

in: a folder or a list of pictures, with captions and masks beside them (`inventory`; white is
learned from, black is not) - out: images of the requested size, captions, masks, hashes. EXIF
orientation is applied, transparency is composited on white (masks: on black); palette, greyscale
and 16-bit images become 8-bit RGB.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import ConceptImagesError
from .imagefile import Read, read
from .inventory import Note, Picture, feed, inventory, sentences
from .mentions import named
from .words import check_noun as check_noun
from .words import check_spelling as check_spelling
from .words import check_token as check_token
from .words import name_of as name_of

PREVIEW = 96
Tell = Callable[[str], object]  # is called with a sentence for the user


def _nobody(_note: str) -> None:
    """A `Tell` that does nothing."""


@dataclass(frozen=True)
class ConceptImages:
    """The pictures of one concept."""

    images: tuple[Tensor, ...]  # (3, h, w) each, in -1..1
    captions: tuple[str | None, ...]
    hashes: tuple[str, ...]  # SHA-256
    preview: str  # a small JPEG in base64
    # (1, h, w) each, in 0..1, all ones for an image without mask; None if no image has one
    masks: tuple[Tensor, ...] | None = None


def read_image(path: Path) -> Image.Image:
    """One image as upright 8-bit RGB. Errors: ConceptImagesError as `imagefile.read`."""
    return read(path).image


def bucket(width: int, height: int, size: int) -> tuple[int, int]:
    """Aspect buckets: the width and height with at most size² pixels whose aspect ratio is closest
    to that of width x height, between 1:4 and 4:1.

    Sides are multiples of 64 (of less if `size` is small), which the net can halve repeatedly.
    """
    step = max(8, min(64, size // 64 * 8))
    shapes = [
        (side, size * size // side // step * step)
        for side in range(-(-size // 2 // step) * step, 2 * size + 1, step)
    ]
    return min(
        [*shapes, *((height, width) for width, height in shapes)],
        key=lambda shape: abs(math.log(shape[0] / shape[1] * height / width)),
    )


def fitted(image: Image.Image, size: int, fit: str) -> Image.Image:
    """Scale to size x size: "crop" keeps the middle, "pad" repeats the edge pixels.

    "bucket" scales and crops to the closest aspect bucket instead.
    """
    if fit != "pad":
        target = bucket(*image.size, size) if fit == "bucket" else (size, size)
        return ImageOps.fit(image, target, Image.Resampling.LANCZOS)
    scale = size / max(image.size)
    scaled = image.resize(
        [max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS
    )
    top = (size - scaled.height) // 2
    left = (size - scaled.width) // 2
    rows = (top, size - scaled.height - top)
    columns = (left, size - scaled.width - left)
    return Image.fromarray(np.pad(np.asarray(scaled), (rows, columns, (0, 0)), mode="edge"))


def load_image(file: Path, size: int, *, fit: str = "crop") -> Tensor:
    """One picture without caption and mask: (3, h, w) in -1..1. Errors: ConceptImagesError."""
    return to_tensor(fitted(read_image(file), size, fit))


def check_readable(pictures: Sequence[Picture], tell: Tell = _nobody) -> None:
    """Read every picture once, and tell what is changed.

    Errors: ConceptImagesError, one for all problems.
    """
    notes: list[Note] = []
    if problems := [problem for one in pictures if (problem := _problem_of(one, notes))]:
        raise ConceptImagesError("\n".join(problems))
    for sentence in sentences(notes):
        tell(sentence)


def _problem_of(one: Picture, notes: list[Note]) -> str:
    try:
        _read_picture(one, notes)
    except ConceptImagesError as error:
        return error.marked
    return ""


def load_images(
    source: str | Path | Iterable[str | Path], size: int, *, fit: str = "crop", tell: Tell = _nobody
) -> ConceptImages:
    """Read every picture of `source` with its caption and mask, and tell what is changed.

    Errors: ConceptImagesError, one for all problems.
    """
    pictures, masks = [], []
    captions, hashes = [], []
    problems = []
    notes: list[Note] = []
    found = inventory(source).pictures
    for one in found:
        try:
            picture = _read_picture(one, notes)
            masks.append(_read_mask(one, picture, size, fit, notes))
            captions.append(one.caption)
            digest = hashlib.sha256()
            feed(digest, one.file)
        except ConceptImagesError as error:
            problems.append(error.marked)
            continue
        pictures.append(fitted(picture.image, size, fit))
        hashes.append(digest.hexdigest())
    if problems:
        raise ConceptImagesError("\n".join(problems))
    for number, one in enumerate(found):
        if (first := hashes.index(hashes[number])) < number:
            notes.append((one.name, f"the same picture as {found[first].name}"))
    for sentence in sentences(notes):
        tell(sentence)
    loaded = from_pil(pictures, captions, hashes)
    masked = tuple(
        torch.ones_like(image[:1]) if mask is None else mask
        for image, mask in zip(loaded.images, masks, strict=True)
    )
    return replace(loaded, masks=masked if any(mask is not None for mask in masks) else None)


def _read_picture(one: Picture, notes: list[Note]) -> Read:
    """Errors: ConceptImagesError as `imagefile.read`."""
    picture = read(one.file, name=one.name)
    notes += [(one.name, note) for note in picture.notes]
    return picture


def _read_mask(of: Picture, picture: Read, size: int, fit: str, notes: list[Note]) -> Tensor | None:
    """The mask, scaled to its picture. Errors: ConceptImagesError."""
    if of.mask is None:
        return None
    mask = read(of.mask, ground="black", name=of.mask_name)
    notes += [(of.name, f"its mask: {note}") for note in mask.notes]
    if mask.size != picture.size:
        own, whole = (f"{width} x {height}" for width, height in (mask.size, picture.size))
        notes.append((of.name, f"its mask of {own} pixels is scaled to the picture's {whole}"))
    grey = mask.image.resize(picture.image.size).convert("L").convert("RGB")
    values = (to_tensor(fitted(grey, size, fit))[:1] + 1) / 2
    if values.max() < 0.05:
        raise ConceptImagesError(
            f"{of.mask_name} is black where the picture is used, so nothing of it would be learned. "
            "Paint the thing white, or remove the mask."
        )
    return values


def from_pil(
    pictures: Sequence[Image.Image], captions: Sequence[str | None], hashes: Sequence[str]
) -> ConceptImages:
    """RGB images of the requested size -> `ConceptImages`."""
    if not pictures:
        raise ConceptImagesError(
            "No pictures were given. Give 3 to 15 pictures of the thing to learn."
        )
    return ConceptImages(
        tuple(to_tensor(p) for p in pictures), tuple(captions), tuple(hashes), preview(pictures[0])
    )


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, h, w) in -1..1."""
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1).div_(127.5).sub_(1)


def to_pil(image: Tensor) -> Image.Image:
    """(3, h, w) in -1..1 -> RGB image."""
    return Image.fromarray(
        image.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    )


def preview(image: Image.Image) -> str:
    buffer = io.BytesIO()
    ImageOps.fit(image, (PREVIEW, PREVIEW), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=85
    )
    return base64.b64encode(buffer.getvalue()).decode()


def picture_of(text: str) -> Image.Image | None:
    """The picture that `preview` wrote; None for text it did not write."""
    try:
        data = io.BytesIO(base64.b64decode(text, validate=True))
        return Image.open(data, formats=["JPEG"]).convert("RGB")
    except (OSError, ValueError):  # binascii.Error and UnidentifiedImageError are of these
        return None


def prompts_for(
    token: str,
    noun: str,
    templates: Sequence[str],
    caption: str | None,
    others: Iterable[str] = (),
) -> list[str]:
    """A picture's training prompts: its own caption (with the token), or else every template.

    `others`: all other learned words, which a caption may name too.
    """
    name = name_of(token, noun)
    if caption is None:
        return [template.format(name) for template in templates]
    if token in named([caption], [*others, token]):
        return [caption]
    return [f"a photo of a {name}, {caption}"]
