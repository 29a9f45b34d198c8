"""The shipped weights of the mini-SD <-> a checkpoint file, narrow (as trained) or stock (as wide as
SD1.5, computing the same).

Widening: a hidden channel is repeated m times side by side, and the layer that reads it divides by m.
GroupNorm and LayerNorm see the same statistics, so nothing changes. An attention's heads grow with
their channels (the dot product grows m-fold, its scale shrinks by sqrt(m), to_q makes up for the
rest); the text tower's heads keep their 64 channels and are repeated whole; its added layers have
zero outputs. Differences are rounding errors: a test holds them below 1e-4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import CLIPModel

from ..checkpoint import keys
from ..checkpoint.single_file import MINI_ARCHITECTURE
from ..errors import SettingError
from ..files import metadata_in, write_whole
from . import parts

SHIPPED = Path(__file__).parent / "weights"
CHECKPOINT = SHIPPED / "mini-sd.safetensors"
VISION = SHIPPED / "clip-vision.safetensors"
READER = SHIPPED / "reader.safetensors"
VOCABULARY = 49408
METADATA = {
    "format": "pt",
    "modelspec.architecture": MINI_ARCHITECTURE,
    "modelspec.resolution": "128x128",
}
_TABLE = keys.TEXT_PREFIX + "embeddings.token_embedding.weight"
_LATENT_FACTOR = 0.18215  # SD1.x' factor: U-Net latents = 0.18215 * VAE latents


def joined(out: Path) -> dict[str, Tensor]:
    """Trained U-Net, autoencoder and text tower in `out` -> one state, float16, LDM names; of words
    those that the world uses.
    """
    unet = load_file(out / "unet.safetensors")
    tiny = tiny_state(load_file(out / "autoencoder.safetensors"))
    state = {keys.UNET_PREFIX + ldm: unet[name] for name, ldm in keys.unet_names(unet).items()}
    state |= {
        keys.VAE_PREFIX + name: tiny[ours] for ours, name in keys.tiny_vae_names(tiny).items()
    }
    state |= {
        keys.TEXT_PREFIX + k.removeprefix("text_model."): v
        for k, v in load_file(out / "clip.safetensors").items()
        if k.startswith("text_model.")
    }
    return {k: v.half().contiguous() for k, v in state.items()}


def pack(out: Path) -> None:
    """Trained parts in `out` -> the shipped files, float16."""
    SHIPPED.mkdir(exist_ok=True)
    save_file(joined(out), CHECKPOINT, {"tokens": json.dumps(parts.Vocabulary().tokens)})
    clip = load_file(out / "clip.safetensors")
    save_file(
        {k: v.half().contiguous() for k, v in clip.items() if not k.startswith("text_model.")},
        VISION,
    )
    if (out / "reader.safetensors").exists():
        reader = load_file(out / "reader.safetensors")
        save_file(
            {k: v.half().contiguous() if v.is_floating_point() else v for k, v in reader.items()},
            READER,
        )


def unpack(out: Path) -> None:
    """The shipped files -> the parts in `out`, to train them further (without optimizer state)."""
    state, clip = load_file(CHECKPOINT), load_file(VISION)
    unet = {
        ours: state[keys.UNET_PREFIX + name]
        for ours, name in keys.unet_names(parts.new_unet().state_dict()).items()
    }
    tiny = {
        ours: state[keys.VAE_PREFIX + name]
        for ours, name in keys.tiny_vae_names(AutoencoderTiny().state_dict()).items()
    }
    clip |= {
        "text_model." + k.removeprefix(keys.TEXT_PREFIX): v
        for k, v in state.items()
        if k.startswith(keys.TEXT_PREFIX)
    }
    for name, part in (("unet", unet), ("autoencoder", slim_state(tiny)), ("clip", clip)):
        save_file({k: v.float().contiguous() for k, v in part.items()}, out / f"{name}.safetensors")


def _slim_layers() -> Iterator[tuple[str, str]]:
    """(layer of the slim autoencoder, the same layer of the stock TAESD), every convolution."""
    for half, stages, head, between, counts in (
        ("encoder", parts.SlimAutoencoder.encoder_stages[::-1], 1, 1, (1, 3, 3, 3)),
        ("decoder", parts.SlimAutoencoder.decoder_stages, 2, 2, (3, 3, 3, 1)),
        # `head` layers come before the first stage, `between` (the last a convolution) before each
        # further one
    ):
        yield f"{half}.0", f"{half}.layers.0"
        slim = stock = head
        for index, ((_, blocks), count) in enumerate(zip(stages, counts, strict=True)):
            if index:
                slim, stock = slim + between, stock + between
                yield f"{half}.{slim - 1}", f"{half}.layers.{stock - 1}"
            for block in range(blocks):
                yield from (
                    (f"{half}.{slim + block}.conv.{c}", f"{half}.layers.{stock + block}.conv.{c}")
                    for c in (0, 2, 4)
                )
            slim, stock = slim + max(1, blocks), stock + count
        yield f"{half}.{slim}", f"{half}.layers.{stock}"


def tiny_state(slim: dict[str, Tensor]) -> dict[str, Tensor]:
    """A slim autoencoder's weights, zero-padded to the stock TAESD.

    Missing channels stay zero, missing blocks are identities.
    """
    full = {k: torch.zeros_like(v) for k, v in AutoencoderTiny().state_dict().items()}
    for source, target in _slim_layers():
        for leaf in ("weight", "bias"):
            if (value := slim.get(f"{source}.{leaf}")) is not None:
                full[f"{target}.{leaf}"][tuple(slice(n) for n in value.shape)] = value
    return full


def slim_state(full: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `tiny_state`."""
    slim = parts.SlimAutoencoder().state_dict()
    names = dict(_slim_layers())
    for key, value in slim.items():
        layer, leaf = key.rsplit(".", 1)
        slim[key] = full[f"{names[layer]}.{leaf}"][tuple(slice(n) for n in value.shape)]
    return slim


