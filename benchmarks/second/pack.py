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
from comfy_continual_lora.mini.parts import tokenizer
from comfy_continual_lora.mini.weights import METADATA, VOCABULARY, whole_table

_TABLE = "text_model.embeddings.token_embedding.weight"


def write_checkpoint(out: Path) -> None:
    """Write OUT/second.safetensors and OUT/clip."""
    clip = _trained_clip(out, "clip")
    state = _pictures(out, "unet") | {
        keys.TEXT_PREFIX + name.removeprefix("text_model."): value
        for name, value in clip.items()
        if name.startswith("text_model.")
    }
    _save(state, out / "second.safetensors", "second miniature")
    model = nets.new_clip(VOCABULARY)
    model.load_state_dict(clip)
    model.save_pretrained(out / "clip")
    tokenizer().save_pretrained(out / "clip")


def write_twin(out: Path) -> None:
    """Write OUT/twin.safetensors, in SDXL's layout; it predicts v."""
    first, second = _trained_clip(out, "clip"), _openclip(_trained_clip(out, "clip2"))
    state = _pictures(out, "unet2") | {
        f"conditioner.embedders.0.transformer.{name}": value
        for name, value in first.items()
        if name.startswith("text_model.")
    }
    state |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    state["v_pred"] = torch.zeros(0)
    _save(state, out / "twin.safetensors", "second miniature, like SDXL")


def _pictures(out: Path, name: str) -> dict[str, Tensor]:
    """The U-Net of this name and the autoencoder, as files name their weights."""
    unet, vae = load_file(out / f"{name}.safetensors"), load_file(out / "autoencoder.safetensors")
    state = {keys.UNET_PREFIX + ldm: unet[ours] for ours, ldm in keys.unet_names(unet).items()}
    return state | {keys.VAE_PREFIX + ldm: vae[ours] for ours, ldm in keys.vae_names(vae).items()}


def _trained_clip(out: Path, name: str) -> dict[str, Tensor]:
    """With vectors for all tokens."""
    clip = load_file(out / f"{name}.safetensors")
    clip[_TABLE] = whole_table(clip[_TABLE], nets.Vocabulary().tokens)
    return clip


def _save(state: dict[str, Tensor], path: Path, title: str) -> None:
    halves = {name: value.half().contiguous() for name, value in state.items()}
    # it is learned on with the mini-SD's presets
    save_file(halves, path, {**METADATA, "modelspec.title": title})


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
