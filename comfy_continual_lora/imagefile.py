"""Stage 2: image files: only listed formats are opened, and only our own files are overwritten.
Light: front ends use it.

Pillow chooses a decoder by a file's first bytes, whatever its name: a PostScript file called .png
starts Ghostscript.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from .errors import ConceptImagesError, SettingError
from .files import write_whole

# Decoders that start no other program. MPO: JPEGs from phones; AVIF and HEIF: if Pillow has them
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "AVIF", "HEIF")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")  # of images that we write
MAX_PIXELS = 100_000_000
_SOFTWARE, _US = 0x0131, "comfy-continual-lora"
_MODERN = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"hevc": "HEIC",
    b"heim": "HEIC",
    b"mif1": "HEIC",
    b"msf1": "HEIC",
}


@contextmanager
def opened(source: Path | IO[bytes]) -> Iterator[Image.Image]:
    """An image file of one of FORMATS, not decoded yet; `source` may be an open file.

    Errors: ConceptImagesError for any other file, one that is truncated, or more than MAX_PIXELS.
    """
    name = source if isinstance(source, Path) else "The image"
    Image.init()
    formats = [one for one in FORMATS if one in Image.OPEN]
    try:
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise ConceptImagesError(
                    f"{name} has {size}; the limit is {MAX_PIXELS:,} in total. Scale it down."
                )
            yield image
    except UnidentifiedImageError:
        raise ConceptImagesError(_unknown(source, name)) from None
    except Image.DecompressionBombError as error:
        raise ConceptImagesError(
            f"{name} is too large ({error}). Scale it down; the limit is {MAX_PIXELS:,} pixels."
        ) from None
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        raise ConceptImagesError(
            f"{name} can't be read as an image ({error}). It may be truncated; replace or remove it."
        ) from None


def _unknown(source: Path | IO[bytes], name: object) -> str:
    """The message for a file that none of our decoders accepts."""
    start = b""
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(12)
    modern = _MODERN.get(start[8:12]) if start[4:8] == b"ftyp" else None
    if modern:
        return (
            f"{name} is an {modern} image, which this Pillow can't read. Convert it to JPEG or PNG."
        )
    return (
        f"{name} can't be read as an image. Expected JPEG, PNG, WebP, BMP, TIFF, GIF or AVIF. "
        "Convert it to JPEG or PNG, or remove it."
    )


# --- writing -------------------------------------------------------------------------------------


def is_own(path: Path) -> bool:
    """Whether this program wrote the image."""
    try:
        with opened(path) as image:
            return image.getexif().get(_SOFTWARE) == _US
    except Exception:  # our own images can be opened
        return False


def check_output(path: Path) -> None:
    """Refuse an output path that could not be written at the end.

    Errors: SettingError for another suffix, or for a file that this program did not write.
    """
    if path.suffix.lower() not in ENDINGS:
        raise SettingError(
            f"{path} is not an image's file name. It has to end in one of {', '.join(ENDINGS)}."
        )
    if path.exists() and not is_own(path):
        raise SettingError(
            f"{path} already exists, and this program did not write it. Choose another name, or "
            "move it away."
        )


def check_folder(folder: Path) -> None:
    """Refuse an output folder that could not be made or written to.

    Errors: SettingError.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise SettingError(f"{there} is a file. Give a folder to write to.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SettingError(
            f"{folder} can't be written to: no permission in {there}. Choose another folder."
        )


def save_own(image: Image.Image, path: Path) -> None:
    """Write an image marked as ours; only an image with that mark is replaced.

    Errors: SettingError as `check_output` and `save_new`.
    """
    check_output(path)
    exif = Image.Exif()
    exif[_SOFTWARE] = _US
    save_new(image, path, exif=exif)


def save_new(image: Image.Image, path: Path, **options: Any) -> None:
    """Write an image, whole or not at all, with Pillow's options for its format.

    Errors: SettingError if it can't be written.
    """
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[path.suffix.lower()], **options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, buffer.getvalue())
    except OSError as error:
        raise SettingError(
            f"{path} can't be written ({error.strerror or error}). Choose another name, or free "
            "some space there."
        ) from None
