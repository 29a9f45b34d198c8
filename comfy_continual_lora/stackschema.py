"""Stage 6: the schema of a stack file's header. Light. `stacktensors` has that of its tensors.

A stack file may come from an untrusted source: `checked` validates everything before it is used, and
names whatever differs from what `store.save_stack` writes. Fields that a later release added to the
same format version are kept, under "later".
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .errors import StackError, excerpt
from .files import TOKEN, history_folder
from .presets import ADAPTERS, METHODS, PREDICTIONS, PRESETS
from .stacktensors import Shape, check_tensors, unusable

FORMAT = "comfy-continual-lora"
VERSION = 3
HISTORY = 5  # earlier versions kept by default
MOST_RANK = 4096
# How a change is described; {} are the words it is about
CHANGES = {
    "learned": "learned {}",
    "replaced": "replaced {} by learning it again",
    "consolidated": "consolidated {}",
    "solved": "consolidated all in closed form ({})",
    "forgot": "forgot {}",
    "merged": "merged {} from another stack",
    "imported": "imported {}",
    "renamed": "renamed {}",
    "undone": "undid the newest change; left: {}",
}


def refuse_number(name: str) -> None:
    """For `json.loads`: NaN and infinity are not JSON."""
    raise ValueError(f"{name} is not a number")


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: a duplicate name would be ambiguous."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name occurs twice")
    return unique


def history_files(path: Path) -> dict[int, Path]:
    """The files of the history by number, the newest first."""
    folder = history_folder(path)
    try:
        names = [p for p in folder.iterdir() if re.fullmatch(r"[0-9]{1,9}\.stack", p.name)]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unreadable(folder, error) from None
    return dict(sorted(((int(p.stem), p) for p in names), reverse=True))


def previous_file(path: Path) -> Path:
    """The one previous version that early versions of this program kept."""
    return path.with_name(path.name + ".previous")


def unreadable(path: Path, error: OSError) -> StackError:
    """The error for a file that is missing, or that this user may not read."""
    why = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        return StackError(f"There is no concept stack at {path}. Learn a concept first.")
    advice = "Try again" if path.is_file() else "Name the file of a concept stack"
    if isinstance(error, PermissionError):
        advice = "Give this user permission to read it"
    return StackError(
        f"The concept stack {path} can't be read ({why}). {advice}; it was not changed."
    )


def damaged(path: Path, why: str) -> StackError:
    """The error for a file that is not a complete stack; it names the newest version to go back to."""
    earlier = [p for p in (*history_files(path).values(), previous_file(path)) if p.exists()]
    advice = "Get the file again."
    if earlier:
        advice = f"The version before it is {earlier[0]}: go back to it (`restore`)."
    return StackError(
        f"The concept stack {path} can't be read ({why}): it is truncated or was changed by another "
        f"program. {advice}"
    )


# --- the schema ----------------------------------------------------------------------------------

Check = Callable[[Any], bool]


def _text(pattern: str = r"[^\x00-\x1f\ud800-\udfff]*", most: int = 1000) -> Check:
    expression = re.compile(pattern)
    return lambda value: (
        isinstance(value, str) and len(value) <= most and bool(expression.fullmatch(value))
    )


def _number(low: float = -sys.float_info.max) -> Check:
    """A finite number; a whole one that no float can hold is none."""
    return lambda value: type(value) in (int, float) and low <= value <= sys.float_info.max


def _count(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check, most: int = 100_000) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _one_of(choices: Sequence[str]) -> Check:
    return lambda value: isinstance(value, str) and value in choices


def _plain(value: Any, levels: int = 4) -> bool:
    """JSON of a few levels."""
    if isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return levels > 0 and all(_plain(one, levels - 1) for one in parts)
    return value is None or type(value) is bool or _ANY(value) or _number()(value)


def _date(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value)) and len(value) <= 40
    except ValueError:
        return False


def _share(value: Any) -> bool:
    return _number(0)(value) and value <= 1


def _settings(value: Any) -> bool:
    """The settings a concept was learned with: names and plain values."""
    if not isinstance(value, dict) or not all(map(_text(r"\w*", 64), value)):
        return False
    plain = all(v is None or type(v) is bool or _LINE(v) or _number()(v) for v in value.values())
    counts = _or_none(_RANK)(value.get("rank")) and _or_none(_SIDE)(value.get("size"))
    share = _share(value.get("retention_language", 0))
    return plain and counts and share and value.get("adapter", "lora") in ADAPTERS


_LINE = _text()
_ANY = _text(r"[^\ud800-\udfff]*", 100_000)
_RANK = _count(1, MOST_RANK)
_SIDE = _count(64, 4096)  # pixels
_ID = _text(r"[A-Za-z0-9_-]{1,64}")
_DIGEST = _text(r"[0-9A-Za-z]*", 128)
_WHOLE = _count(0, 2**63 - 1)

_RECORD: dict[str, tuple[Check, str]] = {
    "id": (_ID, "letters, digits, - and _"),
    "token": (_text(TOKEN.pattern), "letters, digits, - and _, at most 64"),
    "noun": (_LINE, "one line of text"),
    "method": (lambda value: value in (*METHODS, "import"), "a method this version knows"),
    "images": (_WHOLE, "a count"),
    "steps": (_WHOLE, "a count"),
    "seed": (_WHOLE, "a count"),
    "prompts": (_list(_ANY), "a list of prompts"),
    "hashes": (_list(_DIGEST), "a list of hashes"),
    "learned": (_date, "a date and time"),
    "loss": (_number(), "a finite number"),
    "preview": (
        _text(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", 1_000_000),
        "a picture in base64",
    ),
    "settings": (_settings, "settings by name"),
    "with_noun": (lambda value: type(value) is bool, "true or false"),
    "request": (_DIGEST, "a hash"),
    "consolidated": (_DIGEST, "a hash"),
    "watched": (
        _list(_list(_number(), 3), 10_000),
        "looks of three numbers each",
    ),
    "losses": (_list(_number(), 1000), "at most 1000 finite numbers"),
    "features": (
        _text(r"(?:[0-9]{1,4}:[A-Za-z0-9+/]*={0,2})?", 100_000),
        "numbers of its pictures in base64",
    ),
}
_RECORD_DEFAULTS = {
    "with_noun": True,
    "request": "",
    "consolidated": "",
    "features": "",
    "losses": [],
    "watched": [],
}
_BASE: dict[str, tuple[Check, str]] = {
    "preset": (_one_of(tuple(PRESETS)), f"one of {', '.join(PRESETS)}"),
    "prediction": (_one_of(tuple(PREDICTIONS.values())), "a prediction type this version knows"),
    "word_widths": (_list(_count(1, 100_000), 4), "a list of widths"),
    "clip_skip": (_count(1, 2), "1 or 2"),
}
_BASE_DEFAULTS = {"preset": "sd1", "prediction": "epsilon", "word_widths": [], "clip_skip": 1}
_CHANGE: dict[str, tuple[Check, str]] = {
    "kind": (_one_of(tuple(CHANGES)), "a change this version knows"),
    "names": (_list(_LINE), "a list of names"),
    "when": (_date, "a date and time"),
}
_ORDINARY: dict[str, tuple[Check, str]] = {
    "count": (_count(1, 10**9), "a count"),
    "nouns": (_list(_LINE), "a list of nouns"),
    "share": (_or_none(_number(0)), "a share"),
}
_HEADER: dict[str, tuple[Check, str]] = {
    "version": (_count(1, VERSION), f"a format version from 1 to {VERSION}"),
    "fingerprint": (_text(r"[0-9a-f]{8,128}"), "a hash"),
    "rank": (_or_none(_RANK), "a rank"),
    "tau": (_or_none(_number(1e-30)), "a temperature above 0"),
    "base": (lambda value: isinstance(value, dict), "a description of its checkpoint"),
    "concepts": (_list(lambda value: isinstance(value, dict), 10_000), "a list of concepts"),
    "identity": (_text(r"[0-9a-f]{0,64}"), "a hash"),
    "number": (_or_none(_WHOLE), "a number"),
    "parent": (_or_none(_WHOLE), "a number"),
    "change": (_or_none(lambda value: isinstance(value, dict)), "a change"),
    "ordinary": (_or_none(lambda value: isinstance(value, dict)), "a description of prompts"),
    "history": (_count(0, 1000), "a number of versions"),
}
_HEADER_DEFAULTS = {
    "tau": None,
    "base": {},
    "identity": "",
    "number": None,
    "parent": None,
    "change": None,
    "ordinary": None,
    "history": HISTORY,
}


def owner_of(identity: str, fingerprint: str, concepts: Sequence[str]) -> str:
    """Whose the files are that a stack exports: its identity. One that was never stored, or that an
    early version wrote, has one derived from the first of its concepts' ids; without any it has none.
    """
    if identity or not concepts:
        return identity
    return hashlib.sha256(f"{fingerprint}/{concepts[0]}".encode()).hexdigest()[:16]


def checked(path: Path, metadata: Any, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The header of a stack file, complete and with every field of its type; the tensors fit it and
    each other.

    Errors: StackError that names the first problem.
    """
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise StackError(
            f"{path} is a safetensors file but not a concept stack. Move it away, or name another "
            "stack."
        )
    try:
        header = json.loads(
            metadata["stack"], parse_constant=refuse_number, object_pairs_hook=unique_pairs
        )
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    version = header.get("version")
    if type(version) is int and version > VERSION:
        raise StackError(
            f"{path} has format version {excerpt(version)}; this program reads up to {VERSION}. "
            "Update comfy-continual-lora."
        )
    header = _fields(path, "", {**_HEADER_DEFAULTS, **header}, _HEADER)
    header["base"] = _fields(
        path,
        "base: ",
        {**_BASE_DEFAULTS, **header["base"]},
        _BASE,
    )
    if header["change"] is not None:
        header["change"] = _fields(path, "change: ", header["change"], _CHANGE)
    if header["ordinary"] is not None:
        header["ordinary"] = _fields(path, "ordinary: ", header["ordinary"], _ORDINARY)
    header["concepts"] = [
        _fields(path, f"concept {number}: ", {**_RECORD_DEFAULTS, **record}, _RECORD)
        for number, record in enumerate(header["concepts"], start=1)
    ]
    for name in ("id", "token"):
        counts = Counter(record[name].lower() for record in header["concepts"])
        if twice := next((value for value, count in counts.items() if count > 1), None):
            raise unusable(path, f"two concepts have the {name} {twice!r}")
    check_tensors(path, header, shapes)
    return header


def _fields(
    path: Path, where: str, given: dict[str, Any], schema: Mapping[str, tuple[Check, str]]
) -> dict[str, Any]:
    """The fields of the schema, checked, and under "later" those that it does not have."""
    for name, (check, expected) in schema.items():
        if name not in given:
            raise unusable(path, f"{where}{name} is missing")
        if not check(given[name]):
            raise unusable(path, f"{where}{name} is {excerpt(given[name])}, expected {expected}")
    later = {name: value for name, value in given.items() if name not in schema}
    if not _plain(later):
        raise unusable(
            path, f"{where}its unknown fields {excerpt(list(later))} are no plain values"
        )
    return {**{name: given[name] for name in schema}, "later": later}
