"""How a setting or a field of a request is declared and checked. Light.

A field's metadata says help, range, unit and group; front ends make widgets and flags from that.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from typing_extensions import Self

from .errors import SettingError, excerpt
from .presets import ADAPTER_RATES, KINDS, METHOD_PRESETS, PRESETS


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    multiple: int = 1,
    unit: str = "",
    group: str = "",
    by_checkpoint: bool = True,
) -> Any:
    """A dataclass field with its range, help and heading.

    `by_checkpoint`: a default of None stands for what suits the checkpoint (presets.py).
    """
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "choices": choices,
        "multiple": multiple,
        "unit": unit,
        "group": group,
        "by_checkpoint": by_checkpoint,
    }
    return dataclasses.field(default=default, metadata=metadata)


def option(
    help: str,
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field of a request; required if it has no default."""
    return setting(default, help, low=low, high=high, choices=choices)


def help_of(field: dataclasses.Field, nothing: str = "0") -> str:
    """A setting's help for a widget, including the value that stands for a default of None
    (`nothing`) and what that means.
    """
    if field.default is not None:
        return field.metadata["help"]
    if not field.metadata["by_checkpoint"]:
        return f"{field.metadata['help']}. {nothing}: not given"
    nothing = "Auto" if str(field.type).startswith("bool") else nothing
    suits = suiting(field)
    values = f" ({suits})" if suits else ""
    return f"{field.metadata['help']}. {nothing}: what suits the checkpoint{values}"


def suiting(field: dataclasses.Field) -> str:
    """The presets of a setting in words: "2e-4, sdxl 1e-4, mini 3e-4"; empty if there are none."""
    name = field.name
    values = {preset: row[name] for preset, row in PRESETS.items() if name in row}
    if not values:
        return ""
    words = [in_words(values["sd1"])]
    for preset, value in values.items():
        if value != values["sd1"]:
            words.append(f"{preset} {in_words(value)}")
    exceptions: dict[tuple[str, str], list[str]] = {}  # checkpoints by method and value
    for (preset, method), row in METHOD_PRESETS.items():
        if name in row:
            exceptions.setdefault((method, in_words(row[name])), []).append(preset)
    words += [f"{method} on {'/'.join(on)} {value}" for (method, value), on in exceptions.items()]
    if name == "rate":
        words += [f"{kind} {factor} times as much" for kind, factor in ADAPTER_RATES.items()]
    return ", ".join(words)


