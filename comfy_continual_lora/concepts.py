"""Stage 2: pictures on disk -> `ConceptImages`, ready to learn from.

in: a folder or a list of JPEG, PNG, WebP, BMP, TIFF, AVIF or HEIC files, each with an optional
caption (name.txt) and mask (name.mask.png: white is learned from, black is not) beside it - out:
images of the requested size, captions, masks, hashes. EXIF orientation is applied, transparency is
composited on white; palette, greyscale and 16-bit images become 8-bit RGB.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import ConceptImagesError, SettingError, TokenError
from .files import PICTURES, TOKEN, is_reserved
from .imagefile import opened
from .mentions import named

PREVIEW = 96
NOUN_WORDS, NOUN_LETTERS = 8, 80  # prompts say much more, within the encoder's 77 positions


@dataclass(frozen=True)
class ConceptImages:
    """The pictures of one concept."""

    images: tuple[Tensor, ...]  # (3, h, w) each, in -1..1
    captions: tuple[str | None, ...]
    hashes: tuple[str, ...]  # SHA-256
    preview: str  # a small JPEG in base64
    # (1, h, w) each, in 0..1, all ones for an image without mask; None if no image has one
    masks: tuple[Tensor, ...] | None = None


def find_images(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The image files of a folder (not its subfolders) in name order, or those of a list as given.

    Errors: ConceptImagesError if there are none, or if a file of the list is missing.
    """
    if not isinstance(source, (str, Path)):
        files = [Path(p) for p in source]
        missing = [str(path) for path in files if not path.is_file()]
        if not files:
            raise ConceptImagesError("No pictures were given. Give 3 to 15 of the thing to learn.")
        if missing:
            raise ConceptImagesError(f"There is no picture {', '.join(missing)}.")
        return files
    folder = Path(source)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ConceptImagesError(
            f"There is no folder {folder}. Give a folder with 3 to 15 pictures of the thing to "
            "learn."
        )
    files = sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in PICTURES
        and not p.name.startswith(".")
        and not p.stem.endswith(".mask")
    )
    if not files:
        others = sorted({p.suffix or p.name for p in folder.iterdir()})
        content = f"it holds only {', '.join(others[:5])}" if others else "it is empty"
        raise ConceptImagesError(
            f"No pictures in {folder}: {content}. Expected {', '.join(PICTURES)}; 3 to 15 pictures "
            "of the thing to learn."
        )
    return files


