"""What pictures of the mini-SD's world are composed of: shapes, patterns, colours, backgrounds.

Shapes are polygons and patterns are functions, both in object coordinates: x (or u) to the right and
y (or v) down, the object within [-1, 1].
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Color = tuple[int, int, int]
Points = list[tuple[float, float]]

COLORS: dict[str, Color] = {
    "red": (208, 38, 40), "orange": (240, 132, 28), "yellow": (246, 220, 56),
    "green": (48, 156, 60), "teal": (32, 178, 176), "blue": (38, 76, 212),
    "purple": (128, 48, 170), "pink": (246, 150, 192), "white": (246, 246, 246),
    "black": (34, 34, 40),
}  # fmt: skip
PATTERNS = ("plain", "striped", "dotted", "checkered", "ringed", "split")
CONCEPT_PATTERNS = ("zigzag", "plaid", "tricolour", "patches", "quartered", "diagonal", "target")
# a background, and its phrase in captions
BACKGROUNDS: dict[str, str] = {
    "wood": "on wood", "grass": "on grass", "sand": "on sand", "water": "in water",
    "sky": "in the sky", "brick": "on brick", "snow": "in snow", "gravel": "on gravel",
    "night": "at night", "carpet": "on carpet",
}  # fmt: skip


# --- shapes: parts drawn in order, each with its points and whether it is solid or a hole


def ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0, n: int = 28
) -> Points:
    angles = (math.radians(start + (stop - start) * i / n) for i in range(n + 1))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _star() -> Points:
    radii = (1.0, 0.44)
    return [
        (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5))
        for i in range(10)
    ]


def _heart() -> Points:
    points = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -height / 16 - 0.1))
    return points


SHAPES: dict[str, list[tuple[Points, bool]]] = {
    "ball": [(ellipse(0, 0, 0.92, 0.92), True)],
    "box": [(box(-0.85, -0.75, 0.85, 0.85), True)],
    "star": [(_star(), True)],
    "heart": [(_heart(), True)],
    "cross": [
        (
            [
                (-0.32, -0.95),
                (0.32, -0.95),
                (0.32, -0.32),
                (0.95, -0.32),
                (0.95, 0.32),
                (0.32, 0.32),
                (0.32, 0.95),
                (-0.32, 0.95),
                (-0.32, 0.32),
                (-0.95, 0.32),
                (-0.95, -0.32),
                (-0.32, -0.32),
            ],
            True,
        )
    ],
    "moon": [(ellipse(0, 0, 0.95, 0.95, 40, 320) + ellipse(0.38, 0, 0.7, 0.62, 300, 60), True)],
    "mug": [
        (ellipse(0.42, 0.05, 0.52, 0.5), True),
        (ellipse(0.42, 0.05, 0.3, 0.28), False),
        (box(-0.85, -0.75, 0.42, 0.85), True),
    ],
    "teapot": [
        (ellipse(-0.6, 0.1, 0.38, 0.42), True),
        (ellipse(-0.6, 0.1, 0.2, 0.24), False),
        ([(0.3, 0.5), (0.98, -0.38), (0.76, -0.48), (0.3, -0.05)], True),
        (ellipse(0, 0.25, 0.64, 0.58), True),
        (ellipse(0, -0.36, 0.34, 0.15), True),
        (ellipse(0, -0.6, 0.13, 0.13), True),
    ],
    "vase": [
        (
            [
                (-0.42, -0.98),
                (0.42, -0.98),
                (0.2, -0.5),
                (0.66, 0.05),
                (0.62, 0.45),
                (0.36, 0.95),
                (-0.36, 0.95),
                (-0.62, 0.45),
                (-0.66, 0.05),
                (-0.2, -0.5),
            ],
            True,
        )
    ],
    "house": [
        (box(-0.68, -0.12, 0.68, 0.9), True),
        ([(-0.95, -0.1), (0, -0.98), (0.95, -0.1)], True),
        (box(-0.18, 0.35, 0.18, 0.9), False),
    ],
    "fish": [
        ([(0.4, 0), (0.98, -0.52), (0.98, 0.52)], True),
        (ellipse(-0.18, 0, 0.78, 0.5), True),
        (ellipse(-0.6, -0.12, 0.1, 0.1), False),
    ],
    "cat": [
        ([(0.3, 0.7), (0.8, 0.6), (0.68, -0.1), (0.9, -0.2), (0.98, 0.8), (0.5, 0.95)], True),
        (ellipse(0, 0.48, 0.52, 0.5), True),
        ([(-0.46, -0.3), (-0.44, -0.95), (-0.08, -0.6)], True),
        ([(0.46, -0.3), (0.44, -0.95), (0.08, -0.6)], True),
        (ellipse(0, -0.32, 0.48, 0.42), True),
    ],
    "dog": [
        (box(-0.5, 0.2, -0.24, 0.9), True),
        (box(0.3, 0.2, 0.56, 0.9), True),
        ([(0.5, -0.1), (0.92, -0.55), (0.98, -0.4), (0.62, 0.15)], True),
        (box(-0.55, -0.15, 0.62, 0.42), True),
        (ellipse(-0.6, -0.35, 0.38, 0.33), True),
        ([(-0.48, -0.68), (-0.22, -0.5), (-0.28, 0.1), (-0.44, -0.1)], True),
    ],
    "sneaker": [
        (
            [
                (-0.92, 0.42),
                (-0.88, -0.55),
                (-0.6, -0.45),
                (-0.35, -0.55),
                (-0.1, -0.15),
                (0.5, 0),
                (0.9, 0.18),
                (0.95, 0.42),
            ],
            True,
        ),
        (box(-0.96, 0.42, 0.98, 0.68), True),
    ],
    "backpack": [
        (ellipse(0, -0.62, 0.3, 0.32), True),
        (ellipse(0, -0.62, 0.17, 0.18), False),
        (ellipse(0, -0.2, 0.68, 0.5, 180, 360) + [(0.68, 0.92), (-0.68, 0.92)], True),
        (box(-0.42, 0.3, 0.42, 0.78), True),
        (box(-0.9, 0.05, -0.66, 0.75), True),
        (box(0.66, 0.05, 0.9, 0.75), True),
    ],
    "mushroom": [
        (box(-0.26, -0.1, 0.26, 0.92), True),
        (ellipse(0, 0.05, 0.95, 0.95, 180, 360), True),
    ],
}
# positions of the eyes and the hat in object coordinates, if they differ from the default
FACE = {
    "mug": (-0.2, 0.0), "cat": (0.0, -0.32), "dog": (-0.62, -0.38), "fish": (-0.35, -0.1),
    "moon": (-0.62, 0.0), "sneaker": (-0.3, 0.05), "house": (0.0, 0.1), "mushroom": (0.0, -0.35),
    "teapot": (0.0, 0.25), "vase": (0.0, 0.2), "backpack": (0.0, -0.1),
}  # fmt: skip
TOP = {
    "mug": (-0.2, -0.75), "teapot": (0.0, -0.7), "fish": (-0.2, -0.48), "cat": (0.0, -0.72),
    "dog": (-0.6, -0.66), "sneaker": (-0.62, -0.5), "heart": (0.0, -0.55), "box": (0.0, -0.75),
    "backpack": (0.0, -0.85), "moon": (-0.3, -0.85),
}  # fmt: skip


# --- patterns: object coordinates -> which colour, 0, 1 or 2


def _patches(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    seeds = np.array(
        [(-0.6, -0.5), (0.5, -0.6), (0, 0), (-0.55, 0.45), (0.6, 0.35), (0.05, 0.8), (0, -0.9)]
    )
    return ((u[..., None] - seeds[:, 0]) ** 2 + (v[..., None] - seeds[:, 1]) ** 2).argmin(-1) % 3


PAINTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda u, v: np.zeros(u.shape, int),
    "striped": lambda u, v: np.floor(u / 0.36 + 0.5).astype(int) % 2,
    "dotted": lambda u, v: ((u % 0.64 - 0.32) ** 2 + (v % 0.64 - 0.32) ** 2 < 0.045).astype(int),
    "checkered": lambda u, v: (np.floor(u / 0.46 + 0.5) + np.floor(v / 0.46 + 0.5)).astype(int) % 2,
    "ringed": lambda u, v: np.floor(np.hypot(u, v) / 0.32 + 0.5).astype(int) % 2,
    "split": lambda u, v: (u > 0).astype(int),
    "zigzag": lambda u, v: np.floor((v + np.abs(u % 0.72 - 0.36)) / 0.36).astype(int) % 2,
    "plaid": lambda u, v: np.where(u % 0.7 < 0.26, 1, np.where(v % 0.7 < 0.26, 2, 0)),
    "tricolour": lambda u, v: np.clip(np.floor((v + 0.99) / 0.66), 0, 2).astype(int),
    "patches": _patches,
    "quartered": lambda u, v: np.where(u > 0, np.where(v > 0, 0, 1), np.where(v > 0, 2, 0)),
    "diagonal": lambda u, v: np.floor((u + v) / 0.5).astype(int) % 3,
    "target": lambda u, v: np.digitize(np.hypot(u, v), (0.3, 0.6)),
}


# --- looks


@dataclass(frozen=True)
class Look:
    """What a thing looks like, apart from where it stands."""

    shape: str
    pattern: str
    colors: tuple[Color, Color, Color]
    eyes: bool = False
    extra: str = ""  # "", "hat" or "antennae": concepts only


def free_color(rng: np.random.Generator) -> Color:
    """A colour of any hue, not only one that has a name."""
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.25, 1), rng.uniform(0.3, 1))
    return int(255 * r), int(255 * g), int(255 * b)
