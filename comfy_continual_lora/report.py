"""Stage 8: image grids and charts, as pictures. The HTML report is `reportpage`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from .concepts import fitted, read_image
from .imagefile import is_own, save_new, save_own
from .results import Drawn, Scored
from .verdicts import RetentionReport


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Images of one size, row by row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def save_picture(picture: Drawn, folder: Path) -> Path:
    """A PNG, named after its prompt and seed; nothing is overwritten.

    Errors: SettingError if there is no room or no permission.
    """
    info = PngInfo()
    for name, text in picture.texts.items():
        info.add_text(name, text)
    return _save_beside(picture.image, folder, f"{_named(picture.prompt)}-{picture.seed}", info)


def save_grid(drawn: Sequence[Drawn], folder: Path) -> Path:
    """All of them in one PNG, which overwrites nothing but our own. Errors: as `save_picture`."""
    per_prompt = sum(d.prompt == drawn[0].prompt for d in drawn)
    names = (folder / f"grid{f'-{n}' if n else ''}.png" for n in range(10_000))
    path = next(path for path in names if not path.exists() or is_own(path))
    columns = per_prompt if per_prompt > 1 else min(len(drawn), 4)
    save_own(grid([one.image for one in drawn], columns), path)
    return path


def _save_beside(image: Image.Image, folder: Path, stem: str, info: PngInfo) -> Path:
    """Write a PNG under the first name that is free, even if others are drawing into the folder."""
    path, number = folder / f"{stem}.png", 0
    while True:
        if not path.exists():
            with suppress(FileExistsError):
                save_new(image, path, pnginfo=info)
                return path
        number += 1
        path = folder / f"{stem}-{number}.png"


def _named(prompt: str) -> str:
    """A prompt as part of a file's name: letters of any script and digits, the first 60."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt)).strip("-")[:60]
    return words.encode()[:120].decode(errors="ignore").strip("-") or "picture"


def score_sheet(scored: Sequence[Scored], *, side: int = 96, bars: int = 5) -> Image.Image:
    """One row per picture: the picture, and a bar for each of its likeliest concepts; green is the
    folder's label.
    """
    sheet = Image.new("RGB", (side + 420, (side + 8) * len(scored)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, one in enumerate(scored):
        top = row * (side + 8)
        sheet.paste(fitted(read_image(one.file), side, "crop"), (0, top))
        for place, (name, p) in enumerate(
            list(zip(one.scores.names, one.scores.probabilities, strict=True))[:bars]
        ):
            y = top + place * side // bars
            draw.rectangle(
                (side + 110, y + 2, side + 110 + int(220 * p), y + side // bars - 3),
                fill="#2f855a" if name == one.label else "#a0aec0",
            )
            draw.text((side + 12, y + 2), name, fill="black")
            draw.text(
                (side + 120 + int(220 * p), y + 2),
                f"{p:.2f}" + ("" if place or one.scores.sure else " (not sure)"),
                fill="black",
            )
    return sheet


def retention_sheet(result: RetentionReport, *, side: int = 96, per_cell: int = 2) -> Image.Image:
    """The heat map of R with pictures: a row for each concept, a column for each version of the
    stack; red is nothing or little of the user's thing, green is the thing (`RetentionReport.shade`).
    """
    count, margin = len(result.names), 130
    width = per_cell * side + 8
    sheet = Image.new("RGB", (margin + count * width, 24 + count * (side + 26)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(result.names):
        draw.text((margin + i * width + 4, 6), f"after {name}", fill="black")
    for (i, j), pictures in result.pictures.items():
        left, top = margin + i * width, 24 + j * (side + 26)
        share = result.shade(i, j)
        color = (int(220 - 120 * share), int(110 + 90 * share), 110)
        draw.rectangle((left, top, left + width - 3, top + side + 23), fill=color)
        for place, picture in enumerate(pictures[:per_cell]):
            sheet.paste(picture.resize((side, side)), (left + 3 + place * side, top + 3))
        draw.text((left + 6, top + side + 7), f"{float(result.likeness[i, j]):.2f}", fill="black")
        draw.text((4, top + side // 2), result.names[j], fill="black")
    return sheet
