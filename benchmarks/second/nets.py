"""The parts of the second miniature: text vocabulary, CLIP, autoencoder, U-Net, and the reader that
judges its pictures.

Shapes: n pictures, 77 tokens, latents (n, 4, 16, 16), pictures (n, 3, 128, 128) in -1..1. All have
SD1.x's own architecture, so a checkpoint of them is read as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import world
from dataset import SIZES
from diffusers import AutoencoderKL, UNet2DConditionModel
from places import PHRASES
from things import COLORS, KINDS, SHAPES
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from comfy_continual_lora.mini import parts

TEXT_WIDTH, VISION_WIDTH, SHARED_WIDTH = 512, 384, 256
FACTOR = 0.18215  # SD1.x's: U-Net latents = 0.18215 * latents of the autoencoder


class Vocabulary(parts.Vocabulary):
    """The tokens that the world's captions use, numbered densely; only their rows are trained."""

    def __init__(self) -> None:
        templates = (text for texts in world.STYLES.values() for text in texts)
        relations = (text for _, _, texts in world.RELATIONS.values() for text in texts)
        nouns = (*SHAPES, *map(world.plural, SHAPES))
        others = (*COLORS, *KINDS, *PHRASES.values(), *templates, *relations, *world.DETAILS)
        super().__init__((*nouns, *others, "a an and with eyes small big two three , ."), [0])
        self.zero = self.tokens.index(0)  # with which OpenCLIP pads

    def padded_with_zero(self, ids: Tensor) -> Tensor:
        """The same tokens (n, 77) as OpenCLIP pads them."""
        after_end = (ids == self.end).int().cumsum(1) > 1
        return torch.where(after_end, self.zero, ids)


def new_clip(tokens: int, *, openclip: bool = False) -> CLIPModel:
    """CLIP: a causal text transformer (6 layers, 512 wide), a ViT/16 (6 layers, 384 wide);
    `openclip`: with the exact GELU in its text tower.
    """
    text = {
        "vocab_size": tokens,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 6,
        "num_attention_heads": TEXT_WIDTH // 64,
        "max_position_embeddings": 77,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "projection_dim": SHARED_WIDTH,
        "hidden_act": "gelu" if openclip else "quick_gelu",
    }
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 4 * VISION_WIDTH,
        "num_hidden_layers": 6,
        "num_attention_heads": VISION_WIDTH // 64,
        "image_size": 128,
        "patch_size": 16,
        "projection_dim": SHARED_WIDTH,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHARED_WIDTH)
    return CLIPModel(config)


def normalised(images: Tensor) -> Tensor:
    """What the image tower gets of pictures (n, 3, 128, 128) in -1..1, as OpenAI's."""
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return (images.add(1).div(2) - mean) / std


def new_autoencoder() -> AutoencoderKL:
    """SD's, with a fourth of its channels."""
    config: dict[str, Any] = {
        "block_out_channels": (32, 64, 128, 128),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "scaling_factor": FACTOR,
    }
    return AutoencoderKL(**config)


def new_unet(*, twin: bool = False) -> UNet2DConditionModel:
    """SD1.x's two finest levels, half as wide, with attention at both: 16 x 16 and 8 x 8. `twin`: as
    SDXL has them, for the features of two encoders, pooled text and sizes.
    """
    config: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (160, 320),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    }
    if twin:
        config |= {
            "cross_attention_dim": 2 * TEXT_WIDTH,
            "attention_head_dim": (160 // 64, 320 // 64),  # heads, in spite of the name
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": SHARED_WIDTH + 6 * 256,
        }
    return UNet2DConditionModel(**config)


class Texts(nn.Module):
    """What a U-Net gets of captions: the last layer's features of one tower, normed, as SD1.x has
    them; or of two towers those of the last layer but one, and the second's pooled text, as SDXL.
    """

    def __init__(self, towers: Sequence[CLIPModel]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(clip.text_model for clip in towers)
        self.projection = towers[-1].text_projection
        self.vocabulary = Vocabulary()

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        """ids (n, 77) -> features (n, 77, d), and what else the U-Net gets."""
        if len(self.towers) == 1:
            return self.towers[0](input_ids=ids).last_hidden_state, None
        first, second = self.towers
        own = first(input_ids=ids, output_hidden_states=True).hidden_states[-2]
        zeros = self.vocabulary.padded_with_zero(ids)
        other = second(input_ids=zeros, output_hidden_states=True)
        sizes = torch.tensor([128.0, 128, 0, 0, 128, 128], device=ids.device)
        pooled = self.projection(other.pooler_output)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(len(ids), -1)}
        return torch.cat([own, other.hidden_states[-2]], 2), added


# --- the reader -----------------------------------------------------------------------------------


class Reader(nn.Module):
    """A CNN that reads what is in a picture; trained on real pictures alone."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, after in pairwise((3, 48, 96, 160, 224, 288)):
            for width, stride in ((before, 2), (after, 1)):
                conv = nn.Conv2d(width, after, 3, stride, 1, bias=False)
                blocks += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        body = [nn.Flatten(), nn.Linear(288 * 16, 512), nn.BatchNorm1d(512), nn.ReLU()]
        self.body = nn.Sequential(*blocks, *body)
        self.heads = nn.ModuleDict({name: nn.Linear(512, size) for name, size in SIZES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {name: head(features) for name, head in self.heads.items()}


def is_right(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whether each picture is read right, (n,) of 0, 1 and NaN where there is nothing to say;
    colours are right if the whole set of them is.
    """
    right = {}
    for name, target in labels.items():
        if name.startswith("colors"):
            hit = parts.same_colors(logits[name], target)
            said = target[:, 0] >= 0
        else:
            hit, said = logits[name].argmax(1) == target, target >= 0
        right[name] = torch.where(said, hit.float(), torch.nan)
    return right
