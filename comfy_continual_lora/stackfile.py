"""Stage 6: a stack file's header and its history, read and checked without loading a tensor. Light:
lists and tabs read it too.

A stack file may come from a stranger, so everything in it is data: `checked` stands between it and
all
else, and refuses by name what is not as `store.save_stack` writes it.

    <name>.concepts.safetensors          the version in use
    <name>.concepts.history/7.stack      an earlier version, or one that was undone: whole stack
    files

Each version knows its number, the change that made it and the version that was changed (its
parent), so
undoing is going back to the parent, and what was undone can be gone back to as well.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from .errors import StackError
from .files import TOKEN, history_folder, real_file
from .settings import METHODS, MOST_VECTORS, PRESETS

FORMAT = "comfy-continual-lora"
VERSION = 1
HISTORY = 5  # earlier versions kept, where the stack does not say otherwise
_MOST_HEADER = 100_000_000  # bytes, as in the safetensors library
# What a change is called, with the words it is about
CHANGES = {
    "learned": "learned {}",
    "replaced": "replaced {} by learning it again",
    "consolidated": "consolidated {}",
    "solved": "consolidated all in closed form ({})",
    "forgot": "forgot {}",
    "merged": "merged {} from another stack",
    "imported": "imported {}",
    "undone": "took back what was newest; left: {}",
}


@dataclass(frozen=True)
class Change:
    """What made a version of a stack: kind, a key of CHANGES; how prompts name the concepts it is
    about; when, ISO 8601 in UTC.
    """

    kind: str
    names: Sequence[str]
    when: str

    def __str__(self) -> str:
        return CHANGES[self.kind].format(", ".join(self.names) or "nothing")


@dataclass(frozen=True)
class Version:
    """One version of a stack.

    `parent` is the number of the version that was changed, None where it is not known; `size` in
    bytes.
    """

    number: int
    parent: int | None
    change: str
    when: str
    tokens: list[str]
    size: int
    current: bool
    file: Path


# --- the safetensors header ----------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A tensor as the header describes it; `start` is its first byte in the file."""

    dtype: str
    sizes: tuple[int, ...]
    start: int


def read_header(path: Path) -> dict[str, Any]:
    """The checked header of a stack file. Errors: as `read_shapes`."""
    return read_shapes(path)[0]


def read_shapes(path: Path) -> tuple[dict[str, Any], dict[str, Shape]]:
    """The checked header of a stack file, and its tensors' shapes. Errors: as `opened`."""
    with opened(path) as (_, header, shapes):
        return header, shapes


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], dict[str, Any], dict[str, Shape]]]:
    """A stack file, open, with its checked header and its tensors' shapes.

    Whatever is read through it is of one version, though another program replaces the file
    meanwhile.
    Errors: StackError for a file that is missing, damaged, foreign, tampered with or newer than
    this program.
    """
    try:
        with real_file(path).open("rb") as file:
            metadata, shapes = _content(path, file)
            yield file, checked(path, metadata, shapes), shapes
    except OSError as error:
        raise unreadable(path, error) from None


def _content(path: Path, file: IO[bytes]) -> tuple[dict[str, str], dict[str, Shape]]:
    """The metadata and the tensors' shapes of a safetensors file.

    Errors: StackError for a damaged one.
    """
    try:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MOST_HEADER:
            raise ValueError("it has no header")
        content = json.loads(
            _whole(file.read(length), length), parse_constant=_refused, object_pairs_hook=_once
        )
        if not isinstance(content, dict):
            raise ValueError("its header is no object")
        metadata = content.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise ValueError("its metadata is not text")
        return metadata, _shapes(content, 8 + length, file.seek(0, 2))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, str(error)) from None


