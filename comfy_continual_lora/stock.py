"""Stage 7: the stack's weights under the names that other programs read, and its metadata.

in: a stack - out: {name: float16 tensor} of its LoRA and of each embedding, a LoRA file's metadata,
and A1111's card.

    kohya       the default: ComfyUI, the A1111 family and diffusers read these names (layers called
                as in diffusers for SD1.x and SD2.x, as in LDM for SDXL, as kohya's own programs
                expect; as in the original for Anima)
    diffusers   PEFT's names after "unet." (Anima: "transformer."), for `load_lora_weights`; ComfyUI
                ignores these and peft's with only a line in its log
    peft        for `PeftModel.from_pretrained(unet, folder)`
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .adapters.adapter import Adapter, factored, layers_of
from .checkpoint import keys
from .errors import StackError
from .files import CLIP_SKIP
from .stack import CheckpointInfo, ConceptStack

_PREFIXES = {"diffusers": "unet.", "peft": "base_model.model."}
# modelspec.architecture, ss_base_model_version (of Anima: sd-scripts' anima_train_network.py), and the
# family as web UIs call it: A1111's names, and for Anima that of Forge Neo's preset
# (modules_forge/presets.py), by which Neo filters LoRAs
_SD1 = ("stable-diffusion-v1", "sd_v1", "SD1")
_FAMILIES = {
    "sd2": ("stable-diffusion-v2-512", "sd_v2", "SD2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "SDXL"),
    "anima": ("anima-preview", "anima", "anima"),
}


def kohya_lora(adapter: Adapter, width: int, base: CheckpointInfo) -> dict[str, Tensor]:
    """The adapter under kohya's names, float16; `width` is that of the text features.

    A full-size change of a weight becomes ".diff".
    """
    tensors = {}
    layers = layers_of(adapter)
    is_renamed = base.preset in ("sdxl", "anima")
    original = keys.original_kv_names(base.preset, layers) if is_renamed else {}
    for layer, parts in layers.items():
        name = f"lora_unet_{original.get(layer, layer).replace('.', '_')}"
        if "D" in parts:
            tensors[f"{name}.diff"] = parts["D"]
            continue
        up, down = factored(parts, width)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(float(len(down))),
        }
    return _halved(tensors)


def plain_lora(adapter: Adapter, width: int, prefix: str) -> dict[str, Tensor]:
    """The adapter under PEFT's names with `prefix` before each, float16.

    Errors: StackError for a full-size change of a weight, which has no name there.
    """
    tensors = {}
    for layer, parts in layers_of(adapter).items():
        if "D" in parts:
            raise StackError(
                "The whole of K and V was learned (custom_diffusion), which is not a LoRA: only "
                "kohya's format can hold it. Leave `format` out."
            )
        up, down = factored(parts, width)
        tensors |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
    return _halved(tensors)


def _halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float16. Errors: StackError for values that have no place in it."""
    halved = {key: tensor.half().contiguous() for key, tensor in tensors.items()}
    if bad := next((key for key, tensor in halved.items() if not tensor.isfinite().all()), None):
        raise StackError(
            f"{bad} has values above {torch.finfo(torch.float16).max:g}, the largest that other "
            "programs' files (float16) hold, so nothing was exported. Learn that concept again at a "
            "lower `rate`."
        )
    return halved


def rank_in(tensors: Mapping[str, Tensor]) -> int | None:
    """The rank of a LoRA under other programs' names; None for a full-size change.

    It is the matrices' own: solving for several concepts may have raised the rank they were
    learned with.
    """
    downs = (t for key, t in tensors.items() if key.endswith(("lora_down.weight", "lora_A.weight")))
    return next((len(down) for down in downs), None)


def stock_lora(stack: ConceptStack, format: str = "kohya") -> dict[str, Tensor]:
    """The stack's adapter as other programs name it; empty for a stack of words alone.

    Errors: StackError as in `plain_lora`.
    """
    if not stack.adapter:
        return {}
    # text features are as wide as a word's vector
    width = next(iter(stack.words.values())).shape[1]
    if format == "kohya":
        return kohya_lora(stack.adapter, width, stack.checkpoint)
    is_transformer = format == "diffusers" and stack.checkpoint.preset == "anima"
    return plain_lora(stack.adapter, width, "transformer." if is_transformer else _PREFIXES[format])


def embedding(word: Tensor, base: CheckpointInfo) -> dict[str, Tensor]:
    """A word's vectors as a textual inversion, float16: one tensor (k, d), or SDXL's two."""
    if len(base.word_widths) == 2:
        clip_l, clip_g = word.split(list(base.word_widths), 1)
        return _halved({"clip_l": clip_l, "clip_g": clip_g})
    return _halved({"emb_params": word})


def card(stack: ConceptStack, triggers: list[str]) -> dict[str, bytes]:
    """The files beside a LoRA that A1111 shows, {ending of the name: content}."""
    version = _FAMILIES.get(stack.checkpoint.preset, _SD1)[2]
    card = {
        "description": "",
        "sd version": version,
        "activation text": ", ".join(triggers),
        "preferred weight": 1.0,
        "notes": "",
    }
    files = {".json": json.dumps(card, indent=1).encode()}
    picture = base64.b64decode(stack.records[-1].preview)
    return {**files, ".preview.jpg": picture} if picture.startswith(b"\xff\xd8") else files


def metadata_of(
    stack: ConceptStack, name: str, triggers: list[str], rank: int | None
) -> dict[str, str]:
    """What web UIs, kohya's programs and model sites read from a LoRA's file."""
    preset = stack.checkpoint.preset
    predicts_v = stack.checkpoint.prediction == "v_prediction"
    architecture, version, _ = _FAMILIES.get(preset, _SD1)
    if preset == "sd2" and predicts_v:
        architecture, version = "stable-diffusion-v2-768-v", "sd_v2_v"
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "comfy-continual-lora",
        "modelspec.title": name,
        "modelspec.trigger_phrase": ", ".join(triggers),
        "ss_output_name": name,
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora_anima" if preset == "anima" else "networks.lora",
        "ss_tag_frequency": json.dumps({"concepts": dict.fromkeys(triggers, 1)}),
    }
    if rank is not None:
        metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    if preset == "sd2":
        metadata["ss_v2"] = "True"
    if stack.checkpoint.prediction != "epsilon":
        predicted = stack.checkpoint.prediction.removesuffix("_prediction")
        metadata["modelspec.prediction_type"] = predicted
    if stack.checkpoint.clip_skip != 1:
        metadata[CLIP_SKIP] = str(stack.checkpoint.clip_skip)
    return metadata
