"""Stage 7: the stack -> files everyone can load: one LoRA, and one textual-inversion embedding for each word.

in: a stack - out: in a folder <name>.safetensors (the LoRA, with its trigger words in the metadata), <name>.json and <name>.preview.jpg (A1111's
card), and <token>.safetensors for each word. A LoRA file is never overwritten: web UIs keep old weights and hashes of a name they know.

    kohya       the default: ComfyUI, the A1111 family and diffusers read these names (layers called as in diffusers for SD1.x and SD2.x, as in LDM
                for SDXL, which is what kohya's own programs expect)
    diffusers   PEFT's names behind "unet.", for `load_lora_weights`; ComfyUI ignores this one and the next with no more than a line in its log
    peft        a folder for `PeftModel.from_pretrained(unet, folder)`
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

from .checkpoint import keys
from .errors import StackError
from .lora import Adapter, factored, layers_of
from .store import Base, ConceptStack, write_whole

_PREFIXES = {"diffusers": "unet.", "peft": "base_model.model."}
# modelspec.architecture, ss_base_model_version, and A1111's name of the family
_SPOKEN_OF = {"sd2": ("stable-diffusion-v2-512", "sd_v2", "SD2"), "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "SDXL")}


@dataclass(frozen=True)
class Exported:
    lora: Path | None  # a file, PEFT's a folder; None where the words alone are all there is
    embeddings: list[Path]
    triggers: list[str]  # how prompts name each concept


def kohya_lora(adapter: Adapter, width: int, base: Base) -> dict[str, Tensor]:
    """The adapter under kohya's names, float16; `width` is that of the text features. A full-size change becomes ".diff"."""
    found, layers = {}, layers_of(adapter)
    ldm = keys.unet_names(layers) if base.preset == "sdxl" else {}
    for layer, parts in layers.items():
        name = f"lora_unet_{ldm.get(layer, layer).replace('.', '_')}"
        if "D" in parts:
            found[f"{name}.diff"] = parts["D"]
            continue
        up, down = factored(parts, width)
        found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(float(len(down)))}
    return {key: tensor.half().contiguous() for key, tensor in found.items()}


def plain_lora(adapter: Adapter, width: int, prefix: str) -> dict[str, Tensor]:
    """The adapter under PEFT's names with `prefix` before each, float16. Errors: StackError for a full-size change, which has no name there."""
    found = {}
    for layer, parts in layers_of(adapter).items():
        if "D" in parts:
            raise StackError("All of K and V was learned (custom_diffusion), which is no LoRA: only kohya's format can hold it. Leave --format out.")
        up, down = factored(parts, width)
        found |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
    return {key: tensor.half().contiguous() for key, tensor in found.items()}


def stock_lora(stack: ConceptStack, format: str = "kohya") -> dict[str, Tensor]:
    """The stack's adapter as other programs name it; empty where the words alone are all there is. Text features are as wide as a word's vector."""
    if not stack.adapter:
        return {}
    width = next(iter(stack.words.values())).shape[1]
    return kohya_lora(stack.adapter, width, stack.base) if format == "kohya" else plain_lora(stack.adapter, width, _PREFIXES[format])


def embedding(word: Tensor, base: Base) -> dict[str, Tensor]:
    """A word's vectors as a textual inversion, float16: one (k, d), or one for each of SDXL's text encoders."""
    if len(base.word_widths) == 2:
        return {name: part.half().clone() for name, part in zip(("clip_l", "clip_g"), word.split(list(base.word_widths), 1), strict=True)}
    return {"emb_params": word.half()}


def export_files(stack: ConceptStack, out: Path, embeddings: Path, stem: str, format: str = "kohya") -> Exported:
    """Write the files; the LoRA's name ends in a hash of its weights. Errors: StackError for an empty stack or a folder that can't be written."""
    if not stack.records:
        raise StackError("The stack holds no concept, so there is nothing to export. Learn one first.")
    triggers, tensors = [record.name for record in stack.records], stock_lora(stack, format)
    try:
        for folder in (out, embeddings):
            folder.mkdir(parents=True, exist_ok=True)
        words = []
        for record in stack.records:
            words.append(embeddings / f"{record.token}.safetensors")
            write_whole(words[-1], save(embedding(stack.words[record.id], stack.base)))
        lora = _write_lora(stack, tensors, out, stem, triggers, format) if tensors else None
    except OSError as error:
        raise StackError(f"The export to {out} failed ({error.strerror or error}): no room or no permission there. The stack is unchanged.") from None
    return Exported(lora, words, triggers)


def _write_lora(stack: ConceptStack, tensors: dict[str, Tensor], out: Path, stem: str, triggers: list[str], format: str) -> Path:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    name = f"{stem}-{len(stack.records)}-concepts-{digest.hexdigest()[:8]}"
    rank, preset, v = str(stack.rank), stack.base.preset, stack.base.prediction == "v_prediction"
    architecture, version, card_version = _SPOKEN_OF.get(preset, ("stable-diffusion-v1", "sd_v1", "SD1"))
    if preset == "sd2" and v:
        architecture, version = "stable-diffusion-v2-768-v", "sd_v2_v"
    metadata = {
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{architecture}/lora", "modelspec.implementation": "comfy-continual-lora",
        "modelspec.title": name, "modelspec.trigger_phrase": ", ".join(triggers), "ss_output_name": name, "ss_base_model_version": version,
        "ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank,
        "ss_tag_frequency": json.dumps({"concepts": dict.fromkeys(triggers, 1)}),
        **({"ss_v2": "True"} if preset == "sd2" else {}), **({"modelspec.prediction_type": "v"} if v else {}),
    }  # fmt: skip
    if format == "peft":
        layers, folder = list(layers_of(stack.adapter or {})), out / name
        LoraConfig(r=stack.rank or 0, lora_alpha=stack.rank or 0, target_modules=layers).save_pretrained(str(folder))
        write_whole(folder / "adapter_model.safetensors", save(tensors, metadata))
        return folder
    path = out / f"{name}.safetensors"
    write_whole(path, save(tensors, metadata))
    if format == "kohya":
        card = {"description": "", "sd version": card_version, "activation text": ", ".join(triggers), "preferred weight": 1.0, "notes": ""}
        write_whole(out / f"{name}.json", json.dumps(card, indent=1).encode())
        if preview := stack.records[-1].preview:
            write_whole(out / f"{name}.preview.jpg", base64.b64decode(preview))
    return path
