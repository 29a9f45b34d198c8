"""A single .safetensors file in the LDM layout: its `Layout`, and the `Backbone` it becomes.

No configuration file is needed: the nets' shapes say what they are (`shapes`), and the tokenizer is
part of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from ..errors import CheckpointError
from . import keys, shapes
from .backbone import Backbone
from .families import SD2, Family, TextPart, family_of
from .layout import NOT_QUANTISED, Fingerprint, Layout, Naming, Part, part_of, text_encoder
from .narrow import put, put_unet

TOKENIZER = Path(__file__).parent / "tokenizer"
MINI_ARCHITECTURE = "stable-diffusion-v1-mini"
_QUANTISATION_SCALES = (".scale_weight", ".weight_scale", ".absmax", "scaled_fp8")
_V_BIAS = f"{keys.UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def file_layout(path: Path, file: Any) -> Layout:
    """Errors: CheckpointError for another architecture, a quantised copy or missing weights."""
    stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    family = family_of(path, stored)
    for name in stored:
        if name.endswith(_QUANTISATION_SCALES):
            raise CheckpointError(
                f"{path} holds quantised weights and their scales (first: {name}). {NOT_QUANTISED}"
            )
    parts = _Parts(path, family, stored)
    metadata = file.metadata() or {}
    mini = metadata.get("modelspec.architecture") == MINI_ARCHITECTURE
    predicts_v = _prediction(file, family) == "v_prediction"
    usual_size = 768 if family is SD2 and predicts_v else family.size
    return Layout(
        family,
        "mini" if mini else family.id,
        int(metadata.get("modelspec.resolution", str(usual_size)).split("x")[0]),
        parts.unet(),
        parts.vae(),
        [parts.text(text) for text in family.texts],
    )


@dataclass(frozen=True)
class _Parts:
    """The nets of a file, from the shapes of its weights."""

    path: Path
    family: Family
    stored: Mapping[str, tuple[int, ...]]

    def unet(self) -> Part:
        def make(config: dict[str, Any]) -> nn.Module:
            return UNet2DConditionModel(**config)

        return self._part(make, keys.UNET_PREFIX, keys.unet_names, shapes.unet_config)

    def vae(self) -> Part:
        if f"{keys.VAE_PREFIX}taesd_decoder.1.weight" in self.stored:
            return self._part(_tiny_vae, keys.VAE_PREFIX, keys.tiny_vae_names, lambda _: {})

        def make(config: dict[str, Any]) -> nn.Module:
            return AutoencoderKL(**config, scaling_factor=self.family.scale)

        return self._part(make, keys.VAE_PREFIX, keys.vae_names, shapes.vae_config)

    def text(self, text: TextPart) -> Part:
        naming, config_of = (
            (keys.openclip_names, shapes.openclip_config)
            if text.openclip
            else (keys.text_names, shapes.text_config)
        )

        def make(config: dict[str, Any]) -> nn.Module:
            layers = min(config["num_hidden_layers"], text.layers)
            return text.kind(CLIPTextConfig(**{**config, "num_hidden_layers": layers}))

        return self._part(make, text.prefix, naming, config_of)

    def _part(
        self,
        make: Callable[[dict[str, Any]], nn.Module],
        prefix: str,
        naming: Naming,
        config_of: Callable[[shapes.Shapes], dict[str, Any]],
    ) -> Part:
        """Errors: CheckpointError for weights that are missing under `prefix`."""
        own = {
            name.removeprefix(prefix): shape
            for name, shape in self.stored.items()
            if name.startswith(prefix)
        }
        try:
            config = config_of(own)
            return part_of(self.path, self.stored, lambda: make(config), prefix, naming)
        except (KeyError, ValueError, StopIteration) as error:
            raise CheckpointError(
                f"{self.path}: the weights under {prefix} are incomplete ({error}). Expected a "
                f"full {self.family.name} model in one file."
            ) from None


def _tiny_vae(_config: dict[str, Any]) -> nn.Module:
    """A TAESD in place of the VAE; it works on scaled latents already."""
    return AutoencoderTiny(scaling_factor=1.0)


def load_file(
    path: Path, layout: Layout, file: Any, device: torch.device, dtype: torch.dtype
) -> Backbone:
    fingerprint = Fingerprint()

    def put_in_unet(unet: nn.Module, name: str, weight: Tensor) -> None:
        fingerprint.add(name, weight)
        put_unet(unet, name, weight.to(device), dtype)

    def put_in_vae(vae: nn.Module, name: str, weight: Tensor) -> None:
        put(vae, name, weight, torch.float32)

    def put_in_text(model: nn.Module, name: str, weight: Tensor) -> None:
        stored = weight.dtype if dtype != torch.float32 else None
        put(model, name, weight.to(device), torch.float32, stored)

    unet = layout.unet.fill(file, put_in_unet)
    vae = layout.vae.fill(file, put_in_vae)
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    encoders = []
    for part, text in zip(layout.texts, layout.family.texts, strict=True):
        model = part.fill(file, put_in_text)
        _fill_position_ids(model, device)
        encoders.append(text_encoder(model, text, tokenizer))
    prediction = _prediction(file, layout.family)
    return Backbone(
        path,
        unet,
        vae,
        encoders,
        tokenizer,
        layout.preset,
        layout.size,
        fingerprint.hexdigest(),
        prediction,
        zero_snr=prediction == "v_prediction" and "ztsnr" in file.keys(),  # noqa: SIM118 - not a dict
        device=device,
    )


def _fill_position_ids(model: Any, device: torch.device) -> None:
    """A buffer that no file stores."""
    for module in model.modules():
        if "position_ids" in module._buffers:
            count = module.position_embedding.num_embeddings
            module._buffers["position_ids"] = torch.arange(count, device=device)[None]


def _prediction(file: Any, family: Family) -> str:
    """What the net predicts, in diffusers' words.

    The metadata say so; else SDXL's fine-tunes mark it with a key, and for SD2.x ComfyUI's rule of
    thumb holds.
    """
    names = file.keys()
    if declared := (file.metadata() or {}).get("modelspec.prediction_type"):
        v = declared.startswith("v")
    elif family is SD2:
        v = _V_BIAS in names and float(file.get_tensor(_V_BIAS).float().std(correction=0)) > 0.09
    else:
        v = "v_pred" in names
    return "v_prediction" if v else "epsilon"
