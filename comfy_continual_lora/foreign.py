"""Stage 1: a K/V LoRA or an embedding that another program made -> our adapter and word.

in: a safetensors file with kohya's, diffusers' or PEFT's names - out: an `Adapter` for the
checkpoint's layers; an embedding's vectors. Only changes of cross-attention's K and V can become a
concept: anything else in the file is refused, not dropped.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .adapters.adapter import Adapter
from .adapters.lora import padded_to_rank
from .checkpoint import keys
from .checkpoint.backbone import Backbone
from .errors import SettingError, StackError
from .requests import ImportRequest
from .settings import MOST_VECTORS
from .stack import ConceptRecord

_DOWN = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora.down.weight",
    "_lora.down.weight",
)
_UP = tuple(name.replace("down", "up").replace("lora_A", "lora_B") for name in _DOWN)
_ENDINGS = {
    ending: kind
    for kind, endings in (("down", _DOWN), ("up", _UP), ("alpha", (".alpha",)))
    for ending in endings
}
_PREFIX = re.compile(r"^(lora_unet_|unet\.|base_model\.model\.|diffusion_model\.)+")


def read_lora(path: Path, backbone: Backbone, strength: float = 1.0) -> Adapter:
    """The file's change of the checkpoint's K/V layers, A (r, d_text) and B (d_out, r), zero in
    layers it does not change.

    Errors: StackError for a file that is not a LoRA, changes other layers too, or belongs to
    another kind of checkpoint.
    """
    tensors = _read(path)
    layers = {}
    for layer, ldm in keys.unet_names(backbone.kv_layers).items():
        layers[_plain(layer)] = layers[_plain(ldm)] = layer
    matrices, others = {"down": {}, "up": {}, "alpha": {}}, set()
    for name, tensor in tensors.items():
        ending = next((e for e in _ENDINGS if name.endswith(e)), "")
        layer = layers.get(_plain(name.removesuffix(ending)))
        if not ending or layer is None:
            others.add(name.removesuffix(ending))
        else:
            matrices[_ENDINGS[ending]][layer] = tensor.float()
    downs, ups = matrices["down"], matrices["up"]
    if not any(name.endswith(_DOWN) for name in tensors):
        raise StackError(
            f"{path} is not a LoRA this program can read: it contains no pair of lora_down and "
            "lora_up (or lora_A and lora_B). Choose another file."
        )
    if others:
        raise StackError(
            f"{path} changes {len(others)} layers besides K and V of cross-attention, for example "
            f"{sorted(others)[0]}, which could not be kept. Only K/V LoRAs (Custom Diffusion's "
            "layers) can become a concept."
        )
    if halves := sorted(downs.keys() ^ ups.keys()):
        raise StackError(
            f"{path} is damaged: layers with only one of their two matrices: {len(halves)}, the "
            f"first is {halves[0]}. Get the file again."
        )
    adapter = {}
    for layer, module in backbone.kv_layers.items():
        out, width = module.weight.shape
        down, up = downs.get(layer, torch.zeros(0, width)), ups.get(layer, torch.zeros(out, 0))
        if down.shape[1] != width or len(up) != out:
            raise StackError(
                f"{path} belongs to another kind of checkpoint: its {layer} is {down.shape[1]} by "
                f"{len(up)}, this one's {width} by {out}."
            )
        scale = strength * (
            float(matrices["alpha"].get(layer, len(down))) / len(down) if len(down) else 1.0
        )
        adapter |= {f"{layer}.A": down, f"{layer}.B": up * scale}
    return padded_to_rank(adapter, max(len(down) for down in downs.values()))


def read_word(path: Path, backbone: Backbone) -> Tensor:
    """The vectors of a textual-inversion embedding, (k, d).

    Errors: StackError for a file that is not an embedding, or has another width.
    """
    tensors = _read(path)
    # SDXL's has vectors for each text encoder
    if len(backbone.word_widths) == 2 and tensors.keys() >= {"clip_l", "clip_g"}:
        tensors = {"": torch.cat([tensors["clip_l"], tensors["clip_g"]], -1)}
    vectors = [
        tensor
        for tensor in tensors.values()
        if tensor.dim() in (1, 2) and tensor.shape[-1] == backbone.word_width
    ]
    if len(vectors) != 1 or not 0 < vectors[0].numel() <= MOST_VECTORS * backbone.word_width:
        raise StackError(
            f"{path} is not an embedding for this checkpoint. Expected 1 to {MOST_VECTORS} vectors "
            f"with {backbone.word_width} numbers each."
        )
    return vectors[0].reshape(-1, backbone.word_width).float()


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


def imported_concept(
    backbone: Backbone, request: ImportRequest
) -> tuple[Tensor, Adapter, ConceptRecord]:
    """Word, adapter and record of a concept from another program. Its id is a hash of the file and
    the word.

    Errors: SettingError without embedding and trigger, or with both; StackError as in `read_lora`.
    """
    if bool(request.embedding) == bool(request.trigger):
        raise SettingError(
            "An imported concept needs its word: give either an `embedding` or a `trigger`, not "
            "both."
        )
    if request.embedding:
        word = read_word(request.embedding, backbone)
    else:
        word = word_of_vocabulary(request.trigger, backbone)
    adapter = read_lora(request.lora, backbone, request.strength)
    content = request.lora.read_bytes() + request.token.encode()
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
        settings={},
        with_noun=bool(request.class_noun),
    )
    return word, adapter, record


def _plain(name: str) -> str:
    """A layer's name, spelled the same for all three layouts."""
    return re.sub(r"[._]", "", _PREFIX.sub("", name).replace("processor", ""))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise StackError(f"There is no file {path}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise StackError(
            f"{path} can't be read ({error}): it is truncated or not a safetensors file. Pickles "
            "(.pt, .bin) are not loaded."
        ) from None
