"""The pictures that judges.py trains its judges on: random looks of all shapes and patterns.

in: how many, seeds of their own - out: pictures (n, 3, 128, 128) in -1..1 or at half that
resolution, and labels. No concept of `world.concepts` is among them but by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from comfy_continual_lora.mini import trainset, world
from comfy_continual_lora.mini.drawing import draw_background, draw_look
from comfy_continual_lora.mini.looks import (
    BACKGROUNDS,
    CONCEPT_PATTERNS,
    PAINTS,
    SHAPES,
    Color,
    Look,
    free_color,
)

SEED = 5105
EXTRAS = ("", "hat", "antennae")
CLASSES = {"shape": len(SHAPES), "pattern": len(PAINTS), "eyes": 2, "extra": len(EXTRAS)}


class Pictures(NamedTuple):
    """Scenes drawn twice, at half the resolution."""

    looks: list[Look]  # of the scenes of one thing
    single: Tensor  # (looks, 2, 3, 64, 64)
    double: Tensor  # of two things, (scenes, 2, 3, 64, 64)


def random_look(rng: np.random.Generator) -> Look:
    """A look of the world, or three times as often one like a concept's, of any pattern."""
    if rng.random() < 0.25:
        return world.random_thing(rng).look
    first, second, third = _distinct_colors(rng)
    return Look(
        shape=str(rng.choice(list(SHAPES))),
        pattern=str(rng.choice(list(PAINTS))),
        colors=(first, second, third),
        eyes=bool(rng.random() < 0.3),
        extra=str(rng.choice(("", *EXTRAS))),
    )


def _distinct_colors(rng: np.random.Generator) -> list[Color]:
    colors = [free_color(rng)]
    while len(colors) < 3:
        color = free_color(rng)
        if min(np.abs(np.subtract(color, other)).sum() for other in colors) > 120:
            colors.append(color)
    return colors


def draw_thing(look: Look, background: str, rng: np.random.Generator) -> np.ndarray:
    """One thing in a random pose, uint8 (128, 128, 3)."""
    picture = draw_background(background, rng)
    x, y = rng.uniform(-5, 5, 2) + (64, 66)
    draw_look(picture, look, (x, y), rng.uniform(40, 47), rng)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_scene(looks: Sequence[Look], rng: np.random.Generator) -> np.ndarray:
    """One thing or two on a random background, uint8 (128, 128, 3)."""
    background = str(rng.choice(list(BACKGROUNDS)))
    if len(looks) == 1:
        return draw_thing(looks[0], background, rng)
    things = tuple(world.Thing(look, (), "") for look in looks)
    return world.draw_scene(world.Scene(things, background, ""), rng)


def half_size(pictures: Tensor) -> Tensor:
    """(n, 3, 128, 128) -> (n, 3, 64, 64)."""
    return F.avg_pool2d(pictures, 2)


def draw_pictures(scenes: int) -> Pictures:
    """One scene in four has two things."""
    rng = np.random.default_rng(SEED)
    looks: list[Look] = []
    drawn: dict[int, list[Tensor]] = {1: [], 2: []}
    for number in range(scenes):
        things = [random_look(rng) for _ in range(2 if number % 4 == 0 else 1)]
        both = np.stack([draw_scene(things, rng) for _ in range(2)])
        drawn[len(things)].append(half_size(trainset.to_tensor(both)).half())
        if len(things) == 1:
            looks += things
    return Pictures(looks, torch.stack(drawn[1]), torch.stack(drawn[2]))


def draw_concepts(looks: int, count: int, *, seed: int) -> Tensor:
    """Pictures of unseen looks as concepts have them, (looks, count, 3, 128, 128); those of one
    look go round the backgrounds.
    """
    rng = np.random.default_rng((SEED, seed))
    backgrounds = list(BACKGROUNDS)
    places = [backgrounds[number % len(backgrounds)] for number in range(count)]
    drawn = []
    while len(drawn) < looks:
        look = random_look(rng)
        if look.pattern in CONCEPT_PATTERNS:
            things = [draw_thing(look, place, rng) for place in places]
            drawn.append(trainset.to_tensor(np.stack(things)))
    return torch.stack(drawn)


def labels(looks: Sequence[Look]) -> dict[str, Tensor]:
    """The attributes of each look: indices (n,); `colors` (n, 3, 3) in -1..1, and which of the
    three are seen (n, 3).
    """
    colors = torch.tensor([look.colors for look in looks]) / 127.5 - 1
    return {
        "shape": torch.tensor([list(SHAPES).index(look.shape) for look in looks]),
        "pattern": torch.tensor([list(PAINTS).index(look.pattern) for look in looks]),
        "eyes": torch.tensor([int(look.eyes) for look in looks]),
        "extra": torch.tensor([EXTRAS.index(look.extra) for look in looks]),
        "colors": colors,
        "shown": torch.tensor([_shown_colors(look.shape, look.pattern) for look in looks]),
    }


@cache
def _shown_colors(shape: str, pattern: str) -> list[bool]:
    """Which of the three colours cover a twentieth of the shape or more."""
    canvas = Image.new("1", (100, 100))
    draw = ImageDraw.Draw(canvas)
    for points, solid in SHAPES[shape]:
        draw.polygon([(50 + 50 * x, 50 + 50 * y) for x, y in points], fill=int(solid))
    axis = (np.arange(100) + 0.5) / 50 - 1
    painted = PAINTS[pattern](*np.meshgrid(axis, axis))[np.asarray(canvas)]
    return [bool((painted == number).mean() >= 0.05) for number in range(3)]


def color_errors(read: dict[str, Tensor], true: dict[str, Tensor]) -> Tensor:
    """The distance of each colour, (n, 3), in 0..255 along each axis."""
    return (read["colors"] - true["colors"]).norm(dim=2) * 127.5


def augment(pictures: Tensor, scale: tuple[float, float], tint: float) -> Tensor:
    """Show a random window, as large as a random factor in `scale`, of each picture; change its
    brightness and colours by up to the factor 1 + `tint`; make half of them soft, all noisy.
    """
    n = len(pictures)
    size = torch.empty(n, 1).uniform_(*scale)
    margin = (1 - size).abs().clamp(min=0.05)
    window = torch.zeros(n, 2, 3)
    window[:, 0, 0] = window[:, 1, 1] = size[:, 0]
    window[:, :, 2] = torch.empty(n, 2).uniform_(-1, 1) * margin
    grid = F.affine_grid(window, list(pictures.shape), align_corners=False)
    shown = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    gain = 1 + torch.empty(n, 1, 1, 1).uniform_(-tint, tint)
    gain = gain + torch.empty(n, 3, 1, 1).uniform_(-tint / 3, tint / 3)
    shown = (shown + 1) * gain - 1
    soft = F.avg_pool2d(shown, 3, stride=1, padding=1, count_include_pad=False)
    shown = torch.where(torch.rand(n, 1, 1, 1) < 0.5, soft, shown)
    noise = torch.randn(shown.shape) * torch.empty(n, 1, 1, 1).uniform_(0, 0.1)
    return (shown + noise).contiguous(memory_format=torch.channels_last)
