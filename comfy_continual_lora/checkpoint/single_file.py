"""A single .safetensors file in the LDM layout: its `Layout`.

No configuration file is needed: the nets' shapes say what they are (`shapes`), and the tokenizer is
part of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig

from ..errors import CheckpointError
from . import keys, shapes
from .families import SD2, Family, TextPart, family_of
from .layout import (
    Layout,
    Naming,
    Part,
    Shape,
    Weights,
    check_not_quantised,
    part_of,
    resolution_of,
)

TOKENIZER = Path(__file__).parent / "tokenizer"
MINI_ARCHITECTURE = "stable-diffusion-v1-mini"
_V_BIAS = f"{keys.UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def file_layout(path: Path, file: Any) -> Layout:
    """Errors: CheckpointError for another architecture, a quantised copy or missing weights."""
    weights = Weights(path, [file], keys.usual_name)
    stored = {name: weights.shape(name) for name in weights}
    family = family_of(path, stored)
    check_not_quantised(weights)
    parts = _Parts(weights, family, stored)
    metadata = file.metadata() or {}
    mini = metadata.get("modelspec.architecture") == MINI_ARCHITECTURE
    prediction = _prediction(weights, metadata, family)
    size = 768 if family is SD2 and prediction == "v_prediction" else family.size
    return Layout(
        family,
        "mini" if mini else family.id,
        resolution_of(metadata.get("modelspec.resolution", "")) or size,
        parts.unet(),
        parts.vae(),
        [parts.text(text) for text in family.texts],
        TOKENIZER,
        prediction,
        declares_zero_snr="ztsnr" in stored,
    )


@dataclass(frozen=True)
class _Parts:
    """The nets of a file, from the shapes of its weights."""

    weights: Weights
    family: Family
    stored: Mapping[str, Shape]

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
        except (KeyError, IndexError, StopIteration, ValueError) as error:
            raise CheckpointError(
                f"{self.weights.path}: the weights under {prefix} are incomplete ({error}). "
                f"Expected a full {self.family.name} model in one file."
            ) from None
        return part_of(self.weights, lambda: make(config), prefix, naming)


def _tiny_vae(_config: dict[str, Any]) -> nn.Module:
    """A TAESD in place of the VAE; it works on scaled latents already."""
    return AutoencoderTiny(scaling_factor=1.0)


def _prediction(weights: Weights, metadata: Mapping[str, str], family: Family) -> str:
    """What the net predicts, in diffusers' words.

    The metadata say so; else SDXL's fine-tunes mark it with a key, and for SD2.x ComfyUI's rule of
    thumb holds.
    """
    if declared := metadata.get("modelspec.prediction_type", "").strip().lower():
        if declared.startswith(("flow", "rectified")):
            return "flow_prediction"
        v = declared.startswith("v")
    elif family is SD2:
        v = _V_BIAS in weights and float(weights.read(_V_BIAS).float().std(correction=0)) > 0.09
    else:
        v = "v_pred" in weights
    return "v_prediction" if v else "epsilon"
