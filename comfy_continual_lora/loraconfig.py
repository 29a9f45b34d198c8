"""Stage 1: how strongly the matrices of a LoRA's file are meant to act.

    delta = s B A        s = alpha / r, or alpha / sqrt(r) if the LoRA is rank-stabilised (rsLoRA)

kohya       alpha is a tensor of each layer
PEFT        adapter_config.json beside adapter_model.safetensors: r and lora_alpha, rank_pattern and
            alpha_pattern for the layers that differ, use_rslora
diffusers   the same fields as JSON in the file's metadata, with their component before each: "unet.",
            "transformer.", "text_encoder.", "text_encoder_2."

Without any of these s is 1, as it is for a component that has no fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import StackError
from .files import check_regular
from .stackschema import MOST_RANK

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
DECLARED = "lora_adapter_metadata"  # diffusers' name for it in a file's metadata
_MOST_ALPHA = 1e6
_ENDING = r"(.*\.)?({})$"  # a pattern has to match the end of a layer's name
# How a name begins that says its component; lora_te: kohya's text encoders, of which no field tells
_COMPONENT = re.compile(r"(unet|transformer|text_encoder\w*)\.|lora_te")
# PEFT's ways to start that also change the checkpoint's own weights, which the file does not hold
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """What a file declares of a component's LoRA; PEFT's fields."""

    source: str  # where it stands, for messages
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def scale(self, layer: str, rank: int) -> float:
        """The factor s of a layer, by its name in its component, whose matrices have this rank.

        Errors: StackError if the layer is declared to have another rank.
        """
        declared = self._value(self.rank_pattern, layer, self.r)
        if declared != rank:
            raise StackError(
                f"{self.source} says that {layer} has rank {declared}, but its matrices have "
                f"{rank}. One of them is wrong: get both files again, from the same place."
            )
        alpha = self._value(self.alpha_pattern, layer, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def _value(pattern: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
        """The value of the first regular expression that matches the end of the layer's name."""
        return next(
            (value for key, value in pattern.items() if re.match(_ENDING.format(key), layer)),
            otherwise,
        )


def lora_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, LoraConfig]:
    """What PEFT or diffusers declared of the LoRA in this file, by component; "" is for all of it.

    Errors: StackError for a declaration that can't be read, or of another kind of adapter.
    """
    beside = path.with_name(CONFIG)
    if path.name == WEIGHTS and beside.exists():
        try:
            check_regular(beside)
            return _configs(str(beside), beside.read_bytes())
        except OSError as error:
            raise StackError(
                f"{beside} can't be read ({error.strerror or error}). It says how strong the LoRA "
                "is: give this user permission to read it."
            ) from None
    if DECLARED in metadata:
        return _configs(f"{path} (its metadata {DECLARED})", metadata[DECLARED])
    return {}


def config_for(tensor: str, configs: Mapping[str, LoraConfig]) -> LoraConfig | None:
    """What is declared for a tensor of this name in the file; None if nothing is.

    A name that does not say its component is the net's.
    """
    if "" in configs:
        return configs[""]
    if said := _COMPONENT.match(tensor):
        return configs.get(said[1] or "")
    return configs.get("unet") or configs.get("transformer")


def _configs(source: str, text: str | bytes) -> dict[str, LoraConfig]:
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise StackError(
            f"{source} is not valid JSON ({error}). It says how strong the LoRA is: get it again."
        ) from None
    components: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        if (said := _COMPONENT.match(key)) and said[1]:
            components.setdefault(said[1], {})[key.removeprefix(said[0])] = value
    return {name: _config(source, one) for name, one in (components or {"": fields}).items()}


def _config(source: str, fields: Mapping[str, Any]) -> LoraConfig:
    """Errors: StackError for a value that can't be, or another kind of adapter."""
    _check_plain(source, fields)
    values = {}
    for name, (default, fits, expected) in _FIELDS.items():
        values[name] = fields.get(name, default)
        if not fits(values[name]):
            raise StackError(
                f"{source} says that {name} is {values[name]!r:.80}; expected {expected}. Get the "
                "file again."
            )
    return LoraConfig(source, **values)


def _check_plain(source: str, fields: Mapping[str, Any]) -> None:
    """Errors: StackError for a kind of adapter that is more than B A."""
    kind, start = fields.get("peft_type", "LORA"), fields.get("init_lora_weights")
    found = None
    if kind != "LORA":
        found = f"a {kind!s:.40}"
    elif fields.get("use_dora"):
        found = "a DoRA, which also rescales the checkpoint's weights"
    elif isinstance(start, str) and start.startswith(_CHANGING_STARTS):
        found = f"a LoRA that began as {start:.40}, which also changed the checkpoint's weights"
    if found:
        raise StackError(
            f"{source} says that this is {found}. Only plain LoRAs can be imported: get it as one."
        )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MOST_ALPHA


def _is_pattern(value: Any, fits: Callable[[Any], bool]) -> bool:
    return (
        isinstance(value, dict) and all(map(_is_simple, value)) and all(map(fits, value.values()))
    )


def _is_simple(layers: str) -> bool:
    """Whether this is a regular expression that takes little time on a layer's name."""
    if (
        len(layers) > 300
        or len(re.findall(r"[*+?{]", layers)) > 3
        or re.search(r"\)[*+?{]", layers)
    ):
        return False
    try:
        re.compile(_ENDING.format(layers))
    except (re.error, RecursionError, OverflowError):
        return False
    return True


_RANKS, _ALPHAS = f"a rank from 1 to {MOST_RANK}", f"a number up to {_MOST_ALPHA:g}"
# default, check and description of each field
_FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "r": (8, _is_rank, _RANKS),
    "lora_alpha": (8, _is_alpha, _ALPHAS),
    "rank_pattern": (
        {},
        lambda value: _is_pattern(value, _is_rank),
        f"{_RANKS} for each of some layers' names (or simple patterns of these)",
    ),
    "alpha_pattern": (
        {},
        lambda value: _is_pattern(value, _is_alpha),
        f"{_ALPHAS} for each of some layers' names (or simple patterns of these)",
    ),
    "use_rslora": (False, lambda value: isinstance(value, bool), "true or false"),
}
