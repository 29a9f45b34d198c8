"""A narrow Anima with random weights, in the three files people have, with ComfyUI's folders around it.

The names of the net's weights are written out by hand here; those of the VAE are found by asking
diffusers' converter for every name that Wan's VAE may have.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

# diffusers' names -> the original's, in this order
_NET = {
    "transformer_blocks.": "blocks.",
    "time_embed.t_embedder.": "t_embedder.1.",
    "time_embed.norm.": "t_embedding_norm.",
    "patch_embed.proj.": "x_embedder.proj.1.",
    "norm_out.linear_": "final_layer.adaln_modulation.",
    "proj_out.": "final_layer.linear.",
    "norm1.linear_": "adaln_modulation_self_attn.",
    "norm2.linear_": "adaln_modulation_cross_attn.",
    "norm3.linear_": "adaln_modulation_mlp.",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "to_out.0.": "output_proj.",
    "to_q.": "q_proj.",
    "to_k.": "k_proj.",
    "to_v.": "v_proj.",
    "norm_q.": "q_norm.",
    "norm_k.": "k_norm.",
    "ff.net.0.proj.": "mlp.layer1.",
    "ff.net.2.": "mlp.layer2.",
}
END, UNKNOWN = "<|endoftext|>", "<unk>"


@dataclass(frozen=True)
class Sizes:
    """Of a narrow Anima."""

    heads: int = 2
    head: int = 16
    layers: int = 2
    text: int = 32
    text_layers: int = 2
    text_head: int = 16
    text_mlp: int = 64
    conditioner_layers: int = 1
    conditioner_head: int = 16
    modulation: int = 8
    vae: int = 8
    qwen_words: int = 400
    t5_words: int = 400


# what ComfyUI takes for Anima: of the widths that it does not read from the files, and of the
# conditioner, its own; few layers of the rest
IN_COMFYUI = Sizes(
    heads=16,
    head=16,
    text=1024,
    text_head=128,
    text_mlp=3072,
    conditioner_layers=6,
    conditioner_head=64,
    modulation=256,
    qwen_words=151936,
    t5_words=32128,
)
# as published: 5.7 GB in bf16
PUBLISHED = replace(IN_COMFYUI, head=128, layers=28, text_layers=28, vae=96)


def nets(sizes: Sizes) -> dict[str, Any]:
    """The nets, the same at every call, with weights whose answers depend on everything asked."""
    torch.manual_seed(0)
    parts = {part: make() for part, make in _makers(sizes).items()}
    for part in parts.values():
        for name, parameter in part.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        part.eval().requires_grad_(False)
    return parts


def half_state(sizes: Sizes, part: str) -> dict[str, Tensor]:
    """Weights of a net in bf16, without it: full-size nets in float32 take 12 GB."""
    with torch.device("meta"):
        shapes = _makers(sizes)[part]().state_dict()
    draws = torch.Generator().manual_seed(0)
    state = {}
    for name, meta in shapes.items():
        if meta.squeeze().ndim > 1:
            tensor = torch.randn(meta.shape, generator=draws) * meta[0].numel() ** -0.5
        else:
            tensor = torch.full(meta.shape, float(not name.endswith("bias")))
        state[name] = tensor.bfloat16()
    return state


def _makers(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    return {
        "net": lambda: CosmosTransformer3DModel(
            num_attention_heads=sizes.heads,
            attention_head_dim=sizes.head,
            num_layers=sizes.layers,
            text_embed_dim=sizes.text,
            adaln_lora_dim=sizes.modulation,
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        ),
        "conditioner": lambda: AnimaTextConditioner(
            source_dim=sizes.text,
            target_dim=sizes.text,
            model_dim=sizes.text,
            num_layers=sizes.conditioner_layers,
            num_attention_heads=sizes.text // sizes.conditioner_head,
            target_vocab_size=sizes.t5_words,
        ),
        "text": lambda: Qwen3Model(
            Qwen3Config(
                vocab_size=sizes.qwen_words,
                hidden_size=sizes.text,
                intermediate_size=sizes.text_mlp,
                num_hidden_layers=sizes.text_layers,
                num_attention_heads=2 * sizes.text // sizes.text_head,
                num_key_value_heads=sizes.text // sizes.text_head,
                head_dim=sizes.text_head,
                rope_theta=1e6,
            )
        ),
        "vae": lambda: AutoencoderKLQwenImage(base_dim=sizes.vae),
    }


def original_net(net: Mapping[str, Tensor], conditioner: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of both under the names of the published file, without `net.`."""
    named = {}
    for name, tensor in net.items():
        for diffusers, original in _NET.items():
            name = name.replace(diffusers, original)
        named[name] = tensor
    return named | {f"llm_adapter.{name}": tensor for name, tensor in conditioner.items()}


