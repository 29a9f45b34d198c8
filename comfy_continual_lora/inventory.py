"""Stage 2: what there is to learn from - pictures, their captions and masks, and what is left out.
No torch: front ends use it.

    IMG_1.jpg                            a picture (`files.PICTURES`)
    IMG_1.txt, IMG_1.jpg.caption, ...    its caption: .txt or .caption behind its name
    IMG_1.mask.png, IMG_1_mask.jpg, ...  its mask (`_MASKS`)

Upper and lower case are the same. A caption is UTF-8, UTF-16 or UTF-32 with a byte order mark, or
else Windows-1252.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ConceptImagesError
from .files import PICTURES, with_name
from .imagefile import undecodable
from .progress import counted

FEW = 3  # with fewer pictures, more than the thing is learned
_CAPTIONS = (".txt", ".caption")
_MASKS = (".mask", "-mask", "_mask", "-masklabel")  # between a picture's name and the ending
_LONGEST = 25_000  # characters of a caption
_NAMED = 10  # files in a sentence
_BOMS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FOREIGN = re.compile(  # endings of images that have to be converted first
    r"\.(ai|arw|cr2|cr3|dds|dng|eps|exr|hdr|ico|j2k|jp2|jxl|kra|nef|orf|pcx|pdf|psd|qoi|raf|rw2|svg|"
    r"tga|xcf)"
)
Note = tuple[str, str]  # a file's name, and what was changed or chosen
_MASK_ALONE = "a mask without picture"
_SHARED = "several pictures have this name; rename them"
_ANOTHER = "another one of this name counts"
_OF_SEVERAL = "{} counts for all of these; one named as x.jpg.txt is for x.jpg alone"
_OTHER_PROGRAMS = ("__macosx", "__pycache__", "lost+found", "system volume information")


@dataclass(frozen=True)
class Picture:
    """A picture's file and what lies beside it. Of several captions the first that is not empty
    counts, of several masks the first. `folder`: the name of its subfolder, if it is in one.
    """

    file: Path
    captions: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    folder: str = ""

    @property
    def name(self) -> str:
        """How messages call it. Not by its path: it may be a host's copy, which its user never saw."""
        return f"{self.folder}/{self.file.name}" if self.folder else self.file.name

    @property
    def mask_name(self) -> str:
        """How messages call its mask, which a host may have written under another name."""
        return f"The mask of {self.name}"

    @property
    def mask(self) -> Path | None:
        return self.masks[0] if self.masks else None

    @property
    def caption(self) -> str | None:
        """Errors: ConceptImagesError as `read_caption`."""
        return next((text for _, text in self.texts()), None)

    def texts(self) -> list[tuple[Path, str]]:
        """Its captions that are not empty. Errors: ConceptImagesError as `read_caption`."""
        texts = [(file, read_caption(file)[0]) for file in self.captions]
        return [(file, text) for file, text in texts if text]

    def beside(self) -> list[Path]:
        """Its caption and its mask, as far as it has any. Errors: as `read_caption`."""
        return [*[file for file, _ in self.texts()[:1]], *self.masks[:1]]

    def feed(self, digest: Any) -> None:
        """Update a hash with the picture, its caption and its mask. Errors: ConceptImagesError."""
        feed(digest, self.file)
        digest.update((self.caption or "").encode())
        if self.mask:
            feed(digest, self.mask)

    def notes(self) -> list[Note]:
        """What was chosen of several files, and how its caption was read."""
        captions = [file for file, _ in self.texts()]
        notes = (
            [(captions[0].name, why) for why in read_caption(captions[0])[1]] if captions else []
        )
        for kind, files in (("captions", captions), ("masks", self.masks)):
            if len(files) > 1:
                names = ", ".join(file.name for file in files)
                notes.append((self.name, f"{len(files)} {kind}, {names}; the first counts"))
        return notes


Group = tuple[str, list[Picture]]  # a folder's name, and its pictures


@dataclass(frozen=True)
class Inventory:
    """Pictures, and the names of what is left out, with the reason in brackets."""

    pictures: tuple[Picture, ...]
    left_out: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        return [picture.file for picture in self.pictures]

    def summary(self) -> str:
        """One line, such as "5 pictures, 3 captions (.txt), 1 mask; left out: IMG_2.HEIC (convert
        it)". Errors: ConceptImagesError as `read_caption`.
        """
        texts = [texts[0][0] for picture in self.pictures if (texts := picture.texts())]
        endings = ", ".join(sorted({file.suffix.lower() for file in texts}, reverse=True))
        captions = f"{counted(len(texts), 'caption')} ({endings})" if texts else "no captions"
        masks = sum(bool(picture.masks) for picture in self.pictures)
        parts = [counted(len(self.pictures), "picture"), captions]
        return ", ".join([*parts, *([counted(masks, "mask")] if masks else [])]) + self.rest()

    def rest(self) -> str:
        """The end of a summary: what is left out."""
        return f"; left out: {_enumerated(self.left_out)}" if self.left_out else ""

    def notes(self) -> list[str]:
        """What a user has to know before learning starts: the summary, then what is unusual.

        Errors: ConceptImagesError as `read_caption`.
        """
        notes = [self.summary()]
        if len(self.pictures) < FEW:
            notes.append(
                f"{counted(len(self.pictures), 'picture')}: too few to tell the thing from what is "
                "around it, which is learned too. Better are 3 to 15, each in another place."
            )
        own = [note for picture in self.pictures for note in picture.notes()]
        used = dict.fromkeys((one, file) for one in self.pictures for file in one.beside())
        times = Counter(file for _, file in used)
        own += [(one.name, _OF_SEVERAL.format(file.name)) for one, file in used if times[file] > 1]
        return notes + sentences(own)