def checkpoint_state() -> dict[str, Tensor]:
    """The narrow checkpoint, float16, LDM names."""
    with safe_open(CHECKPOINT, framework="pt") as file:
        tokens = json.loads(file.metadata()["tokens"])
    return complete(load_file(CHECKPOINT), tokens)


def complete(state: dict[str, Tensor], tokens: Sequence[int]) -> dict[str, Tensor]:
    """What `joined` gives, with vectors for all words and the autoencoder's scale."""
    return state | {
        _TABLE: whole_table(state[_TABLE].float(), tokens).half(),
        keys.VAE_PREFIX + "vae_scale": torch.tensor(_LATENT_FACTOR),
        keys.VAE_PREFIX + "vae_shift": torch.tensor(0.0),
    }


def whole_table(rows: Tensor, tokens: Sequence[int]) -> Tensor:
    """The vectors of these tokens -> of all 49,408; those the world does not use get random ones
    like the others' (seed 0).
    """
    drawn = torch.randn(VOCABULARY, rows.shape[1], generator=torch.Generator().manual_seed(0))
    table = rows.mean(0) + rows.std(0) * drawn
    table[list(tokens)] = rows
    return table


def write_checkpoint(path: Path, *, stock: bool = False) -> None:
    """Write the mini-SD as one file in the SD1.x layout; the stock one gets the .yaml that A1111
    needs.

    Errors: SettingError if another file has the name; an earlier mini-SD is replaced.
    """
    if os.path.lexists(path) and not is_mini(path):
        raise SettingError(
            f"{path} already exists and is not a mini-SD, so it is left alone. Choose another "
            "name, or move that file away."
        )
    config = path.with_suffix(".yaml")
    if stock and config.exists() and config.read_bytes() != _YAML.encode():
        raise SettingError(
            f"{config} already exists and is not a mini-SD's, so it is left alone. Choose another "
            "name, or move that file away."
        )
    state = checkpoint_state()
    if stock:
        state = widen(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(state, {**METADATA, "modelspec.title": "mini-SD"}))
    if stock:
        write_whole(config, _YAML.encode())


def is_mini(path: Path) -> bool:
    """Whether the file is a mini-SD that `write_checkpoint` wrote."""
    return metadata_in(path).get("modelspec.architecture") == MINI_ARCHITECTURE


def load_reader() -> parts.Reader:
    """The attribute reader: what the world's things in a picture look like, by name."""
    reader = parts.Reader()
    reader.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(READER).items()}
    )
    return reader.eval()


@torch.no_grad()
def vision_features(pictures: Tensor) -> Tensor:
    """The image tower of the mini-SD's CLIP: pictures (n, 3, 128, 128) in -1..1 -> (n, 192).

    Other sizes are scaled.
    """
    scaled = (
        F.interpolate(pictures, size=(128, 128), mode="bilinear", antialias=True)
        if pictures.shape[-1] != 128
        else pictures
    )
    clip = _clip()
    return clip.visual_projection(clip.vision_model(pixel_values=scaled).pooler_output)


