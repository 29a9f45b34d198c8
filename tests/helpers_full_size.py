"""Full-size SD1.5, SD2.1 and SDXL with random weights, in the single-file layouts people own: 2.1,
2.6 and 6.9 GB in float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers_families import openclip
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from comfy_continual_lora.checkpoint import keys

SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SD15_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SD21_UNET = {
    **SD15_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1, 1, 1),
}
SDXL_UNET = {
    **SD21_UNET,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
OPENCLIP_H = {
    **SD15_TEXT,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
OPENCLIP_G = {
    **OPENCLIP_H,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
THIN_SDXL_UNET = {
    **SDXL_UNET,
    "block_out_channels": (64, 128, 256),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 1, 1),
}
# what the thin one has otherwise in the configuration of Stability-AI/generative-models
THIN_IN_SGM = {
    "model_channels: 320": "model_channels: 64",
    "transformer_depth: [1, 2, 10]": "transformer_depth: [1, 1, 1]",
}
UNETS = {
    "sd1": SD15_UNET,
    "sd2": SD21_UNET,
    "sdxl": SDXL_UNET,
    "thin-sdxl": THIN_SDXL_UNET,
}


def write(kind: str, path: Path, seed: int = 0) -> Path:
    """Write the file of an "sd1", "sd2" or "sdxl", or of a "thin-sdxl": SDXL's text encoders with a
    net a fifth as wide. Its noise prediction is finite and depends on its inputs.
    """
    random = _Random(seed)
    unet = random.state(UNet2DConditionModel, **UNETS[kind])
    tensors = {
        keys.UNET_PREFIX + ldm: unet.pop(name) for name, ldm in keys.unet_names(dict(unet)).items()
    }
    vae = random.state(AutoencoderKL, **SD15_VAE)
    for name, ldm in keys.vae_names(vae).items():
        conv_in_ldm = ".mid.attn_1." in ldm and vae[name].ndim == 2
        tensors[keys.VAE_PREFIX + ldm] = vae[name][..., None, None] if conv_in_ldm else vae[name]
    if kind == "sd2":
        tensors |= {
            f"cond_stage_model.model.{name}": t
            for name, t in openclip(random.text(CLIPTextModel, OPENCLIP_H)).items()
        }
    else:
        clip = random.text(CLIPTextModel, SD15_TEXT)
        prefix = (
            keys.TEXT_PREFIX if kind == "sd1" else "conditioner.embedders.0.transformer.text_model."
        )
        tensors |= {prefix + ldm: clip[name] for name, ldm in keys.text_names(clip).items()}
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    if kind.endswith("sdxl"):
        big = openclip(random.text(CLIPTextModelWithProjection, OPENCLIP_G))
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in big.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def sdxl_texts(seed: int = 0) -> list[Any]:
    """SDXL's two text encoders alone, in float32."""
    random, models = _Random(seed), []
    for kind, config in ((CLIPTextModel, SD15_TEXT), (CLIPTextModelWithProjection, OPENCLIP_G)):
        with torch.device("meta"):
            model = kind(CLIPTextConfig(**config))
        weights = {name: tensor.float() for name, tensor in random.text(kind, config).items()}
        model.load_state_dict(weights, assign=True)
        for module in model.modules():
            if "position_ids" in module._buffers:
                module._buffers["position_ids"] = torch.arange(77)[None]
        models.append(model.eval())
    return models


class _Random:
    """Weights in float16 such that activations keep their size."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def state(self, kind: type, *args: Any, **config: Any) -> dict[str, Tensor]:
        with torch.device("meta"):
            shapes = kind(*args, **config).state_dict()
        return {name: self._one(meta, name) for name, meta in shapes.items()}

    def text(self, kind: type, config: dict[str, Any]) -> dict[str, Tensor]:
        return self.state(kind, CLIPTextConfig(**config))

    def _one(self, meta: Tensor, name: str) -> Tensor:
        if name.endswith("final_layer_norm.bias"):
            # with zeros the mean of text features would be 0, which weights of prompts keep
            return (torch.rand(meta.shape, generator=self.generator) * 0.2).half()
        if meta.ndim == 1:
            return (torch.zeros if name.endswith("bias") else torch.ones)(
                meta.shape, dtype=torch.float16
            )
        scale = 0.02 if "embedding" in name and "time" not in name else (meta[0].numel()) ** -0.5
        return (torch.randn(meta.shape, generator=self.generator) * scale).half()
