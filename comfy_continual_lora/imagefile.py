"""Stage 2: image files: only listed formats are opened, and only our own files are overwritten.
Light: front ends use it.

Pillow chooses a decoder by a file's first bytes, whatever its name: a PostScript file called .png
starts Ghostscript.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import ConceptImagesError, ContinualLoraError, SettingError
from .files import standing_at, write_whole

# Decoders that start no other program. MPO: JPEGs from phones; AVIF and HEIF: if Pillow has them
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "AVIF", "HEIF")
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")  # modes
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")  # of images that we write
_LONGEST = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # pixels each way that they hold
# Pixels in millions that are read in half a gigabyte. JPEGs are decoded at a smaller scale, but
# progressive ones only after all their coefficients are in memory
_MOST = {"JPEG": 170, "MPO": 170, "progressive JPEG": 60, "WEBP": 25, "AVIF": 35}
_MOST_OTHERS = 50
NARROWEST = 8  # pixels; less shows nothing
_ENOUGH = 16_000_000  # pixels: larger images are reduced
_SOFTWARE, _US = 0x0131, "comfy-continual-lora"
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _SAMPLES, _SIGNED = 258, 339, 2  # of TIFF
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


@dataclass(frozen=True)
class Read:
    """An image as upright 8-bit RGB, reduced if it is very large."""

    image: Image.Image
    format: str  # one of FORMATS
    size: tuple[int, int]  # of the file, upright
    notes: tuple[str, ...]  # what was ignored or changed


def read(source: Path | IO[bytes], *, ground: str = "white", name: str = "") -> Read:
    """An image; transparency is composited on `ground`, and of several frames the first is read.

    Errors: ConceptImagesError as `opened`, and for floats in no known range.
    """
    with opened(source, name) as image:
        size, notes = image.size, []
        # a JPEG may hold a second picture for bright screens
        if image.format != "MPO" and getattr(image, "is_animated", False):
            notes.append("several frames or pages, of which the first is used")
        factor = _factor(image)
        image.draft(None, (size[0] // factor, size[1] // factor))
        image.load()
        turn = _orientation(image, notes)
        picture = _rgb(_eight_bit(image, _reduced(image), notes), ground)
    if turn in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[turn])
        size = size if turn < 5 else (size[1], size[0])
    return Read(picture, str(image.format), size, tuple(notes))


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """The EXIF orientation; 1 if there is none. TIFFs are turned by Pillow."""
    if image.format == "TIFF":
        return 1
    with warnings.catch_warnings(record=True) as damages:
        warnings.simplefilter("always")
        try:
            exif = image.getexif()
            turn = exif.get(_ORIENTATION)
            is_lost = bool(damages) or (not exif and bool(image.info.get("exif")))
        except Exception:  # Pillow may raise anything
            turn, is_lost = None, True
    if turn is None and not is_lost:
        return 1
    if isinstance(turn, int) and 0 <= turn <= 8:
        return turn
    notes.append("the EXIF data is damaged, so its orientation was ignored")
    return 1


def _factor(image: Image.Image) -> int:
    """How many times smaller an image may be read."""
    return math.ceil(math.sqrt(image.width * image.height / _ENOUGH))


def _reduced(image: Image.Image) -> Image.Image:
    factor = _factor(image)
    if factor == 1:
        return image
    if image.mode in ("L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        return image.reduce(factor)
    size = (math.ceil(image.width / factor), math.ceil(image.height / factor))
    return image.resize(size, Image.Resampling.NEAREST)


def _eight_bit(image: Image.Image, reduced: Image.Image, notes: list[str]) -> Image.Image:
    """Greyscale of more bits or of floats becomes 8-bit, by the range of the format: floats are
    0 to 1, or else 0 to 255. `image` is the file, `reduced` its pixels.

    Errors: ValueError for other floats.
    """
    if not reduced.mode.startswith(("I", "F")):
        return reduced
    values = np.asarray(reduced)
    if reduced.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 255:  # nor NaN
            raise ValueError(f"its floats are {low:g} to {high:g}; expected 0 to 1, or 0 to 255")
        white = 1 if high <= 1 else 255
        if white == 255:
            notes.append("floats above 1, which were read as 0 to 255")
    else:
        tags = getattr(image, "tag_v2", {})
        bits, kind = (tags.get(tag, (usual,))[0] for tag, usual in ((_BITS, 16), (_SAMPLES, 1)))
        is_signed = kind == _SIGNED
        white = 2 ** (bits - is_signed) - 1
        if bits == 32 and not is_signed:
            values = values.view(np.uint32)  # Pillow reads them as signed
    grey = np.clip(values.astype(np.float32) / white * 255, 0, 255).astype(np.uint8)
    if not grey.any():
        notes.append("black, as its values are less than 1/255 of what its format can hold")
    return Image.fromarray(grey)


def _rgb(image: Image.Image, ground: str) -> Image.Image:
    # Image.has_transparency_data is not in AUTOMATIC1111's Pillow, which is 9.5
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return image.convert("RGB")


# --- opening -------------------------------------------------------------------------------------


@contextmanager
def opened(source: Path | IO[bytes], name: str = "") -> Iterator[Image.Image]:
    """An image file of one of FORMATS, not decoded yet; `source` may be an open file.

    Errors: ConceptImagesError for any other file, one that is damaged, too few or too many pixels.
    It calls the image `name`, or else by its file's name: the path may be that of a copy.
    """
    name = name or (source.name if isinstance(source, Path) else "The image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and of damaged metadata
            with Image.open(source, formats=_formats()) as image:
                _check_size(image, name)
                yield image
    except ContinualLoraError:
        raise
    except UnidentifiedImageError:
        raise ConceptImagesError(_unknown(source, name)) from None
    except Image.DecompressionBombError as error:
        raise ConceptImagesError(f"{name} is too large ({error}). Scale it down.") from None
    except Exception as error:  # Pillow may raise anything
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConceptImagesError(
            f"{name} can't be read as an image ({why}). It may be damaged or truncated; replace or "
            "remove it."
        ) from None


def _check_size(image: Image.Image, name: str) -> None:
    """Errors: ConceptImagesError."""
    shape = f"{image.width} x {image.height} pixels"
    if min(image.size) < NARROWEST:
        raise ConceptImagesError(
            f"{name} is too narrow: {shape}; expected at least {NARROWEST} each way. Replace or "
            "remove it."
        )
    kind = "progressive JPEG" if image.info.get("progressive") else str(image.format)
    most = _MOST.get(kind, _MOST_OTHERS)
    if image.width * image.height > most * 1_000_000:
        raise ConceptImagesError(
            f"{name} is too large: {shape}; {kind} is read up to {most} million. Scale it down."
        )


def _formats() -> list[str]:
    """Those of FORMATS that this Pillow can decode."""
    Image.init()
    _register_heif()
    return [one for one in FORMATS if one in Image.OPEN]


@functools.cache
def _register_heif() -> None:
    """pillow-heif is optional."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()