@torch.no_grad()
def text_features(prompts: Sequence[str]) -> Tensor:
    """The text tower's side of the same space: prompts in the world's words -> (n, 192)."""
    clip, ids = _clip(), parts.Vocabulary().encode(prompts)
    return clip.text_projection(clip.text_model(input_ids=ids).pooler_output)


@cache
def _clip() -> CLIPModel:
    text = {
        "text_model." + k.removeprefix(keys.TEXT_PREFIX): v
        for k, v in load_file(CHECKPOINT).items()
        if k.startswith(keys.TEXT_PREFIX)
    }
    clip = parts.new_clip().eval()
    clip.load_state_dict({k: v.float() for k, v in (load_file(VISION) | text).items()})
    return clip


# --- widening ------------------------------------------------------------------------------------


def widen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Narrow -> stock: U-Net 320 wide, text tower 768 wide with 12 layers. float16."""
    wide = {k: v for k, v in state.items() if k.startswith(keys.VAE_PREFIX)}
    unet = {
        k.removeprefix(keys.UNET_PREFIX): v.float()
        for k, v in state.items()
        if k.startswith(keys.UNET_PREFIX)
    }
    text = {
        k.removeprefix(keys.TEXT_PREFIX): v.float()
        for k, v in state.items()
        if k.startswith(keys.TEXT_PREFIX)
    }
    m = 320 // unet["input_blocks.0.0.weight"].shape[0]
    words = 768 // text["final_layer_norm.weight"].shape[0]
    wide |= {keys.UNET_PREFIX + k: _wide_unet(k, v, m, words).half() for k, v in unet.items()}
    wide |= {keys.TEXT_PREFIX + k: v.half() for k, v in _wide_text(text, words).items()}
    return wide


def _repeat(tensor: Tensor, out: int, into: int) -> Tensor:
    """Repeat output channels `out` times, and input channels `into` times sharing their weight."""
    tensor = tensor.repeat_interleave(out, 0)
    return tensor.repeat_interleave(into, 1) / into if tensor.dim() > 1 else tensor


def _wide_unet(name: str, tensor: Tensor, m: int, words: int) -> Tensor:
    if name == "time_embed.0.weight":
        # its input is the sinusoids of the timestep, of which the narrow net has every m-th
        wide = torch.zeros(tensor.shape[0] * m, tensor.shape[1] * m)
        wide[:, ::m] = tensor.repeat_interleave(m, 0)
        return wide
    if name == "input_blocks.0.0.weight":
        return _repeat(tensor, m, 1)
    if name.startswith("out.2."):
        return _repeat(tensor, 1, m)
    if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
        return _repeat(tensor, m, words)
    if name.endswith("to_q.weight"):
        return _repeat(tensor, m, m) / m**0.5
    return _repeat(tensor, m, m)


def _wide_text(text: dict[str, Tensor], m: int) -> dict[str, Tensor]:
    def heads(tensor: Tensor, dim: int) -> Tensor:
        """Repeat whole heads of 64 along a dimension."""
        return tensor.unflatten(dim, (-1, 64)).repeat_interleave(m, dim).flatten(dim, dim + 1)

    wide = {}
    for name, tensor in text.items():
        if name.startswith("embeddings."):
            wide[name] = tensor.repeat_interleave(m, 1)
        elif name.endswith("out_proj.weight"):
            wide[name] = heads(tensor.repeat_interleave(m, 0), 1) / m
        elif "_proj.weight" in name:
            wide[name] = heads(tensor.repeat_interleave(m, 1) / m, 0)
        elif "_proj.bias" in name and "out_proj" not in name:
            wide[name] = heads(tensor, 0)
        else:
            wide[name] = _repeat(tensor, m, m)
    layers = 1 + max(int(k.split(".")[2]) for k in text if k.startswith("encoder."))
    for layer in range(layers, 12):
        for name in [k for k in wide if k.startswith("encoder.layers.0.")]:
            wide[name.replace(".0.", f".{layer}.", 1)] = torch.zeros_like(wide[name])
    return wide


_YAML = """\
# The mini-SD in the stock layout, for AUTOMATIC1111's web UI: keep this file beside the checkpoint,
# under the same name.
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.012
    num_timesteps_cond: 1
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 16
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 16
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [1, 2]
        num_res_blocks: 1
        channel_mult: [1, 3]
        num_heads: 8
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: 768
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig: {double_z: true, z_channels: 4, resolution: 128, in_channels: 3, out_ch: 3,
                   ch: 128, ch_mult: [1, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""
