"""The parts of the mini-SD: text vocabulary, CLIP, autoencoder, U-Net, and the reader that judges
its pictures.

Shapes: n pictures, 77 tokens, latents (n, 4, 16, 16), pictures (n, 3, 128, 128) in -1..1. Every
width divides SD1.5's in the same place, so the net can be written in the stock layout without
changing what it computes (`weights.widen`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..checkpoint.single_file import TOKENIZER
from . import world


@cache
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(  # nosec B615
        str(TOKENIZER), local_files_only=True
    )


_WORDS = (
    *(*world.SHAPES, *world.COLORS, *world.PATTERNS, *world.BACKGROUNDS.values(), *world.TEMPLATES),
    "and with eyes a an , . two front of posing next to the",
)


class Vocabulary:
    """The tokens that captions use, numbered densely: those of these phrases, {} aside, and `more`.

    Only these rows of the embedding are trained and shipped.
    """

    def __init__(self, phrases: Iterable[str] = _WORDS, more: Iterable[int] = ()) -> None:
        words = sorted({word for phrase in phrases for word in phrase.split() if "{" not in word})
        found = [tokenizer()(word)["input_ids"] for word in words]
        begin, end = found[0][0], found[0][-1]
        self.tokens: list[int] = [
            *sorted({*more, *(i for ids in found for i in ids[1:-1])}),
            begin,
            end,
        ]
        self.end = len(self.tokens) - 1
        self._dense = {token: row for row, token in enumerate(self.tokens)}

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Dense token ids, (captions, 77), padded with the end token as SD1.x pads."""
        tokens = tokenizer()(list(captions), padding="max_length", max_length=77, truncation=True)
        return torch.tensor([[self._dense[t] for t in row] for row in tokens["input_ids"]])


TEXT_WIDTH, VISION_WIDTH = 256, 192


def new_clip(*, vocab_size: int | None = None, text_width: int = TEXT_WIDTH) -> CLIPModel:
    """CLIP: a causal text transformer (4 layers, heads of 64), a ViT/16 (5 layers, 192 wide)."""
    size = vocab_size or len(Vocabulary().tokens)
    text = {
        "vocab_size": size,
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": 4,
        "num_attention_heads": text_width // 64,
        "max_position_embeddings": 77,
        "eos_token_id": size - 1,
        "bos_token_id": size - 2,
        "projection_dim": 192,
    }
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 768,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "image_size": 128,
        "patch_size": 16,
        "projection_dim": 192,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=192))