def original_vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of Wan's VAE."""
    leaves = [
        *(f"residual.{n}.{leaf}" for n in (0, 2, 3, 6) for leaf in ("gamma", "weight", "bias")),
        *(f"{one}.{leaf}" for one in ("shortcut", "resample.1", "time_conv", "norm", "to_qkv", "proj")
          for leaf in ("weight", "bias", "gamma")),
    ]  # fmt: skip
    blocks = [
        *(f"encoder.downsamples.{n}" for n in range(12)),
        *(f"decoder.upsamples.{n}" for n in range(16)),
        *(f"{side}.middle.{n}" for side in ("encoder", "decoder") for n in range(3)),
    ]
    names = [".".join(pair) for pair in itertools.product(blocks, leaves)]
    outside = ("conv1", "encoder.conv1", "decoder.conv1", "encoder.head", "decoder.head", "conv2")
    for one in outside:
        ends = ("0.gamma", "2.weight", "2.bias") if one.endswith("head") else ("weight", "bias")
        names += [f"{one}.{end}" for end in ends]
    known = convert_wan_vae_to_diffusers({name: name for name in names})
    return {known[name]: tensor for name, tensor in state.items()}


def write(
    root: Path,
    sizes: Sizes = Sizes(),
    *,
    prefix: str = "net.",
    size: int = 64,
    dtype: torch.dtype = torch.float32,
    tokenizers: Path | None = None,
) -> Path:
    """Write the files into the folders of a ComfyUI at `root`; returns the net's. `tokenizers`: those of
    a ComfyUI, in place of tiny ones.
    """
    if sizes == PUBLISHED:
        state = partial(half_state, sizes)
    else:
        parts = nets(sizes)
        state = lambda part: parts[part].state_dict()  # noqa: E731
    models = root / "models"
    net = original_net(state("net"), state("conditioner"))
    path = models / "diffusion_models" / "anima.safetensors"
    _save(
        {prefix + name: tensor for name, tensor in net.items()}, path, dtype,
        {"modelspec.resolution": str(size)},
    )  # fmt: skip
    text = {f"model.{name}": tensor for name, tensor in state("text").items()}
    _save(text, models / "text_encoders" / "qwen_3_06b_base.safetensors", dtype)
    _save(original_vae(state("vae")), models / "vae" / "qwen_image_vae.safetensors", dtype)
    if tokenizers is None:
        write_tokenizers(root / "comfy" / "text_encoders")
    else:
        for name in ("qwen25_tokenizer", "t5_tokenizer"):
            shutil.copytree(tokenizers / name, root / "comfy" / "text_encoders" / name)
    return path


def as_in_neo(root: Path, neo: Path) -> Path:
    """Copy the files of a ComfyUI at `root` into the folders of a Forge Neo at `neo`; returns the net's."""
    tokenizers = neo / "backend" / "huggingface" / "circlestone-labs" / "Anima"
    for name, in_neo in (("qwen25_tokenizer", "tokenizer"), ("t5_tokenizer", "tokenizer_2")):
        shutil.copytree(root / "comfy" / "text_encoders" / name, tokenizers / in_neo)
    return models_as_in_neo(root, neo)


def models_as_in_neo(root: Path, neo: Path) -> Path:
    """The same without tokenizers."""
    folders = (
        ("text_encoders", "text_encoder"), ("vae", "VAE"), ("diffusion_models", "Stable-diffusion"),
    )  # fmt: skip
    for name, in_neo in folders:
        shutil.copytree(root / "models" / name, neo / "models" / in_neo)
    return neo / "models" / "Stable-diffusion" / "anima.safetensors"


def _save(
    tensors: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype,
    metadata: dict[str, str] | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.to(dtype).contiguous() for k, t in tensors.items()}, path, metadata)


def write_tokenizers(root: Path) -> None:
    """Two tiny tokenizers of the kinds of Qwen's and T5's: every byte is a token, and some words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    qwen = {letter: number for number, letter in enumerate(letters)}
    qwen |= {END: len(qwen)}
    folder = root / "qwen25_tokenizer"
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(qwen))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    words = ["photo", "of", "a", "the", "ball", "fish", "mug", "dog", "red", "on", "grass", "and"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), (UNKNOWN, 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    t5 = Tokenizer(models.Unigram(pieces, unk_id=2))
    t5.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    folder = root / "t5_tokenizer"
    folder.mkdir()
    t5.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": UNKNOWN}))