def sentences(notes: Iterable[Note]) -> list[str]:
    """One sentence for each kind of note, with the names of all files that it is about."""
    names: dict[str, list[str]] = {}
    for name, why in notes:
        names.setdefault(why, []).append(name)
    return [f"{_enumerated(files)}: {why}." for why, files in names.items()]


def inventory(source: str | Path | Iterable[str | Path]) -> Inventory:
    """What a folder holds (not its subfolders), in name order; or the pictures of a list as given,
    with what lies beside them.

    Errors: ConceptImagesError if there are no pictures, or if one of the list is missing.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source)
        if not folder.is_file():
            return _some(sorted_out(_listed(folder)), folder)
        source = [folder]
    files = [Path(one) for one in source]
    if not files:
        raise ConceptImagesError("No pictures were given. Give 3 to 15 of the thing to learn.")
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConceptImagesError(f"There is no picture {', '.join(missing)}.")
    given = set(files)
    beside = {
        folder: _by_name(entry for entry in _listed(folder) if entry not in given)
        for folder in {file.parent for file in files}
    }
    return Inventory(tuple(_picture(file, beside[file.parent]) for file in files))


def sorted_out(files: Sequence[Path]) -> Inventory:
    """What these files are by their names, wherever they lie. There may be no picture.

    What is named after several pictures of one name is left out: it can't be told which it is of.
    """
    names = _by_name(files)
    found = [_picture(file, names) for file in files if not _why_left_out(file)]
    masks = {mask.name.lower() for picture in found for mask in picture.masks}
    pictures = [picture for picture in found if picture.file.name.lower() not in masks]
    times = Counter(file.name for file in {picture.file for picture in pictures})
    shared = {name for name in times if times[name] > 1}
    reasons = {
        file.name.lower(): _SHARED if one.file.name in shared else _ANOTHER
        for one in pictures
        for file in (*one.captions, *one.masks)
    }
    pictures = [Picture(one.file) if one.file.name in shared else one for one in pictures]
    used = {one for of in pictures for one in (of.file, *of.captions, *of.masks)}
    rest = [file for file in files if file not in used]
    return Inventory(
        tuple(pictures),
        tuple(
            f"{file.name} ({reasons.get(file.name.lower()) or _why_left_out(file) or _MASK_ALONE})"
            for file in rest
        ),
    )


def groups(source: Path | list[Path]) -> tuple[list[Group], Inventory]:
    """The pictures of a folder and of its subfolders, each with the folder's name, as far as they
    have any; those of a list have no name. And the inventory of all together.

    Errors: ConceptImagesError as `inventory`.
    """
    if not isinstance(source, Path) or not source.is_dir():
        found = inventory(source)
        return [("", list(found.pictures))], found
    entries = _listed(source)
    folders = [entry for entry in entries if entry.is_dir()]
    own = sorted_out([entry for entry in entries if entry not in folders])
    parts = [(one.name, _within(one.name, sorted_out(_listed(one)))) for one in folders]
    parts.insert(0, (with_name(source).name, own))
    pictures, left_out = [], []
    for _, part in parts:
        pictures += part.pictures
        left_out += part.left_out
    whole = _some(Inventory(tuple(pictures), tuple(left_out)), source)
    return [(name, list(part.pictures)) for name, part in parts if part.pictures], whole


def _within(folder: str, found: Inventory) -> Inventory:
    """What a subfolder holds, with names that begin with its own."""
    return Inventory(
        tuple(replace(picture, folder=folder) for picture in found.pictures),
        tuple(f"{folder}/{one}" for one in found.left_out),
    )


def _some(found: Inventory, folder: Path) -> Inventory:
    """Errors: ConceptImagesError if there are no pictures."""
    if found.pictures:
        return found
    rest = found.rest() or ": it is empty"
    raise ConceptImagesError(
        f"No pictures in {folder}{rest}. Expected JPEG, PNG, WebP, BMP, TIFF or GIF; 3 to 15 "
        "pictures of the thing to learn."
    )


# --- names ---------------------------------------------------------------------------------------


def _listed(folder: Path) -> list[Path]:
    """What a folder holds in name order, without hidden entries and folders that other programs
    make for themselves, such as @eaDir and $RECYCLE.BIN. Errors: ConceptImagesError.
    """
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise ConceptImagesError(
            f"There is no folder {folder}. Give a folder with 3 to 15 pictures of the thing to "
            "learn."
        ) from None
    except OSError as error:
        raise ConceptImagesError(
            f"The folder {folder} can't be read ({error.strerror}). Give this user access to it."
        ) from None
    return [
        entry
        for entry in entries
        if not entry.name.startswith(".") and not (_is_others(entry.name) and entry.is_dir())
    ]


def _is_others(name: str) -> bool:
    return name.startswith(("@", "#", "$")) or name.lower() in _OTHER_PROGRAMS


def _by_name(files: Iterable[Path]) -> dict[str, Path]:
    """Files by their names, and by these in lower case."""
    files = [file for file in files if file.is_file()]
    return {file.name.lower(): file for file in files} | {file.name: file for file in files}


def _picture(file: Path, beside: Mapping[str, Path]) -> Picture:
    """`beside`: what may belong to it, by name."""
    bases = (file.name, file.stem)
    captions = [f"{base}{ending}" for ending in _CAPTIONS for base in bases]
    masks = [f"{base}{mark}{end}" for mark in _MASKS for base in bases for end in PICTURES]
    return Picture(file, _found(captions, beside), _found(masks, beside))


def _found(names: Sequence[str], beside: Mapping[str, Path]) -> tuple[Path, ...]:
    files = (beside.get(name) or beside.get(name.lower()) for name in names)
    return tuple(dict.fromkeys(file for file in files if file))


def _why_left_out(file: Path) -> str:
    """Why a file is no picture; empty if it is one. A caption or a mask is none unless it belongs
    to a picture.
    """
    ending = file.suffix.lower()
    if file.is_dir():
        return "a folder"
    if not file.is_file():
        return "not a file"
    if ending in _CAPTIONS:
        return "no picture has this name"
    if ending in PICTURES and not undecodable(file):
        return _MASK_ALONE if file.stem.lower().endswith(_MASKS[0]) else ""
    return "convert it" if ending in PICTURES or _FOREIGN.fullmatch(ending) else "no picture"


# --- content -------------------------------------------------------------------------------------


def read_caption(file: Path) -> tuple[str, list[str]]:
    """A caption as one line of text, and how it was read if that is unusual.

    Errors: ConceptImagesError for a file that can't be read or is not text, and as `as_caption`.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(4 * _LONGEST + 1)  # a character may take four bytes
    except OSError as error:
        raise _unreadable(file, error) from None
    notes: list[str] = []
    text = _decoded(data, notes)
    if any(map(_is_binary, text)):
        raise ConceptImagesError(
            f"The caption {file.name} is not text in UTF-8, in UTF-16 with a byte order mark or in "
            "Windows-1252. Save it as UTF-8, or remove it."
        )
    text, joined = as_caption(text, f"The caption {file.name}")
    return text, notes + joined


