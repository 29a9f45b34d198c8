"""The families of checkpoints: distinguished by the names of their weights, and what no shape says.

    family  text encoders           text features                            trained at
    SD1.x   CLIP-L                  the last layer, normed                   512
    SD2.x   OpenCLIP-H              the last layer but one, normed           512; predicting v 768
    SDXL    CLIP-L, OpenCLIP-bigG   each one's last layer but one,           1024
            (its pooled text also   concatenated, not normed
            conditions the U-Net)

Source: the inference configurations of CompVis/stable-diffusion, Stability-AI/stablediffusion and
Stability-AI/generative-models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..errors import CheckpointError
from .keys import TEXT_PREFIX, UNET_PREFIX

# (width, channels of the latents and whatever else comes in, 3, 3)
UNET_STEM = f"{UNET_PREFIX}input_blocks.0.0.weight"


@dataclass(frozen=True)
class TextPart:
    """One text encoder: where it is stored, and how its features are taken."""

    prefix: str  # in a single file
    folder: str = "text_encoder"  # in a diffusers folder
    # OpenCLIP's names and activation, padded with 0; else OpenAI CLIP's, padded with the end token
    openclip: bool = False
    layers: int = 1000  # at most this many are used
    penultimate: bool = False  # the last layer but one is used, not normed
    kind: type[CLIPTextModel | CLIPTextModelWithProjection] = CLIPTextModel

    @property
    def table(self) -> str:
        """The name of its token table in a single file."""
        return f"{self.prefix}{'' if self.openclip else 'embeddings.'}token_embedding.weight"


@dataclass(frozen=True)
class Family:
    """What the checkpoints of a family have in common."""

    id: str  # also its row of settings.PRESETS
    name: str
    pipeline: str  # what diffusers calls its folders
    texts: tuple[TextPart, ...]
    size: int = 512  # pixels a side it was trained at
    scale: float = 0.18215  # latents times this have variance 1


SD1 = Family("sd1", "SD1.x", "StableDiffusionPipeline", (TextPart(TEXT_PREFIX),))
# OpenCLIP-H has 24 layers; SD2 was trained on the 23rd's output, and copies of it often lack the
# last one
SD2 = Family(
    "sd2",
    "SD2.x",
    "StableDiffusionPipeline",
    (TextPart("cond_stage_model.model.", openclip=True, layers=23),),
)
SDXL = Family(
    "sdxl",
    "SDXL",
    "StableDiffusionXLPipeline",
    (
        TextPart("conditioner.embedders.0.transformer.text_model.", penultimate=True),
        TextPart(
            "conditioner.embedders.1.model.",
            "text_encoder_2",
            openclip=True,
            penultimate=True,
            kind=CLIPTextModelWithProjection,
        ),
    ),
    size=1024,
    scale=0.13025,
)

# {a part of a name that only these have: what it is, and what to do}
_OTHERS = {
    "conditioner.embedders.0.model.": (
        "the SDXL refiner",
        "It finishes the pictures of the SDXL base model; teach that one.",
    ),
    "joint_blocks.": (
        "SD3",
        "It has no cross-attention to put concepts into; take an SD1.x, SD2.x or SDXL model.",
    ),
    "double_blocks.": (
        "Flux",
        "It has no cross-attention to put concepts into; take an SD1.x, SD2.x or SDXL model.",
    ),
    "lora": (
        "a LoRA",
        "Give the checkpoint it was made for; a K/V LoRA can become a concept of it "
        "(continual-lora import).",
    ),
    "word.": ("a concept stack", "Give the checkpoint it lies beside."),
    "model.diffusion_model.": ("a U-Net without its text encoder", "Get the full model."),
}
_RELATIVES = {
    "edm_mean": (
        "Playground v2.5",
        "Its noise schedule is not known here; take SDXL or a fine-tune of it.",
    ),
    "edm_vpred.sigma_max": (
        "CosXL",
        "Its noise schedule is not known here; take SDXL or a fine-tune of it.",
    ),
    "embedder.model.visual.": (
        "SD2.x unCLIP",
        "It draws from pictures, not from text; take SD2.1.",
    ),
}
_CHANNELS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model"}


def family_of(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """The family of a single file with these weights.

    Errors: CheckpointError for what is none of them, by its name, with what to do.
    """
    family = None
    for candidate in (SD1, SD2, SDXL):
        if all(text.table in shapes for text in candidate.texts):
            family = candidate
            break
    stem = shapes.get(UNET_STEM)
    kind, advice = "", ""
    for part, kind_and_advice in (_RELATIVES if family and stem else _OTHERS).items():
        if any(part in name for name in shapes):
            kind, advice = kind_and_advice
            break
    if family and stem and not kind:
        check_channels(path, stem[1])
        return family
    raise CheckpointError(
        f"{path} can't be taught: its weights look like {kind or 'something else'} (first key: "
        f"{next(iter(shapes), 'none')}). {advice or 'Get the full model.'} Expected SD1.x, SD2.x "
        "or SDXL in one file: U-Net, text encoders and VAE."
    )


def check_channels(path: Path, channels: int) -> None:
    """Errors: CheckpointError for a U-Net that takes in more than latents, by what it is."""
    if channels != 4:
        kind = _CHANNELS.get(channels, f"a model of {channels} input channels")
        raise CheckpointError(
            f"{path} can't be taught: its weights look like {kind}. Teach the model it was made "
            "from, which needs text alone."
        )
