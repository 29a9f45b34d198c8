"""Stage 1: a K/V LoRA or an embedding that another program made -> our adapter and word.

in: a safetensors file with kohya's, diffusers' or PEFT's names - out: an `Adapter` for the
checkpoint's layers, as strong as the file says (`loraconfig`); an embedding's vectors. Only changes
of cross-attention's K and V can become a concept: anything else in the file is refused, or left out
or kept in a file of its own, as `rest` says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from .adapters.adapter import Adapter
from .adapters.lora import padded_to_rank
from .checkpoint import keys
from .checkpoint.backbone import Backbone
from .errors import SettingError, StackError
from .loraconfig import lora_configs
from .lorafile import (
    DOWN,
    FLOATS,
    Layer,
    Rest,
    check_values,
    clip_skip_of,
    described,
    lora_file,
    plain,
    read,
    rest_of,
    scale,
    split_name,
)
from .presets import CLIP_SKIP_PRESETS, PLAIN_NAME_PRESETS
from .requests import ImportRequest
from .settings import MOST_VECTORS
from .stack import ConceptRecord, ConceptStack
from .stackschema import MOST_RANK

# What other kinds of adapters add to a layer's name, as patterns
_OTHER_KINDS = {
    "dora_scale": "a DoRA",
    "lora_magnitude": "a DoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "lora_mid": "a LoCon with a third matrix",
    r"_custom_diffusion\.": "Custom Diffusion's full-size weights",
    r"\.diff(_b)?$": "a full-size change of the weight",
}


def read_lora(path: Path, backbone: Backbone, strength: float = 1.0) -> Adapter:
    """As `read_parts`, of a file that changes K and V alone. Errors: StackError if it doesn't, too."""
    adapter, rest = read_parts(path, backbone, strength)
    if rest:
        raise StackError(
            f"{lora_file(path)} changes {rest.described()}, for example {rest.example}. That can't "
            "become part of a concept: give `rest` drop, to leave it out, or keep, to have it in a LoRA "
            "file of its own; or choose a LoRA of K and V alone (Custom Diffusion's layers)."
        )
    return adapter


def read_parts(
    path: Path, backbone: Backbone, strength: float = 1.0
) -> tuple[Adapter, Rest | None]:
    """The change of the checkpoint's K/V layers in a file or PEFT's folder, A (r, d_text) and
    B (d_out, r), zero in layers it does not change; and what else it changes.

    Errors: StackError for a file that is not a LoRA, is broken, changes nothing of K and V, or
    belongs to another kind of checkpoint.
    """
    path = lora_file(path)
    tensors, metadata = read(path)
    layers, others = _layers_in(path, tensors, backbone)
    configs = lora_configs(path, metadata)
    adapter, rank = {}, 1
    for layer, module in backbone.kv_layers.items():
        out, width = module.weight.shape
        down, up = torch.zeros(0, width), torch.zeros(out, 0)
        if found := layers.get(layer):
            down, up = _matrices(path, found, out, width)
            up = up * (strength * scale(path, found, len(down), configs))
            check_values(f"{path}: {found.names['up']} at `strength` {strength:g}", up)
        if down.any() and up.any():
            rank = max(rank, len(down))
            adapter |= {f"{layer}.A": down, f"{layer}.B": up}
        else:
            adapter |= {f"{layer}.A": down[:0], f"{layer}.B": up[:, :0]}
    if not any(len(tensor) for name, tensor in adapter.items() if name.endswith(".A")):
        raise StackError(
            f"{path} at `strength` {strength:g} changes nothing of K and V of cross-attention: every "
            "product of matrices and alpha is 0, or they are not there. Choose another file, or "
            "another strength."
        )
    rest = rest_of(path, others, layers.values(), configs, metadata) if others else None
    return padded_to_rank(adapter, rank), rest


