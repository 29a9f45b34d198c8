"""Read a net's configuration from the shapes of its weights: no configuration file is needed, and
nets of any width and depth are understood.

in: {LDM name: shape}, without the part's prefix - out: keyword arguments of the diffusers or
transformers class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """SD1.x: 8 heads at every level, convolutional projections around the transformers.

    SD2.x and SDXL: heads of 64, linear projections.
    """
    channels, attention, depths, resnets, first = [], [], [], 0, 0
    count = _count(shapes, r"input_blocks\.(\d+)\.")
    for index in range(1, count):
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            first, resnets = first or resnets, 0
            continue
        if resnets == 0:
            channels.append(shapes[f"{block}.0.out_layers.3.weight"][0])
            attention.append(f"{block}.1.proj_in.weight" in shapes)
            depths.append(max(1, _count(shapes, rf"{block}\.1\.transformer_blocks\.(\d+)\.")))
        resnets += 1
    context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    linear = next(
        len(shape) == 2 for name, shape in shapes.items() if name.endswith("1.proj_in.weight")
    )
    config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": tuple(channels),
        "layers_per_block": first or resnets,
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention
        ),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)
        ),
        "cross_attention_dim": context,
        # the number of heads, despite diffusers' name for it
        "attention_head_dim": tuple(max(1, c // 64) for c in channels) if linear else 8,
    }
    if linear:
        config |= {"use_linear_projection": True, "transformer_layers_per_block": tuple(depths)}
    if added := shapes.get("label_emb.0.0.weight"):
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": added[1],
        }
    return config


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """A KL autoencoder's, without the scale of its latents, which no shape says."""
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    blocks = _count(shapes, r"encoder\.down\.0\.block\.(\d+)\.")
    return {
        "block_out_channels": tuple(
            shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)
        ),
        "layers_per_block": blocks,
        "latent_channels": shapes["post_quant_conv.weight"][1],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def text_config(shapes: Shapes) -> dict[str, Any]:
    """OpenAI's CLIP text tower, with its quick GELU."""
    layers = _count(shapes, r"encoder\.layers\.(\d+)\.")
    mlp = shapes["encoder.layers.0.mlp.fc1.weight"]
    return _text_config(
        shapes["embeddings.token_embedding.weight"],
        shapes["embeddings.position_embedding.weight"],
        mlp,
        layers,
    )


def openclip_config(shapes: Shapes) -> dict[str, Any]:
    """OpenCLIP's text tower, with the exact GELU."""
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    mlp = shapes["transformer.resblocks.0.mlp.c_fc.weight"]
    config = _text_config(
        shapes["token_embedding.weight"], shapes["positional_embedding"], mlp, layers
    )
    return {**config, "hidden_act": "gelu", "projection_dim": shapes.get("text_projection", mlp)[1]}


def _text_config(
    table: tuple[int, ...], positions: tuple[int, ...], mlp: tuple[int, ...], layers: int
) -> dict[str, Any]:
    """Heads of 64."""
    vocabulary, width = table
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp[0],
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": positions[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers there are in the names, which begin at 0."""
    return len({int(m[1]) for name in shapes if (m := re.match(pattern, name))})
