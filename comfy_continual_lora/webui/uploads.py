"""Input from a page: files, captions typed beside them, values of widgets."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from .. import imagefile
from ..errors import ConceptImagesError
from ..fields import from_widget
from ..inventory import sentences, sorted_out
from .copies import Sent

Key = tuple[str, int]


def uploaded(files: Sequence[Any] | None) -> list[Path]:
    """The files from gr.File: paths in newer gradio versions, open files in older ones.

    Errors: ValueError for a file that was only named in the request, not uploaded: older versions
    would open any file of this machine.
    """
    temporary = os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio"
    folder = Path(temporary).resolve()
    paths = []
    for file in files or ():
        names = _names_of(file)
        if not names or not all(path.resolve().is_relative_to(folder) for path in names):
            raise ValueError(
                "A file in the request was not uploaded to this page. Upload it again."
            )
        paths.append(names[0])
    return paths


def _names_of(file: Any) -> list[Path]:
    if isinstance(file, (str, Path)):
        return [Path(file)]
    return [Path(getattr(file, name)) for name in ("name", "orig_name") if hasattr(file, name)]


def picture_at(path: Path | str, side: int = 10_000) -> Image.Image | None:
    """A picture, at most `side` pixels wide and high; None for any other file."""
    try:
        picture = imagefile.read(Path(path)).image
    except ConceptImagesError:
        return None
    picture.thumbnail((side, side))
    return picture


def keys_of(pictures: Iterable[Path]) -> list[Key]:
    """What tells uploaded pictures apart, names being no help: each one's path, and how many before it
    have the same one. gradio keeps a file by its name and content.
    """
    seen: Counter[Path] = Counter()
    keys = []
    for path in pictures:
        keys.append((str(path), seen[path]))
        seen[path] += 1
    return keys


def found_in(files: Sequence[Any] | None, typed: Mapping[Key, str]) -> list[Sent]:
    """The uploaded pictures with their captions - those `typed`, if there are any, else the ones
    uploaded with them - and their masks.

    Errors: ValueError as `uploaded`, and if there is no picture; ConceptImagesError.
    """
    found = sorted_out(uploaded(files))
    if not found.pictures:
        raise ValueError(f"No pictures yet: drop 3 to 15 pictures of the thing{found.rest()}.")
    return [
        Sent(
            one.file.name,
            one.file.read_bytes(),
            typed.get(key, one.caption or "").strip(),
            one.mask.read_bytes() if one.mask else None,
        )
        for key, one in zip(keys_of(found.files), found.pictures, strict=True)
    ]


@dataclass(frozen=True)
class Dropped:
    """A picture with its caption, and the one that was uploaded with it; `image` is None if it can't
    be read.
    """

    key: Key
    name: str
    caption: str
    own: str
    image: Image.Image | None


def dropped(
    files: Sequence[Any] | None, typed: Mapping[Key, str], fit: str = "crop"
) -> tuple[list[Dropped], str]:
    """The uploaded pictures, each with the caption typed before, or else the one uploaded with it,
    and what was uploaded, in words. What is not learned from is dark: outside the crop, or of the
    mask.

    Errors: ValueError as `uploaded`; ConceptImagesError as `read_caption`.
    """
    found = sorted_out(uploaded(files))
    pictures, problems = [], []
    for key, one in zip(keys_of(found.files), found.pictures, strict=True):
        own = one.caption or ""
        image = picture_at(one.file, 400)
        if image is None:
            problems.append((one.file.name, "can't be read as a picture; replace or remove it"))
        else:
            image = _learned_from(image, picture_at(one.mask) if one.mask else None, fit)
        pictures.append(Dropped(key, one.file.name, typed.get(key, own), own, image))
    told = found.notes() if found.pictures else [found.summary()] if files else []
    return pictures, "\n".join([*told, *sentences(problems)])


def _learned_from(image: Image.Image, mask: Image.Image | None, fit: str) -> Image.Image:
    """The picture with all dark that is not learned from."""
    image, kept = image.convert("RGB"), Image.new("L", image.size, 255)
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        kept = Image.new("L", image.size)
        kept.paste(255, (left, top, left + side, top + side))
    if mask is not None:
        kept = ImageChops.multiply(kept, mask.convert("L").resize(image.size))
    return Image.composite(image, image.point([value // 4 for value in range(256)] * 3), kept)


def settings_of(kind: type, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Widgets' values -> the settings that differ from their defaults; 0 and "auto" stand for what
    suits the checkpoint.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    settings = {
        name: from_widget(fields[name], value) for name, value in zip(names, values, strict=True)
    }
    return {name: value for name, value in settings.items() if value != fields[name].default}
