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
from ..fields import from_widget
from ..files import PICTURES


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
        with imagefile.opened(Path(path)) as picture:
            picture.load()  # before the file is closed
            picture.thumbnail((side, side))
            return picture
    except Exception:  # Pillow may raise anything
        return None


def thumbnails(
    files: Sequence[Any] | None, captions: Sequence[Sequence[Any]] | None
) -> tuple[list[tuple[Image.Image, str]], list[list[str]]]:
    """Thumbnails with their names, and a row of the caption table for each: the caption typed for
    that name before, or else the text file dropped with it, or else nothing.

    Errors: ValueError as `uploaded`.
    """
    paths, written = uploaded(files), typed(captions)
    texts = {path.stem: caption_in(path) for path in paths if path.suffix.lower() == ".txt"}
    pictures, rows = [], []
    for path in paths:
        picture = picture_at(path, 400) if path.suffix.lower() in PICTURES else None
        if picture is not None:
            pictures.append((picture, path.name))
            rows.append([path.name, written.get(path.name) or texts.get(path.stem, "")])
    return pictures, rows


def caption_in(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(10_000).strip()


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