def read_image(path: Path) -> Image.Image:
    """One image as upright 8-bit RGB. Errors: ConceptImagesError as `imagefile.opened`."""
    with opened(path) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16-bit and float greyscale
        values = np.asarray(image, np.float64)
        white = 255 if values.max() > 1 else 1
        if image.mode.startswith("I") and values.max() > 255:
            white = 65535
        image = Image.fromarray((np.clip(values / white, 0, 1) * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
    scaled = ImageOps.contain(image, (size, size), Image.Resampling.LANCZOS)
    top = (size - scaled.height) // 2
    left = (size - scaled.width) // 2
    rows = (top, size - scaled.height - top)
    columns = (left, size - scaled.width - left)
    return Image.fromarray(np.pad(np.asarray(scaled), (rows, columns, (0, 0)), mode="edge"))


def load_images(
    source: str | Path | Iterable[str | Path], size: int, *, fit: str = "crop"
) -> ConceptImages:
    """Read every picture of `source`. Errors: ConceptImagesError, one for all problems."""
    pictures, masks = [], []
    captions, hashes = [], []
    problems = []
    for path in find_images(source):
        try:
            picture = read_image(path)
            masks.append(_read_mask(path, picture.size, size, fit))
            pictures.append(fitted(picture, size, fit))
        except ConceptImagesError as error:
            problems.append(str(error))
            continue
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
        captions.append(caption_of(path))
    if problems:
        raise ConceptImagesError("\n".join(problems))
    loaded = from_pil(pictures, captions, hashes)
    masked = tuple(
        torch.ones_like(image[:1]) if mask is None else mask
        for image, mask in zip(loaded.images, masks, strict=True)
    )
    return replace(loaded, masks=masked if any(mask is not None for mask in masks) else None)


def mask_file(path: Path) -> Path | None:
    """The mask beside a picture, if there is one."""
    mask = path.with_name(f"{path.stem}.mask.png")
    return mask if mask.exists() else None


def _read_mask(path: Path, shape: tuple[int, int], size: int, fit: str) -> Tensor | None:
    file = mask_file(path)
    if file is None:
        return None
    mask = read_image(file)
    if mask.size != shape:
        raise ConceptImagesError(
            f"The mask {file} is {mask.width} x {mask.height} pixels, its picture {shape[0]} x "
            f"{shape[1]}. Both need the same size."
        )
    values = (to_tensor(fitted(mask, size, fit))[:1] + 1) / 2
    if values.max() < 0.05:
        raise ConceptImagesError(
            f"The mask {file} is black, so nothing of its picture would be learned. Paint the "
            "thing white, or remove the mask."
        )
    return values


def caption_of(path: Path) -> str | None:
    """The text of the .txt beside a picture; None if there is none or it is empty."""
    file = path.with_suffix(".txt")
    if not file.exists():
        return None
    return file.read_text(encoding="utf-8", errors="replace").strip() or None


def groups(source: Path | list[Path]) -> list[tuple[str, list[Path]]]:
    """(folder name, its pictures) of each subfolder, or of the folder itself if it has none."""
    if isinstance(source, Path) and source.is_dir():
        folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
        return [(folder.name, find_images(folder)) for folder in folders or [source]]
    return [("", find_images(source))]


def content_of(path: Path) -> bytes:
    """The bytes of a picture file, its caption and its mask: what a concept's digest is made of."""
    mask = mask_file(path)
    caption = (caption_of(path) or "").encode()
    return path.read_bytes() + caption + (mask.read_bytes() if mask else b"")


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


def name_of(token: str, noun: str) -> str:
    """How prompts name a concept: "V1 mug"."""
    return f"{token} {noun}".strip()


def prompts_for(token: str, noun: str, templates: Sequence[str], caption: str | None) -> list[str]:
    """A picture's training prompts: its own caption (with the token), or else every template."""
    name = name_of(token, noun)
    if caption is None:
        return [template.format(name) for template in templates]
    if named([caption], [token]):
        return [caption]
    return [f"a photo of a {name}, {caption}"]


_ADVICE = "Choose a short word of your own, such as V1."


def check_spelling(token: str) -> None:
    """Raise TokenError unless `token` can be used in prompts and file names of every host."""
    if not token.strip():
        raise TokenError(f"The token is empty. {_ADVICE}")
    if is_reserved(token):
        raise TokenError(
            f"The token {token!r} can't be a file name on Windows, where it is a device. {_ADVICE}"
        )
    if not TOKEN.fullmatch(token):
        raise TokenError(
            f"The token {token!r} may contain only letters, digits, - and _ (at most 64): it "
            f"becomes a word and a file name. {_ADVICE}"
        )


def check_noun(noun: str, token: str) -> None:
    """Raise SettingError unless `noun` says in one line and a few words what the thing is."""
    problem = ""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in noun):
        problem = "is not a single line of text"
    elif len(noun) > NOUN_LETTERS or len(noun.split()) > NOUN_WORDS:
        problem = f"has more than {NOUN_WORDS} words or {NOUN_LETTERS} letters"
    elif named([noun], [token]):
        problem = f"contains {token} itself"
    if problem:
        raise SettingError(
            f"The class noun {noun[:40]!r} {problem}. Say in one or two words what the thing is, "
            "such as teapot or cat; what a single picture shows belongs into its caption."
        )


def check_token(token: str, taken: Iterable[str], is_known_word: Callable[[str], bool]) -> None:
    """Raise TokenError unless `token` can name a new concept on a stack with the `taken` tokens."""
    check_spelling(token)
    if token.lower() in {t.lower() for t in taken}:
        raise TokenError(
            f"The token {token!r} is already taken by a concept of this stack. Choose another, "
            "replace that concept (`replace`) if it is the newest, or undo it first."
        )
    if is_known_word(token):
        raise TokenError(
            f"The token {token!r} is a word the checkpoint already knows; prompts that use it "
            f"would change meaning. {_ADVICE}"
        )
