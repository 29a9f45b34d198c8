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

import re
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

ANIMA_PIPELINE = "AnimaModularPipeline"  # `anima_layout` has the rest of that family

_TAKE = "Take an SD1.x, SD2.x or SDXL checkpoint (Illustrious, NoobAI and Pony are SDXL), or Anima."
_FULL = "Get the full model."
_BESIDE = "Give the checkpoint it is used with."
_SCHEDULE = "Its noise schedule is not known here; take SDXL or a fine-tune of it."


@dataclass(frozen=True)
class Other:
    """A kind of file that can't be taught."""

    kind: str
    marks: str  # a pattern that names of its weights match, and no names of the kinds below it
    advice: str = _TAKE
    pipeline: str = ""  # how the names of its pipelines in diffusers begin


# Sources of the names: comfy/model_detection.py and comfy/controlnet.py of ComfyUI 0.33 (original
# layouts), the classes and loaders/single_file_utils.py of diffusers 0.42 (its own layouts).
_OTHERS = (
    Other(
        "a ControlNet",
        r"^control_model\.|controlnet_|^lora_controlnet|^(input_hint_block|zero_convs)\.",
        _BESIDE,
    ),
    Other("an IP-Adapter", r"^ip_adapter\.", _BESIDE),
    Other("an AnimateDiff motion module", r"motion_modules\.", _BESIDE),
    Other(
        "a LoRA",
        r"lora|hada_w|lokr_w",
        "Give the checkpoint it was made for; a K/V LoRA can become a concept of it (`import`).",
    ),
    Other("a concept stack", r"^word\.", "Give the checkpoint it lies beside."),
    Other(
        "the embedding of a word",
        r"^(emb_params|clip_[lg]|string_to_param.*)$",
        "Give the checkpoint it was made for; it can become a concept of it together with a LoRA "
        "(`import`).",
    ),
    Other(
        "the SDXL refiner",
        r"^conditioner\.embedders\.0\.model\.",
        "It finishes the pictures of the SDXL base model; teach that one.",
    ),
    Other("Flux.3", r"early_stream_modulations\."),
    Other("Flux.2", r"(double|single)_stream_modulation", pipeline="Flux2"),
    Other("Chroma", r"distilled_guidance_layer\.", pipeline="Chroma"),
    Other(
        "Hunyuan-Video or HunyuanImage",
        r"individual_token_refiner\.|context_embedder\.token_refiner\.",
        pipeline="HunyuanVideo",
    ),
    Other("HunyuanImage", r"^byt5_in\.", pipeline="HunyuanImage"),
    Other("Hunyuan-DiT", r"mlp_t5\.|time_extra_emb\.", pipeline="HunyuanDiT"),
    Other("AuraFlow", r"double_layers\.|joint_transformer_blocks\.", pipeline="AuraFlow"),
    Other("HiDream", r"double_stream_blocks\.|t_embedder1\.", pipeline="HiDream"),
    Other("Qwen-Image", r"\.img_mod\.\d|txt_in\.text_norm\.", pipeline="QwenImage"),
    Other("SD3", r"joint_blocks\.|pos_embed\.pos_embed$", pipeline="StableDiffusion3"),
    Other(
        "Flux.1",
        r"double_blocks\.\d+\.(img|txt)_|single_transformer_blocks\.",
        pipeline="Flux",
    ),
    Other("Krea 2", r"txtfusion\.|text_fusion\.", pipeline="Krea2"),
    Other("a part of Anima", r"llm_adapter\.", _FULL),
    Other(
        "Cosmos, or Anima without its text adapter,",
        r"blocks\.\d+\.mlp\.layer1\.|blocks\.block0\.|time_embed\.t_embedder\.",
        pipeline="Cosmos",
    ),
    Other("Z-Image", r"cap_pad_token|\blayers\.\d+\.adaLN_modulation\.0\.", pipeline="ZImage"),
    Other("Lumina", r"cap_embedder\.|caption_embedder\.", pipeline="Lumina"),
    Other("Wan", r"\bhead\.modulation$|condition_embedder\.time_proj\.", pipeline="Wan"),
    Other(
        "Sana",
        r"attention_y_norm\.|inverted_conv\.|conv_inverted\.",
        pipeline="Sana",
    ),
    Other("LTX-Video", r"patchify_proj\.|time_embed\.emb\.", pipeline="LTX"),
    Other("PixArt", r"\bt_block\.1\.|adaln_single\.", pipeline="PixArt"),
    Other(
        "Stable Cascade",
        r"clip_txt(_pooled)?_mapper\.|effnet_mapper\.|^vquantizer\.",
        pipeline="StableCascade",
    ),
    Other("Kolors", r"encoder_hid_proj\.weight$", pipeline="Kolors"),
    Other(
        "a U-Net without its text encoder", r"input_blocks\.0\.0\.|^(unet\.)?down_blocks\.", _FULL
    ),
    Other("a VAE", r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(down|up|mid|conv_in)", _FULL),
    Other(
        "a text or image encoder",
        r"(text|vision)_model\.|^transformer\.resblocks|^encoder\.block\.0\.|^model\.layers\.",
        _FULL,
    ),
    Other("an upscaler", r"^model\.1\.sub\.|conv_first\.|residual_group\.|^body\.0\.weight$"),
)
# Models that have all parts of one of the families
_RELATIVES = (
    Other("Playground v2.5", r"edm_mean", _SCHEDULE),
    Other("CosXL", r"edm_vpred\.sigma_max", _SCHEDULE),
    Other(
        "SD2.x unCLIP",
        r"embedder\.model\.visual\.",
        "It draws from pictures, not from text; take SD2.1.",
    ),
)
_CHANNELS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model"}


def family_of(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """The family of a single file with these weights.

    Errors: CheckpointError for what is none of them, by its name, with what to do.
    """
    stem, names = shapes.get(UNET_STEM, ()), "\n".join(shapes)
    families = (SD1, SD2, SDXL) if len(stem) == 4 else ()
    family = next((one for one in families if all(t.table in shapes for t in one.texts)), None)
    others = _RELATIVES if family else _OTHERS
    other = next((one for one in others if re.search(one.marks, names, re.MULTILINE)), None)
    if family and not other:
        check_channels(path, stem[1])
        return family
    kind, advice = (other.kind, other.advice) if other else ("something else", _FULL)
    raise CheckpointError(
        f"{path} can't be taught: its weights look like {kind} (first key: "
        f"{next(iter(shapes), 'none')}). {advice} Expected SD1.x, SD2.x or SDXL in one file: "
        "U-Net, text encoders and VAE; or Anima's net."
    )


def pipeline_kind(name: str) -> str:
    """What a diffusers pipeline of another family draws with, and its name: "Wan (WanPipeline)"."""
    for other in _OTHERS:
        if other.pipeline and name.startswith(other.pipeline):
            return f"{other.kind} ({name})"
    return f"a {name:.100}"


def check_channels(path: Path, channels: int) -> None:
    """Errors: CheckpointError for a U-Net that takes in more than latents, by what it is."""
    if channels != 4:
        kind = _CHANNELS.get(channels, f"a model of {channels} input channels")
        raise CheckpointError(
            f"{path} can't be taught: its weights look like {kind}. Teach the model it was made "
            "from, which needs text alone."
        )