def _whole(data: bytes, length: int) -> bytes:
    if len(data) < length:
        raise ValueError("it is cut short")
    return data


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _shapes(entries: Mapping[str, Any], first: int, end_of_file: int) -> dict[str, Shape]:
    """The tensors, which have to fill the file from its byte `first` on without gap or overlap.

    Errors: ValueError.
    """
    found, spans, size = {}, [], end_of_file - first
    for name, one in entries.items():
        dtype, sizes, (start, end) = one["dtype"], one["shape"], one["data_offsets"]
        if not isinstance(dtype, str) or not all(
            type(n) is int and 0 <= n < 2**40 for n in (*sizes, start, end)
        ):
            raise ValueError(f"its tensor {name} has no proper size")
        found[name] = Shape(dtype, tuple(sizes), first + start)
        spans.append((start, end))
        if dtype == "F32" and end - start != 4 * math.prod(sizes):
            raise ValueError(f"its tensor {name} does not fill its place")
    spans = sorted([(0, 0), *spans, (size, size)])
    if any(a[1] != b[0] for a, b in pairwise(spans)):
        raise ValueError("it is cut short, or its tensors overlap")
    return found


def unreadable(path: Path, error: OSError) -> StackError:
    """The error for a file that this user may not read, or that is not there."""
    why = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        return StackError(f"There is no concept stack at {path}. Learn a concept first.")
    return StackError(
        f"The concept stack {path} can't be read ({why}). See that this user may read it; nothing "
        "in it was changed."
    )


def damaged(path: Path, why: str) -> StackError:
    """The error for a file that is no whole stack; it names the newest version to go back to."""
    earlier = [p for p in (*_history(path).values(), _previous(path)) if p.exists()]
    rescue = f" The version before it is {earlier[0]}: restore goes back to it." if earlier else ""
    return StackError(
        f"The concept stack {path} can't be read ({why}): it is cut short or was changed by "
        f"something else.{rescue}"
    )


# --- the schema ----------------------------------------------------------------------------------

Check = Callable[[Any], bool]


def _text(pattern: str = r"[^\x00-\x1f\ud800-\udfff]*", most: int = 1000) -> Check:
    expression = re.compile(pattern)
    return lambda value: (
        isinstance(value, str) and len(value) <= most and bool(expression.fullmatch(value))
    )


def _number(low: float, high: float = math.inf) -> Check:
    return lambda value: (
        type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    )


def _count(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check, most: int = 100_000) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _one_of(choices: Sequence[str]) -> Check:
    return lambda value: isinstance(value, str) and value in choices


def _date(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value)) and len(value) <= 40
    except ValueError:
        return False


def _settings(value: Any) -> bool:
    """What a concept was learned with: names and plain values."""
    if not isinstance(value, dict) or not all(map(_text(r"\w*", 64), value)):
        return False
    plain = all(
        v is None or type(v) is bool or _LINE(v) or _number(-math.inf)(v) for v in value.values()
    )
    return (
        plain
        and _or_none(_RANK)(value.get("rank"))
        and value.get("adapter", "lora") in ("lora", "vera")
    )


_LINE = _text()
_ANY = _text(r"[^\ud800-\udfff]*", 100_000)
_RANK = _count(1, 4096)
_ID = _text(r"[A-Za-z0-9_-]{1,64}")
_DIGEST = _text(r"[0-9A-Za-z]*", 128)
_WHOLE = _count(0, 2**63 - 1)

