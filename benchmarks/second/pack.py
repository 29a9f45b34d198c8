"""The trained parts of the second miniature -> checkpoints in SD1.x's and SDXL's layout, float16, and
its CLIP as transformers saves it.
"""

from __future__ import annotations

from pathlib import Path

import nets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_continual_lora.checkpoint import keys
from comfy_continual_lora.checkpoint.single_file import MINI_ARCHITECTURE
from comfy_continual_lora.mini.parts import tokenizer
from comfy_continual_lora.mini.weights import VOCABULARY

_TABLE = "text_model.embeddings.token_embedding.weight"
_METADATA = {
    "format": "pt",
    "modelspec.architecture": MINI_ARCHITECTURE,  # it is learned on with the mini-SD's presets
    "modelspec.resolution": "128x128",
    "modelspec.title": "second miniature",
}


def write_checkpoint(out: Path) -> None:
    """Write OUT/second.safetensors and OUT/clip."""
    names = ("unet", "autoencoder", "clip")
    unet, vae, clip = (load_file(out / f"{name}.safetensors") for name in names)
    clip[_TABLE] = _whole_table(clip[_TABLE])
    state = {keys.UNET_PREFIX + ldm: unet[name] for name, ldm in keys.unet_names(unet).items()}
    state |= {keys.VAE_PREFIX + ldm: vae[name] for name, ldm in keys.vae_names(vae).items()}
    state |= {
        keys.TEXT_PREFIX + name.removeprefix("text_model."): value
        for name, value in clip.items()
        if name.startswith("text_model.")
    }
    halves = {name: value.half().contiguous() for name, value in state.items()}
    save_file(halves, out / "second.safetensors", _METADATA)
    model = nets.new_clip(VOCABULARY)
    model.load_state_dict(clip)
    model.save_pretrained(out / "clip")
    tokenizer().save_pretrained(out / "clip")


def write_twin(out: Path) -> None:
    """Write OUT/twin.safetensors, in SDXL's layout; it predicts v."""
    names = ("unet2", "autoencoder", "clip", "clip2")
    unet, vae, first, second = (load_file(out / f"{name}.safetensors") for name in names)
    state = {keys.UNET_PREFIX + ldm: unet[name] for name, ldm in keys.unet_names(unet).items()}
    state |= {keys.VAE_PREFIX + ldm: vae[name] for name, ldm in keys.vae_names(vae).items()}
    for clip in (first, second):
        clip[_TABLE] = _whole_table(clip[_TABLE])
    state |= {
        f"conditioner.embedders.0.transformer.{name}": value
        for name, value in first.items()
        if name.startswith("text_model.")
    }
    state |= {f"conditioner.embedders.1.model.{name}": v for name, v in _openclip(second).items()}
    state["v_pred"] = torch.zeros(0)
    halves = {name: value.half().contiguous() for name, value in state.items()}
    metadata = {**_METADATA, "modelspec.title": "second miniature, like SDXL"}
    save_file(halves, out / "twin.safetensors", metadata)


def _openclip(clip: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text tower as OpenCLIP names its weights, q, k and v one below the other."""
    text = {name: v for name, v in clip.items() if name.startswith(("text_model.", "text_proj"))}
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, ldm in keys.openclip_names(text).items():
        if ".attn.in_proj_" in ldm:
            parts.setdefault(ldm, {})[name.rsplit(".", 2)[-2]] = text[name]
        else:
            found[ldm] = text[name]
    order = ("q_proj", "k_proj", "v_proj")
    found |= {ldm: torch.cat([own[one] for one in order]) for ldm, own in parts.items()}
    found["text_projection"] = found["text_projection"].T
    return found


def _whole_table(rows: Tensor) -> Tensor:
    """The vectors of all tokens; those the world does not use get random ones like the others'."""
    drawn = torch.randn(VOCABULARY, rows.shape[1], generator=torch.Generator().manual_seed(0))
    table = rows.mean(0) + rows.std(0) * drawn
    table[nets.Vocabulary().tokens] = rows
    return table
