"""Tiny SD2.x and SDXL with random weights, as the pipelines of diffusers and as the single files
people own.

The text encoders' names and stacked tensors are written out by hand here. Those of U-Net and VAE
are the package's own tables, which test_checkpoint.py holds against the converters of diffusers.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from comfy_continual_lora.checkpoint import keys
from comfy_continual_lora.checkpoint.single_file import TOKENIZER
from comfy_continual_lora.presets import BETA_END, BETA_START

KINDS = ("sd2", "sd2-v", "sdxl", "sdxl-v")
_BY_HAND = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@cache
def pipeline(kind: str) -> Any:
    """Not to be changed. SDXL's v fine-tune has a zero terminal SNR, as they have."""
    torch.manual_seed(KINDS.index(kind))
    xl, v = kind.startswith("sdxl"), kind.endswith("-v")
    sizes: dict[str, Any] = {
        "block_out_channels": (32, 64, 128),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 192,
    }
    if not xl:
        sizes = {
            "block_out_channels": (64,) * 4,
            "transformer_layers_per_block": 1,
            "cross_attention_dim": 64,
        }
    attention = [xl is False, *[True] * (len(sizes["block_out_channels"]) - 2), xl]
    unet = UNet2DConditionModel(
        **sizes,
        layers_per_block=2,
        attention_head_dim=[max(1, c // 64) for c in sizes["block_out_channels"]],
        use_linear_projection=True,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        sample_size=8,
        **(
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 6 * 256 + 96,
            }
            if xl
            else {}
        ),
    )
    if kind == "sd2-v":
        torch.nn.init.normal_(
            unet.get_parameter("up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"), std=0.2
        )
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if xl else 0.18215,
    )
    scheduler = DDIMScheduler(
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if v else "epsilon",
        **({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if xl and v else {}),
    )
    ends, zeros = (
        CLIPTokenizer.from_pretrained(str(TOKENIZER), **pad) for pad in ({}, {"pad_token": "!"})
    )
    openclip = {"hidden_act": "gelu", "projection_dim": 96}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if xl:
            texts = (
                CLIPTextModel(_text(64, 3)).eval(),
                CLIPTextModelWithProjection(_text(128, 3, **openclip)).eval(),
            )
            return StableDiffusionXLPipeline(
                vae.eval(), *texts, ends, zeros, unet.eval(), scheduler, add_watermarker=False
            )
        text = CLIPTextModel(_text(64, 23, **openclip)).eval()
        return StableDiffusionPipeline(
            vae.eval(),
            text,
            zeros,
            unet.eval(),
            scheduler,
            None,
            None,
            None,
            requires_safety_checker=False,
        )  # type: ignore[arg-type]


def _text(width: int, layers: int, **others: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=49408,
        bos_token_id=49406,
        eos_token_id=49407,
        initializer_factor=5.0,
        **others,
    )


def single_file(kind: str) -> dict[str, Tensor]:
    """The same weights under the names of a single file."""
    pipe = pipeline(kind)
    unet, vae = pipe.unet.state_dict(), pipe.vae.state_dict()
    tensors = {keys.UNET_PREFIX + ldm: unet[name] for name, ldm in keys.unet_names(unet).items()}
    tensors |= {keys.VAE_PREFIX + ldm: vae[name] for name, ldm in keys.vae_names(vae).items()}
    if kind.startswith("sdxl"):
        inner = {
            name.removeprefix("text_model."): tensor
            for name, tensor in pipe.text_encoder.state_dict().items()
        }
        tensors |= {
            f"conditioner.embedders.0.transformer.text_model.{name}": tensor
            for name, tensor in inner.items()
        }
        tensors |= {
            f"conditioner.embedders.1.model.{name}": tensor
            for name, tensor in openclip(pipe.text_encoder_2.state_dict()).items()
        }
        tensors |= (
            {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])} if kind == "sdxl-v" else {}
        )
    else:
        names = openclip(pipe.text_encoder.state_dict())
        # of a layer that is never used
        last = {
            name.replace(".22.", ".23."): torch.full_like(t, torch.nan)
            for name, t in names.items()
            if ".22." in name
        }
        tensors |= {
            f"cond_stage_model.model.{name}": tensor for name, tensor in {**names, **last}.items()
        }
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def openclip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers text model's weights as OpenCLIP has them."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in state:
        renamed["text_projection"] = state["text_projection.weight"].T
    for layer in range(
        1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder."))
    ):
        for leaf in ("weight", "bias"):
            theirs, ours = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            renamed |= {
                f"{theirs}.{name}.{leaf}": state[f"{ours}.{same}.{leaf}"]
                for name, same in _BY_HAND.items()
            }
            renamed[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(
                [state[f"{ours}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
            )
    return renamed


def write(kind: str, path: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> Path:
    save_file(
        {name: tensor.to(dtype) for name, tensor in single_file(kind).items()},
        path,
        metadata or None,
    )
    return path