def _layers_in(
    path: Path, tensors: Mapping[str, Tensor], backbone: Backbone
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The file's tensors by the checkpoint's layer, and its others.

    Errors: StackError for tensors that are no part of a LoRA, or are missing for one.
    """
    known = {}
    for layer, original in keys.original_kv_names(backbone.preset, backbone.kv_layers).items():
        known[plain(layer)] = known[plain(original)] = layer
    layers: dict[str, Layer] = {}
    others = {}
    for name, tensor in tensors.items():
        start, kind = split_name(name)
        layer = known.get(plain(start))
        if not kind or layer is None:
            others[name] = tensor
            continue
        found = layers.setdefault(layer, Layer(start))
        if kind in found.tensors:
            raise StackError(
                f"{path} has two tensors for the same matrix of {layer}: {found.names[kind]} and "
                f"{name}. Get the file again, in one layout."
            )
        found.tensors[kind], found.names[kind] = tensor, name
    _check_plain(path, [name for name in others if plain(name).startswith(tuple(known))])
    if not any(name.endswith(DOWN) for name in tensors):
        raise StackError(
            f"{path} is not a LoRA this program can read: it contains no pair of lora_down and "
            "lora_up (or lora_A and lora_B). Choose another file."
        )
    halves = [layer for layer, one in layers.items() if not one.tensors.keys() >= {"down", "up"}]
    if halves:
        raise StackError(
            f"{path} is damaged: layers with only one of their two matrices: {len(halves)}, the "
            f"first is {min(halves)}. Get the file again."
        )
    return layers, others


def _check_plain(path: Path, names: Sequence[str]) -> None:
    """Errors: StackError if K/V layers have these tensors besides a plain LoRA's."""
    if names:
        name = min(names)
        kinds = (kind for pattern, kind in _OTHER_KINDS.items() if re.search(pattern, name))
        kind = next(kinds, "another kind")
        raise StackError(
            f"{path} is not a plain LoRA: its tensor {name} belongs to {kind}. Expected lora_down "
            "and lora_up (or lora_A and lora_B), and alpha. Get it as a plain LoRA."
        )


def _matrices(path: Path, layer: Layer, out: int, width: int) -> tuple[Tensor, Tensor]:
    """A layer's A (r, d_text) and B (d_out, r), float32.

    Errors: StackError for tensors that are no matrices, don't fit, or have values out of range.
    """
    found = {}
    for kind in ("down", "up"):
        tensor, name = layer.tensors[kind], layer.names[kind]
        if tensor.dim() == 4 and tensor.shape[2:] == (1, 1):  # as some programs store all layers
            tensor = tensor.flatten(1)
        if tensor.dim() != 2 or tensor.dtype not in FLOATS:
            raise StackError(
                f"{path}: its tensor {name} is {described(layer.tensors[kind])}; expected a "
                "matrix of floating-point numbers. Get the file again, not quantised."
            )
        found[kind] = tensor.float()
        check_values(f"{path}: its tensor {name}", found[kind])
    down, up = found["down"], found["up"]
    if down.shape[1] != width or len(up) != out:
        raise StackError(
            f"{path} belongs to another kind of checkpoint: its {layer.name} is {down.shape[1]} by "
            f"{len(up)}, this one's {width} by {out}."
        )
    rank = len(down)
    if rank != up.shape[1] or not 1 <= rank <= MOST_RANK:
        raise StackError(
            f"{path} is damaged: {layer.names['down']} has {rank} rows and {layer.names['up']} "
            f"{up.shape[1]} columns; both have to be the rank, from 1 to {MOST_RANK}. Get the "
            "file again."
        )
    return down, up


def read_word(path: Path, backbone: Backbone) -> Tensor:
    """The vectors of a textual-inversion embedding, (k, d).

    Errors: StackError for a file that is not an embedding, has another width, or values out of
    range.
    """
    tensors, _ = read(path)
    names = ("clip_l", "clip_g") if len(backbone.word_widths) == 2 else tuple(tensors)[:1]
    widths = dict(zip(names, backbone.word_widths, strict=False))
    fits = tensors.keys() == widths.keys() and all(
        tensor.dim() in (1, 2) and tensor.shape[-1] == widths[name] and tensor.dtype in FLOATS
        for name, tensor in tensors.items()
    )
    parts = [torch.atleast_2d(tensors[name]).float() for name in widths] if fits else []
    counts = {len(part) for part in parts}
    if len(counts) != 1 or not 1 <= counts.pop() <= MOST_VECTORS:
        found = ", ".join(f"{name} ({described(t)})" for name, t in sorted(tensors.items())[:4])
        expected = " and ".join(
            f"{width} numbers each" + f" in {name}" * (len(widths) > 1)
            for name, width in widths.items()
        )
        raise StackError(
            f"{path} is not an embedding for this checkpoint. Expected 1 to {MOST_VECTORS} vectors "
            f"with {expected}; found {found or 'nothing'}. Choose one that was made for this kind "
            "of checkpoint."
        )
    for name, part in zip(widths, parts, strict=True):
        check_values(f"{path}: its tensor {name}", part)
    return torch.cat(parts, 1)


def word_of_vocabulary(trigger: str, backbone: Backbone) -> Tensor:
    """The vector of a word the tokenizer knows, (1, d).

    Errors: StackError for a trigger that is several tokens.
    """
    if (word := backbone.word_of_vocabulary(trigger)) is None:
        raise StackError(
            f"The trigger {trigger!r} is several tokens, but has to be one. Give the class noun "
            "separately, or an `embedding` instead."
        )
    return word


@dataclass
class Imported:
    """A concept from another program; `rest` is what of its file is no part of it."""

    word: Tensor
    adapter: Adapter
    record: ConceptRecord
    rest: Rest | None
    clip_skip: int = 1  # that its file says it was trained with


def imported_concept(backbone: Backbone, request: ImportRequest) -> Imported:
    """The concept that a request names. Its id is a hash of the file and the word.

    Errors: StackError as in `read_lora` and `read_word`.
    """
    word = _word(backbone, request)
    if request.rest == "refuse":
        adapter, rest = read_lora(request.lora, backbone, request.strength), None
    else:
        adapter, rest = read_parts(request.lora, backbone, request.strength)
    content = lora_file(request.lora).read_bytes() + request.token.encode()
    record = ConceptRecord(
        id=hashlib.sha256(content).hexdigest()[:12],
        token=request.token,
        noun=request.class_noun,
        method="import",
        images=0,
        steps=0,
        seed=0,
        prompts=[],
        hashes=[],
        learned=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        loss=0.0,
        preview="",
        settings={"strength": request.strength},
        with_noun=bool(request.class_noun),
    )
    takes_clip_skip = backbone.preset in CLIP_SKIP_PRESETS
    clip_skip = clip_skip_of(request.lora) if takes_clip_skip else 1
    return Imported(word, adapter, record, rest, clip_skip)


def check_word(request: ImportRequest, preset: str) -> None:
    """Errors: SettingError without embedding and trigger, or with both; where names are plain text,
    for an embedding, and for a trigger that is another word than the token.
    """
    if preset in PLAIN_NAME_PRESETS:
        trigger = request.trigger or request.token
        if request.embedding or trigger.lower() != request.token.lower():
            raise SettingError(
                f"On {request.checkpoint.name} a concept's name is plain text, the word its LoRA's "
                "prompts always used, and has no embedding. Give that word as `token`, and neither a "
                "`trigger` nor an `embedding`."
            )
    elif bool(request.embedding) == bool(request.trigger):
        raise SettingError(
            "An imported concept needs its word: give either an `embedding` or a `trigger`, not "
            "both."
        )


def _word(backbone: Backbone, request: ImportRequest) -> Tensor:
    """The vectors of an imported concept's word, (k, d); of plain text, none."""
    if backbone.preset in PLAIN_NAME_PRESETS:
        return torch.zeros(0, backbone.word_width)
    if request.embedding:
        return read_word(request.embedding, backbone)
    return word_of_vocabulary(request.trigger, backbone)


def check_same(known: ConceptRecord, word: Tensor, again: Imported, request: ImportRequest) -> None:
    """`word`: the vectors of the known concept.

    Errors: StackError if this file and token are on the stack at another strength, with another noun
    or from another word.
    """
    name, before = known.name, known.settings.get("strength")  # early versions didn't store it
    if isinstance(before, (int, float)) and before != request.strength:
        name, asked = f"{name} at `strength` {before:g}", f"at {request.strength:g}"
    elif known.noun != again.record.noun:
        asked = f"with the `noun` {again.record.noun}" if again.record.noun else "without a `noun`"
    elif not _is_same_word(word, again.word):
        name = f"{name} from another word"
        asked = "from this `embedding`" if request.embedding else "from this `trigger`"
    else:
        return
    raise StackError(
        f"{request.lora} is on the stack already, as {name}, so it was not imported {asked}. Forget "
        f"{known.token} first, or give another `token`."
    )


def check_shared(stack: ConceptStack, other: ConceptStack, path: Path) -> None:
    """`path`: the other stack's file.

    Errors: StackError if both imported the same file and token, but at another strength, with another
    noun or from another word: only one of them would be on the merged stack.
    """
    known = {record.id: record for record in stack.records if record.method == "import"}
    for record in other.records:
        if (own := known.get(record.id)) is None:
            continue
        here, there = own.settings.get("strength"), record.settings.get("strength")
        if None in (here, there):  # early versions didn't store it
            here = there
        is_same_word = _is_same_word(stack.words[own.id], other.words[record.id])
        if (here, own.noun) == (there, record.noun) and is_same_word:
            continue
        names = [
            name if strength is None else f"{name} at `strength` {strength:g}"
            for name, strength in ((record.name, there), (own.name, here))
        ]
        word = "" if is_same_word else ", from another word"
        raise StackError(
            f"{path} has {names[0]}, which this stack has from the same LoRA as {names[1]}{word}. "
            f"Forget {record.token} on one of them (`forget`); to have both, import the LoRA here with "
            "another `token`."
        )


def _is_same_word(one: Tensor, other: Tensor) -> bool:
    """Whether these vectors are the same, but for the precision that a checkpoint is loaded in."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.01, atol=1e-6)
