"""Stage 2: image files, opened as the formats we name and as nothing else, and written over nothing
but our own. Light: front ends use it.

Pillow chooses a decoder by a file's first bytes, whatever its name: a PostScript file called .png
starts Ghostscript.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from .errors import ConceptImagesError, SettingError

# Decoders that run nothing but themselves. MPO: JPEGs of phones; AVIF and HEIF: where Pillow has
# them.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "AVIF", "HEIF")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")  # of images that are written
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

    Errors: ConceptImagesError for any other file, for one that is absurdly large or cut short.
    """
    name = source if isinstance(source, Path) else "The image"
    Image.init()
    known = [one for one in FORMATS if one in Image.OPEN]
    try:
        with Image.open(source, formats=known) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise ConceptImagesError(
                    f"{name} is {size}; at most {MAX_PIXELS:,} in all are read. Scale it down."
                )
            yield image
    except UnidentifiedImageError:
        raise ConceptImagesError(_unknown(source, name)) from None
    except Image.DecompressionBombError as error:
        raise ConceptImagesError(
            f"{name} is too large ({error}). Scale it down; at most {MAX_PIXELS:,} pixels are read."
        ) from None
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        raise ConceptImagesError(
            f"{name} can't be read as an image ({error}). It may be cut short; replace it or take "
            "it out."
        ) from None


def _unknown(source: Path | IO[bytes], name: object) -> str:
    """What to say of a file that no decoder of ours takes."""
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
        f"{name} can't be read as an image: it is none of JPEG, PNG, WebP, BMP, TIFF, GIF and "
        "AVIF. Convert it to JPEG or PNG, or take it out."
    )


# --- written -------------------------------------------------------------------------------------


def is_own(path: Path) -> bool:
    """Whether this program wrote the image."""
    try:
        with opened(path) as image:
            return image.getexif().get(_SOFTWARE) == _US
    except Exception:  # whatever is wrong with it, ours is not
        return False


def check_output(path: Path) -> None:
    """Refuse an output that could not be written in the end.

    Errors: SettingError for its ending, or for a file that is somebody's.
    """
    if path.suffix.lower() not in ENDINGS:
        raise SettingError(
            f"{path} is no name for an image. It has to end in one of {', '.join(ENDINGS)}."
        )
    if path.exists() and not is_own(path):
        raise SettingError(
            f"{path} is there already, and this program did not write it. Name another file, or "
            "move it away."
        )


def save_own(image: Image.Image, path: Path) -> None:
    """Write an image that says whose it is; one that says so is replaced.

    Errors: SettingError as `check_output`.
    """
    check_output(path)
    exif = Image.Exif()
    exif[_SOFTWARE] = _US
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, exif=exif)
    except OSError as error:
        raise SettingError(
            f"{path} can't be written ({error.strerror or error}). Name another file, or make "
            "room there."
        ) from None