_RECORD: dict[str, tuple[Check, str]] = {
    "id": (_ID, "letters, digits, - and _"),
    "token": (_text(TOKEN.pattern), "letters, digits, - and _, at most 64"),
    "noun": (_LINE, "one line of text"),
    "method": (_one_of((*METHODS, "import")), "a method this version knows"),
    "images": (_WHOLE, "a count"),
    "steps": (_WHOLE, "a count"),
    "seed": (_WHOLE, "a count"),
    "prompts": (_list(_ANY), "a list of prompts"),
    "hashes": (_list(_DIGEST), "a list of hashes"),
    "learned": (_date, "a date and time"),
    "loss": (_number(-math.inf), "a finite number"),
    "preview": (
        _text(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", 1_000_000),
        "a picture in base64",
    ),
    "settings": (_settings, "settings by name"),
    "with_noun": (lambda value: type(value) is bool, "true or false"),
    "request": (_DIGEST, "a hash"),
    "consolidated": (_DIGEST, "a hash"),
}
_RECORD_DEFAULTS = {"with_noun": True, "request": "", "consolidated": ""}
_BASE: dict[str, tuple[Check, str]] = {
    "preset": (_one_of(tuple(PRESETS)), f"one of {', '.join(PRESETS)}"),
    "prediction": (_one_of(("epsilon", "v_prediction")), "a prediction type this version knows"),
    "word_widths": (_list(_count(1, 100_000), 4), "a list of widths"),
}
_CHANGE: dict[str, tuple[Check, str]] = {
    "kind": (_one_of(tuple(CHANGES)), "a change this version knows"),
    "names": (_list(_LINE), "a list of names"),
    "when": (_date, "a date and time"),
}
_HEADER: dict[str, tuple[Check, str]] = {
    "version": (_WHOLE, "a format version"),
    "fingerprint": (_text(r"[0-9a-f]{8,128}"), "a hash"),
    "rank": (_or_none(_RANK), "a rank"),
    "tau": (_or_none(_number(1e-30)), "a temperature above 0"),
    "base": (lambda value: isinstance(value, dict), "what it knows of its checkpoint"),
    "concepts": (_list(lambda value: isinstance(value, dict), 10_000), "a list of concepts"),
    "identity": (_text(r"[0-9a-f]{0,64}"), "a hash"),
    "number": (_or_none(_WHOLE), "a number"),
    "parent": (_or_none(_WHOLE), "a number"),
    "change": (_or_none(lambda value: isinstance(value, dict)), "a change"),
    "history": (_count(0, 1000), "a number of versions"),
}
_HEADER_DEFAULTS = {
    "tau": None,
    "base": {},
    "identity": "",
    "number": None,
    "parent": None,
    "change": None,
    "history": HISTORY,
}
_LAYER = r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*"
_NAMES = re.compile(
    rf"(?P<word>word)\.(?P<of>[A-Za-z0-9_-]+)|(?P<part>adapter|before)\.(?P<layer>{_LAYER})\.(?P<letter>[ABdbD])"
    rf"|(?P<held>pool|wish|fisher)\.(?P<concept>[A-Za-z0-9_-]+)\.(?P<held_layer>{_LAYER})\.(?P<held_letter>[ABdbDW])"
)


def checked(path: Path, metadata: Any, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The header of a stack file, every field there and of its type, and tensors that fit it and
    each other.

    Errors: StackError that names what is not as it has to be.
    """
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise StackError(
            f"{path} is a safetensors file but no concept stack. Move it away, or name another "
            "stack."
        )
    try:
        header = json.loads(metadata["stack"], parse_constant=_refused, object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    version = header.get("version")
    if type(version) is int and version > VERSION:
        raise StackError(
            f"{path} has format version {version}, this program reads up to {VERSION}. Update "
            "comfy-continual-lora."
        )
    header = _fields(path, "", {**_HEADER_DEFAULTS, **header}, _HEADER)
    header["base"] = _fields(
        path,
        "base: ",
        {"preset": "sd1", "prediction": "epsilon", "word_widths": [], **header["base"]},
        _BASE,
    )
    if header["change"] is not None:
        header["change"] = _fields(path, "change: ", header["change"], _CHANGE)
    header["concepts"] = [
        _fields(path, f"concept {number}: ", {**_RECORD_DEFAULTS, **record}, _RECORD)
        for number, record in enumerate(header["concepts"], start=1)
    ]
    for name in ("id", "token"):
        values = [record[name].lower() for record in header["concepts"]]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise _wrong(path, f"two concepts have the {name} {twice!r}")
    _tensors_fit(path, header, shapes)
    return header


def _fields(
    path: Path, where: str, given: dict[str, Any], schema: Mapping[str, tuple[Check, str]]
) -> dict[str, Any]:
    if unknown := sorted(given.keys() - schema.keys()):
        raise StackError(
            f"The concept stack {path} has a field this version does not know "
            f"({where}{unknown[0][:64]!r}): "
            "a newer one wrote it. Update comfy-continual-lora."
        )
    for name, (check, expected) in schema.items():
        if name not in given:
            raise _wrong(path, f"{where}{name} is missing")
        if not check(given[name]):
            raise _wrong(path, f"{where}{name} is {given[name]!r:.80}, expected {expected}")
    return given


def _wrong(path: Path, what: str) -> StackError:
    return StackError(
        f"The concept stack {path} can't be used: {what}. It is damaged or was tampered with; get "
        "it again, or restore an earlier version."
    )


def _tensors_fit(path: Path, header: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Every word and layer is there, and their shapes fit each other."""
    ids = [record["id"] for record in header["concepts"]]
    words: dict[str, tuple[int, ...]] = {}
    adapters: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}  # by part, layer and letter
    for name, shape in shapes.items():
        found = _NAMES.fullmatch(name)
        if found is None:
            raise _wrong(path, f"it holds a tensor {name[:100]!r}, which belongs to nothing")
        if shape.dtype != "F32":
            raise _wrong(path, f"its tensor {name} is {shape.dtype}, expected F32")
        concept = found["of"] or found["concept"]
        if concept and concept not in ids:
            raise _wrong(path, f"its tensor {name} belongs to no concept")
        if found["word"]:
            words[concept] = shape.sizes
            continue
        part = found["part"] or f"{found['held']}.{concept}"
        layer, letter = (
            found["layer"] or found["held_layer"],
            found["letter"] or found["held_letter"],
        )
        adapters.setdefault(part, {}).setdefault(layer, {})[letter] = shape.sizes
    _words_fit(path, header, words)
    ends: dict[str, dict[str, tuple[int | None, int | None]]] = {}
    for part, layers in adapters.items():
        ends[part] = _layers_fit(path, part, layers)
    first = next(iter(ends.values()), {})
    for part, layers in ends.items():
        if layers.keys() != first.keys():
            raise _wrong(path, f"{part} changes other layers than the rest")
        for layer, sizes in layers.items():
            if any(a != b for a, b in zip(sizes, first[layer], strict=True) if a and b):
                raise _wrong(path, f"{part} does not fit the rest in its layer {layer}")
    if any(part != "adapter" for part in ends) and "adapter" not in ends and not ids:
        raise _wrong(path, "it holds adapters but no concept")


def _words_fit(path: Path, header: Mapping[str, Any], words: Mapping[str, tuple[int, ...]]) -> None:
    widths = set()
    for record in header["concepts"]:
        sizes = words.get(record["id"])
        if sizes is None:
            raise _wrong(path, f"the word of {record['token']} is missing")
        if (
            len(sizes) not in (1, 2)
            or not all(sizes)
            or (len(sizes) == 2 and sizes[0] > MOST_VECTORS)
        ):
            raise _wrong(
                path,
                f"the word of {record['token']} has the shape {sizes}, expected 1 to "
                f"{MOST_VECTORS} vectors",
            )
        widths.add(sizes[-1])
    told = sum(header["base"]["word_widths"])
    if len(widths | ({told} if told else set())) > 1 and widths:
        raise _wrong(
            path,
            f"its words have different widths ({', '.join(map(str, sorted(widths)))}; "
            f"{told or 'none'} by its header)",
        )


def _layers_fit(
    path: Path, part: str, layers: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, tuple[int | None, int | None]]:
    """Of each layer the numbers of outputs and inputs, as far as its matrices tell."""
    found, ranks = {}, set()
    for layer, parts in layers.items():
        dims = {letter: len(sizes) for letter, sizes in parts.items()}
        if dims == {"A": 2, "B": 2} and parts["A"][0] == parts["B"][1]:
            ranks.add(parts["A"][0])
            found[layer] = parts["B"][0], parts["A"][1]
        elif dims == {"d": 1, "b": 1}:
            ranks.add(parts["d"][0])
            found[layer] = parts["b"][0], None
        elif dims == {"D": 2} or (dims == {"W": 2} and part.startswith("fisher")):
            found[layer] = next(iter(parts.values()))
        else:
            raise _wrong(
                path,
                f"{part} is not whole in its layer {layer}: "
                f"{', '.join(f'{k} {v}' for k, v in parts.items())}",
            )
        if 0 in found[layer] or 0 in ranks:
            raise _wrong(path, f"{part} is empty in its layer {layer}")
    kinds = {"".join(sorted(parts)) for parts in layers.values()}
    if len(kinds) > 1 or len(ranks) > 1:
        raise _wrong(path, f"the layers of {part} are of different kinds or ranks")
    if len({inputs for _, inputs in found.values()}) > 1:
        raise _wrong(path, f"the layers of {part} have different widths of text features")
    return found


# --- the history ---------------------------------------------------------------------------------


def _history(path: Path) -> dict[int, Path]:
    """The files of the history by number, the newest first."""
    folder = history_folder(path)
    try:
        names = [p for p in folder.iterdir() if re.fullmatch(r"[0-9]{1,9}\.stack", p.name)]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unreadable(folder, error) from None
    return dict(sorted(((int(p.stem), p) for p in names), reverse=True))


def _previous(path: Path) -> Path:
    """What earlier programs kept: the one version before."""
    return path.with_name(path.name + ".previous")


def versions(path: Path) -> list[Version]:
    """All versions of a stack that are kept, the newest first; files among them that can't be read
    are left out.

    Errors: StackError where the version in use can't be read.
    """
    path = real_file(path)
    found = earlier(path)
    if path.exists():
        now = _version(path, next((one.number + 1 for one in found), 1), current=True)
        found = [now, *(one for one in found if one.number != now.number)]
    return sorted(found, key=lambda one: one.number, reverse=True)


def in_use(path: Path) -> Version | None:
    """The version that is the stack now; None where there is no stack.

    Errors: StackError where it can't be read.
    """
    return next((one for one in versions(path) if one.current), None)


def earlier(path: Path) -> list[Version]:
    """The versions that are kept beside the one in use, the newest first, those that can be read."""
    files = [*_history(path).items(), (0, _previous(path))]
    return [one for number, file in files if (one := _readable(file, number)) is not None]


def _readable(file: Path, number: int) -> Version | None:
    try:
        return _version(file, number, current=False)
    except StackError:
        return None


def _version(file: Path, number: int, *, current: bool) -> Version:
    header = read_header(file)
    number = header["number"] if current and header["number"] is not None else number
    parent = header["parent"]
    if (
        header["number"] is None and number
    ):  # an earlier program wrote it, over the version before it
        parent = number - 1
    told, records = change_of(header), header["concepts"]
    when = told.when if told else records[-1]["learned"] if records else ""
    tokens = [record["token"] for record in records]
    text = (
        str(told)
        if told
        else f"a change that an earlier program made; newest: {tokens[-1] if tokens else 'none'}"
    )
    return Version(number, parent, text, when, tokens, file.stat().st_size, current, file)


def parent_of(path: Path) -> Version | None:
    """The version that undoing goes back to, if it is kept.

    Errors: StackError where there is no stack.
    """
    path = real_file(path)
    now, found = read_header(path), versions(path)
    current = next(one for one in found if one.current)
    parent = next((one for one in found if one.number == current.parent and not one.current), None)
    if parent is None:
        return None
    theirs = read_header(parent.file)["identity"]
    return parent if not (now["identity"] and theirs and now["identity"] != theirs) else None


def undo_preview(path: Path) -> str:
    """What undoing would do, in one sentence; or that there is nothing to undo.

    Errors: StackError for a file that can't be read.
    """
    current = in_use(path)
    if current is None:
        return "There is nothing to undo: no concept was learned yet."
    parent, change = parent_of(path), change_of(read_header(path))
    was_added = parent is None and change is not None and change.kind in ("learned", "imported")
    if parent is not None or was_added:
        tokens = parent.tokens if parent else current.tokens[:-1]
        return f"Undo takes back: {current.change} ({current.when[:10]}). {_then(tokens)}"
    if not current.tokens:
        return "There is nothing to undo: the stack is empty, and no earlier version of it is kept."
    if not takes_off_newest(path):
        return (
            f"There is nothing to undo: the version before this change ({current.change}) is no "
            "longer kept."
        )
    return f"Undo takes {current.tokens[-1]} off. {_then(current.tokens[:-1])}"


def _then(tokens: Sequence[str]) -> str:
    return f"The stack then holds {', '.join(tokens) or 'no concept'}."


def takes_off_newest(path: Path) -> bool:
    """Whether, without the version before, the last change can be taken back: what was learned last
    lies on top of the pool.
    """
    header = read_header(path)
    change = change_of(header)
    return bool(header["concepts"]) and (
        change is None or change.kind in ("learned", "imported", "undone")
    )


def change_of(header: Mapping[str, Any]) -> Change | None:
    """What made this version; None where an earlier program wrote it."""
    return Change(**header["change"]) if header["change"] else None
