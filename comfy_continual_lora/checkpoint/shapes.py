"""Read a net's configuration off the shapes of its weights: no configuration file is asked for, and a net of any width or depth is understood.

in: {LDM name: shape}, without the part's prefix - out: keyword arguments of the diffusers or transformers class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """SD1.x: 8 heads at every level, convolutional projections around the transformers."""
    channels, attention, resnets, first = [], [], 0, 0
    count = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"input_blocks\.(\d+)\.", name)))
    for index in range(1, count):
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            first, resnets = first or resnets, 0
            continue
        if resnets == 0:
            channels.append(shapes[f"{block}.0.out_layers.3.weight"][0])
            attention.append(f"{block}.1.proj_in.weight" in shapes)
        resnets += 1
    context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": tuple(channels),
        "layers_per_block": first or resnets,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "cross_attention_dim": context,
        "attention_head_dim": 8,
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    levels = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"encoder\.down\.(\d+)\.", name)))
    blocks = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name)))
    return {
        "block_out_channels": tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)),
        "layers_per_block": blocks,
        "latent_channels": shapes["post_quant_conv.weight"][1],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "scaling_factor": 0.18215,
    }


def text_config(shapes: Shapes) -> dict[str, Any]:
    """CLIP text tower: heads of 64, quick GELU, as OpenAI's."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": 1 + max(int(m[1]) for name in shapes if (m := re.match(r"encoder\.layers\.(\d+)\.", name))),
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