def as_caption(text: str, name: str) -> tuple[str, list[str]]:
    """Text as one line, and a note if it had more.

    Errors: ConceptImagesError, which calls it `name`, if it is too long, or not text.
    """
    if len(text) > _LONGEST:
        raise ConceptImagesError(
            f"{name} is longer than {_LONGEST:,} characters. Expected a sentence or some tags; "
            "shorten or remove it."
        )
    if binary := next(filter(_is_binary, text), None):
        raise ConceptImagesError(
            f"{name} contains {binary!a}, which is no letter of a text. Expected a sentence or some "
            "tags; type it again."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    notes = [f"{len(lines)} lines, which were joined to one caption"] if len(lines) > 1 else []
    return " ".join(lines), notes


def _decoded(data: bytes, notes: list[str]) -> str:
    """Text, with the replacement character for what is none."""
    mark = next((mark for mark in _BOMS if data.startswith(mark)), b"")
    try:
        return data.decode(_BOMS.get(mark, "utf-8"))
    except UnicodeDecodeError:
        if mark:
            return "\N{REPLACEMENT CHARACTER}"
    notes.append("not UTF-8, so it was read as Windows-1252 (Western European)")
    return data.decode("cp1252", "replace")


def _is_binary(letter: str) -> bool:
    """Whether it is no letter of a text: a control character, half a character, or what could not
    be decoded.
    """
    if letter.isspace():
        return False
    is_character = unicodedata.category(letter) not in ("Cc", "Cs")
    return not is_character or letter == "\N{REPLACEMENT CHARACTER}"


def feed(digest: Any, file: Path) -> None:
    """Update a hash with a file. Errors: ConceptImagesError."""
    try:
        with file.open("rb") as opened:
            while part := opened.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: OSError) -> ConceptImagesError:
    why = error.strerror or error
    return ConceptImagesError(
        f"{file.name} can't be read ({why}). Give this user access to it, or remove it."
    )


def _enumerated(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join([*names[:_NAMED], *([f"{more} more"] if more > 0 else [])])