class _Block(nn.Module):
    """TAESD's residual block, relu(x + conv relu conv relu conv)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


class SlimAutoencoder(nn.Module):
    """A slim TAESD, narrower and with fewer blocks than the stock one.

    `weights.tiny_state` pads it to the stock layout exactly. The stages are (width, blocks) from
    16 x 16 to 128 x 128; a stage without blocks keeps the ReLU of the first block it omits.
    """

    encoder_stages = ((64, 3), (64, 2), (32, 2), (32, 0))
    decoder_stages = ((64, 3), (64, 3), (32, 3), (32, 0))

    def __init__(self) -> None:
        super().__init__()
        (wide, first), *rest = reversed(self.encoder_stages)
        layers: list[nn.Module] = [nn.Conv2d(3, wide, 3, padding=1), *self._blocks(wide, first)]
        for width, blocks in rest:
            layers += [nn.Conv2d(wide, width, 3, 2, 1, bias=False), *self._blocks(width, blocks)]
            wide = width
        self.encoder = nn.Sequential(*layers, nn.Conv2d(wide, 4, 3, padding=1))
        (wide, first), *rest = self.decoder_stages
        layers = [nn.Conv2d(4, wide, 3, padding=1), nn.ReLU(), *self._blocks(wide, first)]
        for width, blocks in rest:
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(wide, width, 3, padding=1, bias=False),
                *self._blocks(width, blocks),
            ]
            wide = width
        self.decoder = nn.Sequential(*layers, nn.Conv2d(wide, 3, 3, padding=1))

    @staticmethod
    def _blocks(width: int, count: int) -> list[nn.Module]:
        return [_Block(width) for _ in range(count)] or [nn.ReLU()]

    def encode(self, images: Tensor) -> Tensor:
        """(n, 3, 128, 128) in -1..1 -> latents (n, 4, 16, 16)."""
        return self.encoder(images.add(1).div(2))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(torch.tanh(latents / 3) * 3).mul(2).sub(1)


def new_unet(text_width: int = TEXT_WIDTH) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 192),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=8,
        norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )


@torch.no_grad()
def normalise_latents(model: SlimAutoencoder, images: Tensor) -> None:
    """Rescale the convolutions around the latents so that every channel has mean 0 and variance 1."""
    latents = torch.cat([model.encode(chunk) for chunk in images.split(32)])
    shift, scale = latents.mean((0, 2, 3)), 1 / latents.std((0, 2, 3))
    last, first = model.encoder[-1], model.decoder[0]
    assert isinstance(last, nn.Conv2d)
    assert isinstance(first, nn.Conv2d)
    assert last.bias is not None
    last.weight *= scale.view(-1, 1, 1, 1)
    last.bias.copy_((last.bias - shift) * scale)
    first.weight /= scale.view(1, -1, 1, 1)


# --- the reader ----------------------------------------------------------------------------------

_SIZES = {"background": len(world.BACKGROUNDS), "count": 2}
for _slot in "ab":
    _SIZES |= {
        f"shape_{_slot}": len(world.SHAPES),
        f"pattern_{_slot}": len(world.PATTERNS),
        f"colors_{_slot}": len(world.COLORS),
        f"eyes_{_slot}": 2,
    }


class AttributeHeads(nn.Module):
    """One linear layer per attribute.

    They are background and count, and shape, pattern, colours and eyes of the left (or only) thing
    `a` and the right thing `b`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({key: nn.Linear(width, size) for key, size in _SIZES.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {key: head(features) for key, head in self.heads.items()}


class Reader(nn.Module):
    """A small CNN that reads the attributes of a picture.

    It is trained on pictures of the world, never on pictures that a net generated.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128, 160)
        blocks = []
        for index, (before, after) in enumerate(pairwise(widths)):
            blocks += [nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
            if index:
                blocks += [nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(
            *blocks, nn.Flatten(), nn.Linear(160 * 16, 320), nn.BatchNorm1d(320), nn.ReLU()
        )
        self.attributes = AttributeHeads(320)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.attributes(self.body(images))


def labels(scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """The attributes of each scene: indices (n,) for each, for colours 0 or 1 (n, 10).

    They are -1 if a scene has no such thing or no named colour.
    """
    backgrounds, shapes = list(world.BACKGROUNDS), list(world.SHAPES)
    values: dict[str, list] = {key: [] for key in _SIZES}
    for scene in scenes:
        values["background"].append(backgrounds.index(scene.background))
        values["count"].append(len(scene.things) - 1)
        for slot, thing in zip("ab", (*scene.things, None)[:2], strict=False):
            values[f"shape_{slot}"].append(shapes.index(thing.look.shape) if thing else -1)
            values[f"pattern_{slot}"].append(
                world.PATTERNS.index(thing.look.pattern) if thing else -1
            )
            values[f"eyes_{slot}"].append(int(thing.look.eyes) if thing else -1)
            named = thing.color_names if thing else ()
            values[f"colors_{slot}"].append(
                [float(c in named) if named else -1.0 for c in world.COLORS]
            )
    return {key: torch.tensor(np.array(rows)) for key, rows in values.items()}


@torch.no_grad()
def read_accuracy(
    reader: Reader, images: Tensor, scenes: Sequence[world.Scene]
) -> dict[str, float]:
    """The share of things (and pictures) whose attribute the reader gets right.

    Colours are right if the whole set of them is.
    """
    reader.eval()
    chunks = [reader(chunk) for chunk in images.split(64)]
    logits = {key: torch.cat([c[key] for c in chunks]).float() for key in _SIZES}
    right: dict[str, list[Tensor]] = {}
    for key, target in labels(scenes).items():
        if key.startswith("colors"):
            labelled = target[:, 0] >= 0
            hit = same_colors(logits[key][labelled], target[labelled])
        else:
            labelled = target >= 0
            hit = logits[key][labelled].argmax(1) == target[labelled]
        right.setdefault(key.split("_")[0], []).append(hit.float())
    return {key: round(float(torch.cat(hits).mean()), 4) for key, hits in right.items()}


def same_colors(logits: Tensor, target: Tensor) -> Tensor:
    """Whether the k most likely colours are the k named ones, (n,)."""
    rank = logits.argsort(1, descending=True).argsort(1)
    return ((rank < target.sum(1, keepdim=True)) == target.bool()).all(1)
