"""Input from a page: files, captions typed beside them, values of widgets."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .. import imagefile
from ..errors import ConceptImagesError
from ..fields import from_widget
from ..inventory import sentences, sorted_out
from .copies import Sent


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


def found_in(files: Sequence[Any] | None, captions: Sequence[Sequence[Any]] | None) -> list[Sent]:
    """The uploaded pictures with their captions, from the table if it has a row for them, and their
    masks.

    Errors: ValueError as `uploaded`, and if there is no picture; ConceptImagesError.
    """
    found, written = sorted_out(uploaded(files)), typed(captions)
    if not found.pictures:
        raise ValueError(f"No pictures yet: drop 3 to 15 pictures of the thing{found.rest()}.")
    return [
        Sent(
            one.file.name,
            one.file.read_bytes(),
            written.get(one.file.name, one.caption or "").strip(),
            one.mask.read_bytes() if one.mask else None,
        )
        for one in found.pictures
    ]


def thumbnails(
    files: Sequence[Any] | None, captions: Sequence[Sequence[Any]] | None
) -> tuple[list[tuple[Image.Image, str]], list[list[str]], str]:
    """Thumbnails with their names; a row of the caption table for each picture, with the caption
    typed for that name before, or else the one dropped with it; and what was dropped, in words.

    Errors: ValueError as `uploaded`; ConceptImagesError as `read_caption`.
    """
    found, written = sorted_out(uploaded(files)), typed(captions)
    pictures, rows, problems = [], [], []
    for one in found.pictures:
        rows.append([one.file.name, written.get(one.file.name) or one.caption or ""])
        picture = picture_at(one.file, 400)
        if picture is None:
            problems.append((one.file.name, "can't be read as a picture; replace or remove it"))
        else:
            pictures.append((picture, one.file.name))
    told = found.notes() if found.pictures else [found.summary()] if files else []
    return pictures, rows, "\n".join([*told, *sentences(problems)])


def typed(captions: Sequence[Sequence[Any]] | None) -> dict[str, str]:
    """The caption table by picture. A user may have added columns; without pictures, older gradio
    versions have a row without columns.
    """
    return {str(row[0]): str(row[1] or "") for row in captions or () if len(row) > 1}


def settings_of(kind: type, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Widgets' values -> the settings that differ from their defaults; 0 and "auto" stand for what
    suits the checkpoint.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    settings = {
        name: from_widget(fields[name], value) for name, value in zip(names, values, strict=True)
    }
    return {name: value for name, value in settings.items() if value != fields[name].default}
