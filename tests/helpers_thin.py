"""A thin mini-SD: the layers, names and metadata of the mini-SD at other widths, with random weights.
For tests that ask what a program does with a checkpoint, not what the checkpoint draws.

At a fifth of the mini-SD's widths, which is the default, it learns in a quarter of the time. At
`STOCK`'s it is what Forge and its family take for an SD1.x: half the file of the mini-SD at SD1.x'
widths, and a fifth of its U-Net.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from comfy_continual_lora.checkpoint import keys
from comfy_continual_lora.checkpoint.single_file import MINI_ARCHITECTURE
from comfy_continual_lora.mini.parts import new_unet
from comfy_continual_lora.mini.weights import checkpoint_state

TEXT_WIDTH, TEXT_LAYERS, CHANNELS = 64, 2, (32, 64)
STOCK = 768, 12, (320, 320)


def write_thin(
    path: Path,
    text_width: int = TEXT_WIDTH,
    text_layers: int = TEXT_LAYERS,
    channels: tuple[int, int] = CHANNELS,
    factors: Mapping[str, float] | None = None,
) -> None:
    """Write the thin mini-SD, the same at every call; `factors`, by layer of the U-Net, are what its
    weights are multiplied by.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(
        {**new_unet().config, "block_out_channels": channels, "cross_attention_dim": text_width}
    )
    for name, factor in (factors or {}).items():
        unet.get_submodule(name).weight.data *= factor
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=text_width // 64,
            vocab_size=49408,
            bos_token_id=49406,
            eos_token_id=49407,
            initializer_factor=5.0,
        )
    )
    text_state = {k.removeprefix("text_model."): t for k, t in text.state_dict().items()}
    # the average of trained text features is not 0, and Forge Neo divides by it
    text_state["final_layer_norm.bias"] += 0.1
    state = {k: t for k, t in checkpoint_state().items() if k.startswith(keys.VAE_PREFIX)}
    for prefix, names, own in (
        (keys.UNET_PREFIX, keys.unet_names, unet.state_dict()),
        (keys.TEXT_PREFIX, keys.text_names, text_state),
    ):
        ldm = names(own)
        state |= {prefix + ldm[name]: tensor.half() for name, tensor in own.items() if name in ldm}
    save_file(
        state,
        path,
        {
            "format": "pt",
            "modelspec.architecture": MINI_ARCHITECTURE,
            "modelspec.resolution": "128x128",
        },
    )
