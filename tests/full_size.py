"""A full-size SD1.5 with random weights, in the single-file layout people own: 859 M + 84 M + 123 M weights, 2.1 GB in float16. Sizes of others."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from comfy_continual_lora.checkpoint import keys

SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SD15_UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
SD21_UNET = {
    **SD15_UNET, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1, 1, 1),
}  # fmt: skip
SDXL_UNET = {
    **SD21_UNET, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10), "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD15_TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu",
}  # fmt: skip


def write_sd15(path: Path, seed: int = 0) -> Path:
    """Write the file; weights are such that activations keep their size, so the noise prediction is finite and depends on its inputs."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    with torch.device("meta"):
        parts: list[tuple[str, nn.Module, dict[str, str]]] = []
        for prefix, module, table in (
            (keys.UNET_PREFIX, UNet2DConditionModel(**SD15_UNET), keys.unet_names),
            (keys.VAE_PREFIX, AutoencoderKL(**SD15_VAE), keys.vae_names),
            (keys.TEXT_PREFIX, CLIPTextModel(CLIPTextConfig(**SD15_TEXT)), keys.text_names),
        ):
            parts.append((prefix, module, table(module.state_dict())))
    for prefix, module, ldm in parts:
        for name, meta in module.state_dict().items():
            tensor = _random(meta, name, generator)
            conv_in_ldm = prefix == keys.VAE_PREFIX and ".mid.attn_1." in ldm[name] and tensor.ndim == 2
            tensors[prefix + ldm[name]] = tensor[..., None, None] if conv_in_ldm else tensor
    tensors[f"{keys.TEXT_PREFIX}embeddings.position_ids"] = torch.arange(77)[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def _random(meta: Tensor, name: str, generator: torch.Generator) -> Tensor:
    if meta.ndim == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(meta.shape, dtype=torch.float16)
    scale = 0.02 if "embedding" in name and "time" not in name else (meta[0].numel()) ** -0.5
    return (torch.randn(meta.shape, generator=generator) * scale).half()