def undecodable(path: Path) -> str:
    """The format of a file that this Pillow has no decoder for, HEIC or AVIF; empty for any other
    file.
    """
    name = _modern(path)
    if not name:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path, formats=_formats()).close()
    except UnidentifiedImageError:
        return name
    except Exception:  # decodable, but damaged
        return ""
    return ""


def _modern(path: Path) -> str:
    """The name of a format that not every Pillow can read, by a file's first bytes; or empty."""
    start = b""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(12)
    return _MODERN.get(start[8:12], "") if start[4:8] == b"ftyp" else ""


def _unknown(source: Path | IO[bytes], name: str) -> str:
    """The message for a file that none of our decoders accepts."""
    if modern := _modern(source) if isinstance(source, Path) else "":
        return (
            f"{name} is an {modern} image, which this Pillow can't read. Convert it to JPEG or PNG."
        )
    return (
        f"{name} can't be read as an image. Expected JPEG, PNG, WebP, BMP, TIFF, GIF or AVIF. "
        "Convert it to JPEG or PNG, or remove it."
    )


# --- writing -------------------------------------------------------------------------------------


def is_own(path: Path) -> bool:
    """Whether this program wrote the image, of whatever size; its pixels are not decoded."""
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats()) as image:
                exif.load(image.info.get("exif", b""))
        return exif.get(_SOFTWARE) == _US
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
    there, fits = standing_at(folder)
    if not there.is_dir():
        raise SettingError(f"{there} is a file. Give a folder to write to.")
    if not fits:
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
    _save(image, path, new=False, exif=exif)


def save_new(image: Image.Image, path: Path, **options: Any) -> None:
    """Write a new image, whole or not at all, with Pillow's options for its format.

    Errors: FileExistsError; SettingError if it can't be written.
    """
    _save(image, path, new=True, **options)


def _save(image: Image.Image, path: Path, *, new: bool, **options: Any) -> None:
    longest = _LONGEST.get(path.suffix.lower(), max(image.size))
    if max(image.size) > longest:
        raise SettingError(
            f"{path} can't be written: it would be {image.width} x {image.height} pixels, and "
            f"{path.suffix} holds {longest:,} each way. Give a name that ends in .png."
        )
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[path.suffix.lower()], **options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, buffer.getvalue(), new=new)
    except FileExistsError:
        raise
    except OSError as error:
        raise SettingError(
            f"{path} can't be written ({error.strerror or error}). Choose another name, or free "
            "some space there."
        ) from None