def in_words(value: Any) -> str:
    """A value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "nothing" if value == "" else str(value)


def from_widget(field: dataclasses.Field, value: Any) -> Any:
    """A widget's value -> the setting's; 0 and "auto" become None if that is the default, and a
    number may be given as text.

    Errors: SettingError for text that is neither.
    """
    if str(field.type) == "bool | None":
        answers = {"auto": None, "yes": True, "no": False}
        return answers.get(value, value) if isinstance(value, str) else value
    if isinstance(value, str) and str(field.type) in ("int | None", "float | None"):
        value = _number_in(field.name, value)
    if field.default is None and value in (None, 0, "", "auto"):
        return None
    if str(field.type).startswith("int") and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _number_in(name: str, text: str) -> float | int | None:
    """The number that is written there; None for "auto" and for nothing."""
    text = text.strip().lower()
    if text in ("", "auto"):
        return None
    try:
        number = float(text)
    except ValueError:
        raise SettingError(
            f"`{name}` is {excerpt(text)}; it has to be a number, or auto."
        ) from None
    return int(number) if number.is_integer() and abs(number) < _WHOLE else number


_TYPES = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "text"),
    "Path": ((str, Path), "a path"),
}
_WHOLE = 2**63  # whole numbers are smaller, either way


def check_names(what: str, given: Iterable[object], known: Collection[str]) -> None:
    """Errors: SettingError for the first field or setting (`what`) that does not exist; it says
    which one that does has the nearest name.
    """
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        names = ", ".join(known) or "none"
        advice = f"Did you mean `{near[0]}`?" if near else f"There are: {names}."
        raise SettingError(f"There is no {what} {excerpt(unknown[0])}. {advice}")


def check_field(field: dataclasses.Field, value: Any) -> None:
    """Errors: SettingError for a value of another type or out of its range."""
    if field.metadata and not (value is None and "None" in str(field.type)):
        check_type(field, value)
        check_range(field, value)


def check_type(field: dataclasses.Field, value: Any) -> None:
    """Errors: SettingError for a value that is not of the field's declared type, a number that is
    not finite or has more than 64 bits, and text with NUL or half a character (a lone surrogate).
    """
    declared = str(field.type)
    kinds = [kind for kind in _TYPES if kind in declared.replace("Sequence[str]", "")]
    may_be_list = "Sequence[" in declared or "list[" in declared
    if may_be_list and (isinstance(value, (list, tuple)) or "Path" not in kinds):
        _check_list(field, value, nested="Sequence[str | Sequence" in declared)
        return
    for kind in kinds:
        accepted, _ = _TYPES[kind]
        if isinstance(value, accepted) and (kind == "bool" or not isinstance(value, bool)):
            if kind != "Path":
                _check_value(field.name, value)
            return
    expected = " or ".join(_TYPES[kind][1] for kind in kinds)
    if "list[" in declared:
        expected += " or a list of them"
    raise SettingError(f"`{field.name}` is {excerpt(value)}; it has to be {expected}.")


def _check_list(field: dataclasses.Field, value: Any, nested: bool) -> None:
    name, holds_paths = field.name, "Path" in str(field.type)
    if not isinstance(value, (list, tuple)):
        raise SettingError(f"`{name}` is {excerpt(value)}; it has to be a list of strings.")
    for one in value:
        if nested and not isinstance(one, str):
            _check_list(field, one, nested=False)
        elif not isinstance(one, (str, Path) if holds_paths else str):
            raise SettingError(f"`{name}` contains {excerpt(one)}; all of it has to be strings.")
        elif not holds_paths:
            _check_value(name, one)


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(f"`{name}` is {value}; it has to be a finite number.")
    if isinstance(value, int) and not -_WHOLE < value < _WHOLE:
        raise SettingError(f"`{name}` is {excerpt(value)}; that number is too large.")
    if isinstance(value, str) and re.search(r"[\0\ud800-\udfff]", value):
        raise SettingError(f"`{name}` is {excerpt(value)}, which is not valid text.")


class Settings:
    """Base class of all settings."""

    def check(self) -> None:
        """Errors: SettingError for the first value of another type or out of its range."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            check_field(field, getattr(self, field.name))

    def resolved(self, preset: str) -> Self:
        """A copy in which every None is what suits the checkpoint; checked."""
        row = PRESETS[preset] | METHOD_PRESETS.get((preset, getattr(self, "method", "")), {})
        if factor := ADAPTER_RATES.get(getattr(self, "adapter", "")):
            row["rate"] = factor * PRESETS[preset]["rate"]
        if kind := KINDS.get(getattr(self, "kind", None) or ""):
            batch = getattr(self, "batch", None) or row["batch"]
            row["steps"] = max(1, round(row["steps"] * row["batch"] * kind["pictures"] / batch))
            row["rate"] = kind["rate"] * row["rate"]
        defaults = {name: value for name, value in row.items() if getattr(self, name, 0) is None}
        resolved = dataclasses.replace(self, **defaults)  # type: ignore[type-var]
        resolved.check()
        return resolved


def check_range(field: dataclasses.Field, value: Any) -> None:
    """Errors: SettingError for a value that is not a choice, not in range or not a multiple."""
    meta, name = field.metadata, field.name
    if meta["choices"]:
        if value not in meta["choices"]:
            choices = ", ".join(meta["choices"])
            raise SettingError(f"`{name}` is {excerpt(value)}; it has to be one of {choices}.")
        return
    low, high = meta["low"], meta["high"]
    unit = f" {meta['unit']}" if meta["unit"] else ""
    if (low is not None and value < low) or (high is not None and value > high):
        upper = " and more" if high is None else f" to {_digits(high)}"
        raise SettingError(
            f"`{name}` is {_digits(value)}; the range is {_digits(low)}{upper}{unit}."
        )
    if meta["multiple"] > 1 and value % meta["multiple"]:
        raise SettingError(
            f"`{name}` is {_digits(value)}; it has to be a multiple of {meta['multiple']}{unit}."
        )


def _digits(number: float | None) -> str:
    """With as many digits as tell it from its neighbours; of whole numbers all."""
    return f"{number:.15g}" if isinstance(number, float) else str(number)
