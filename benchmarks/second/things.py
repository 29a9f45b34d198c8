"""What the second world's pictures are made of: 52 nouns with their shapes, 24 colours, 14 patterns
and materials, and 7 patterns that concepts alone have.

Shapes are polygons and patterns are functions, both in object coordinates: x (or u) to the right and
y (or v) down, the object within [-1, 1], as in `mini/looks.py`, whose 16 shapes are among them. The
words that stand in no list of `textspace` are a third of each kind or more; a test counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from comfy_continual_lora.mini import looks
from comfy_continual_lora.mini.looks import Color, Points, box, ellipse

Parts = list[tuple[Points, bool]]  # drawn in order: points, and whether they are solid or a hole


def _mirrored(points: Points) -> Points:
    return [(-x, y) for x, y in points]


def _both(points: Points) -> Iterator[tuple[Points, bool]]:
    """The same on the left and on the right."""
    yield points, True
    yield _mirrored(points), True


def _ring(count: int, radius: float, size: float, y: float) -> Iterator[tuple[Points, bool]]:
    """Discs in a circle."""
    for k in range(count):
        angle = 2 * math.pi * k / count
        yield (
            ellipse(radius * math.sin(angle), y - radius * math.cos(angle), size, size),
            True,
        )


_WINDOW, _WHEEL = 0.13, 0.2

THINGS: dict[str, Parts] = {
    "lamp": [
        (box(-0.07, 0.0, 0.07, 0.8), True),
        (ellipse(0, 0.85, 0.42, 0.1), True),
        ([(-0.34, -0.9), (0.34, -0.9), (0.72, 0.06), (-0.72, 0.06)], True),
    ],
    "chair": [
        (box(-0.5, -0.95, -0.32, 0.95), True),
        (box(0.36, 0.2, 0.54, 0.95), True),
        (box(-0.5, -0.9, -0.06, -0.1), True),
        (box(-0.56, 0.1, 0.62, 0.34), True),
    ],
    "bottle": [
        (box(-0.13, -0.95, 0.13, -0.4), True),
        (ellipse(0, -0.1, 0.42, 0.42, 180, 360) + [(0.42, 0.95), (-0.42, 0.95)], True),
        (box(-0.2, -0.98, 0.2, -0.8), True),
    ],
    "umbrella": [
        (box(-0.05, -0.2, 0.05, 0.8), True),
        (ellipse(0.17, 0.78, 0.22, 0.17, 0, 180) + ellipse(0.17, 0.78, 0.12, 0.08, 180, 0), True),
        (ellipse(0, 0.0, 0.95, 0.85, 180, 360), True),
    ],
    "clock": [
        *_both(ellipse(-0.5, -0.75, 0.3, 0.2)),
        *_both([(-0.5, 0.6), (-0.34, 0.7), (-0.6, 0.98), (-0.74, 0.9)]),
        (ellipse(0, 0, 0.8, 0.8), True),
        (ellipse(0, 0, 0.58, 0.58), True),
        (box(-0.04, -0.46, 0.04, 0.04), False),
        (box(0, -0.04, 0.34, 0.04), False),
    ],
    "key": [
        (box(-0.2, -0.12, 0.95, 0.12), True),
        (box(0.55, 0.1, 0.7, 0.42), True),
        (box(0.8, 0.1, 0.95, 0.5), True),
        (ellipse(-0.5, 0, 0.46, 0.5), True),
        (ellipse(-0.52, 0, 0.2, 0.24), False),
    ],
    "guitar": [
        (box(-0.08, -0.95, 0.08, 0.1), True),
        (box(-0.18, -0.98, 0.18, -0.72), True),
        (ellipse(0, 0.08, 0.36, 0.32), True),
        (ellipse(0, 0.52, 0.52, 0.45), True),
        (ellipse(0, 0.3, 0.16, 0.16), False),
    ],
    "book": [
        ([(-0.95, -0.6), (-0.06, -0.42), (-0.06, 0.78), (-0.95, 0.6)], True),
        ([(0.95, -0.6), (0.06, -0.42), (0.06, 0.78), (0.95, 0.6)], True),
    ],
    "bell": [
        (ellipse(0, 0.82, 0.16, 0.15), True),
        (ellipse(0, -0.1, 0.5, 0.78, 180, 360) + [(0.85, 0.72), (-0.85, 0.72)], True),
        (ellipse(0, -0.9, 0.12, 0.1), True),
    ],
    "kite": [
        ([(0.02, 0.5), (0.4, 0.62), (0.4, 0.92), (0.02, 0.66)], True),
        ([(-0.02, 0.5), (-0.4, 0.62), (-0.4, 0.92), (-0.02, 0.66)], True),
        ([(0, -0.98), (0.74, -0.3), (0, 0.66), (-0.74, -0.3)], True),
    ],
    "crown": [
        (
            [
                (-0.85, 0.7),
                (-0.95, -0.6),
                (-0.45, 0.0),
                (0, -0.85),
                (0.45, 0.0),
                (0.95, -0.6),
                (0.85, 0.7),
            ],
            True,
        ),
        (box(-0.85, 0.45, 0.85, 0.75), True),
    ],
    "anchor": [
        (ellipse(0, 0.3, 0.9, 0.66, 0, 180) + ellipse(0, 0.3, 0.6, 0.38, 180, 0)[::1], True),
        (box(-0.1, -0.6, 0.1, 0.9), True),
        (box(-0.45, -0.42, 0.45, -0.22), True),
        (ellipse(0, -0.72, 0.24, 0.24), True),
        (ellipse(0, -0.72, 0.1, 0.1), False),
    ],
    "bird": [
        ([(0.3, 0.1), (0.98, -0.2), (0.98, 0.25), (0.4, 0.5)], True),
        (ellipse(0, 0.15, 0.62, 0.46), True),
        ([(-0.7, -0.42), (-0.98, -0.3), (-0.68, -0.2)], True),
        (ellipse(-0.48, -0.35, 0.33, 0.3), True),
        ([(-0.2, 0.05), (0.5, 0.0), (0.2, 0.45)], True),
        (box(-0.16, 0.58, -0.08, 0.92), True),
        (box(0.1, 0.58, 0.18, 0.92), True),
    ],
    "rabbit": [
        *_both(ellipse(-0.2, -0.68, 0.13, 0.32)),
        (ellipse(0.5, 0.66, 0.2, 0.2), True),
        (ellipse(0, 0.5, 0.5, 0.48), True),
        (ellipse(0, -0.2, 0.42, 0.36), True),
    ],
    "turtle": [
        (ellipse(-0.78, 0.15, 0.22, 0.2), True),
        (box(-0.5, 0.3, -0.2, 0.72), True),
        (box(0.25, 0.3, 0.55, 0.72), True),
        ([(0.6, 0.2), (0.98, 0.42), (0.6, 0.42)], True),
        (ellipse(0, 0.4, 0.7, 0.85, 180, 360), True),
    ],
    "snail": [
        (box(-0.74, -0.45, -0.66, 0.3), True),
        (box(-0.9, -0.4, -0.82, 0.3), True),
        ([(-0.95, 0.05), (-0.6, 0.05), (-0.5, 0.5), (0.98, 0.62), (0.98, 0.78), (-0.8, 0.78)], True),
        (ellipse(0.18, 0.05, 0.62, 0.6), True),
        (ellipse(0.18, 0.05, 0.3, 0.28), True),
    ],
    "butterfly": [
        *_both(ellipse(-0.5, -0.4, 0.46, 0.46)),
        *_both(ellipse(-0.4, 0.45, 0.36, 0.38)),
        (ellipse(0, 0, 0.12, 0.72), True),
    ],
    "owl": [
        *_both([(-0.6, -0.5), (-0.62, -0.98), (-0.2, -0.72)]),
        (ellipse(0, 0.05, 0.66, 0.86), True),
        *_both(ellipse(-0.56, 0.25, 0.2, 0.48)),
        ([(-0.1, -0.28), (0.1, -0.28), (0, -0.06)], False),
    ],
    "elephant": [
        (box(-0.3, 0.3, -0.02, 0.9), True),
        (box(0.5, 0.3, 0.78, 0.9), True),
        (ellipse(0.25, 0.1, 0.66, 0.5), True),
        ([(-0.86, -0.2), (-0.62, -0.1), (-0.7, 0.6), (-0.9, 0.82), (-0.96, 0.7)], True),
        (ellipse(-0.5, -0.2, 0.38, 0.4), True),
        (ellipse(-0.2, -0.2, 0.28, 0.42), True),
    ],
    "penguin": [
        *_both([(-0.4, -0.2), (-0.86, 0.4), (-0.7, 0.5), (-0.4, 0.2)]),
        *_both(ellipse(-0.25, 0.88, 0.24, 0.1)),
        (ellipse(0, 0.15, 0.52, 0.74), True),
        (ellipse(0, -0.6, 0.34, 0.34), True),
        ([(-0.1, -0.55), (0.1, -0.55), (0, -0.36)], False),
    ],
    "whale": [
        ([(0.5, 0.1), (0.74, -0.55), (0.9, -0.3), (0.98, -0.5), (0.98, 0.05), (0.7, 0.45)], True),
        (ellipse(-0.15, 0.2, 0.8, 0.52), True),
        (box(-0.5, -0.85, -0.4, -0.3), True),
        ([(-0.72, -0.7), (-0.45, -0.92), (-0.18, -0.7), (-0.45, -0.76)], True),
    ],
    "king": [
        ([(-0.2, -0.1), (0.2, -0.1), (0.6, 0.95), (-0.6, 0.95)], True),
        *_both([(-0.16, 0.0), (-0.7, 0.4), (-0.6, 0.52), (-0.2, 0.3)]),
        (ellipse(0, -0.36, 0.28, 0.3), True),
        (
            [(-0.3, -0.55), (-0.34, -0.95), (-0.15, -0.74), (0, -0.98), (0.15, -0.74)]
            + [(0.34, -0.95), (0.3, -0.55)],
            True,
        ),
    ],
    "wizard": [
        ([(-0.2, -0.1), (0.2, -0.1), (0.55, 0.95), (-0.55, 0.95)], True),
        (box(0.6, -0.6, 0.68, 0.95), True),
        (ellipse(0.64, -0.66, 0.14, 0.14), True),
        ([(0.12, 0.0), (0.68, 0.2), (0.66, 0.34), (0.16, 0.26)], True),
        (ellipse(0, -0.28, 0.27, 0.27), True),
        (box(-0.48, -0.5, 0.48, -0.4), True),
        ([(-0.28, -0.45), (0.05, -0.99), (0.28, -0.45)], True),
    ],
    "robot": [
        (box(-0.04, -0.98, 0.04, -0.7), True),
        (box(-0.36, 0.4, -0.1, 0.95), True),
        (box(0.1, 0.4, 0.36, 0.95), True),
        *_both(box(-0.78, -0.1, -0.56, 0.5)),
        (box(-0.52, -0.12, 0.52, 0.52), True),
        (box(-0.38, -0.72, 0.38, -0.18), True),
        *_both(box(-0.26, -0.56, -0.08, -0.38)),
    ],
    "dancer": [
        ([(-0.02, 0.3), (0.16, 0.3), (0.12, 0.98), (-0.02, 0.98)], True),
        ([(0.0, 0.3), (0.2, 0.25), (0.8, 0.7), (0.7, 0.82)], True),
        ([(-0.1, -0.3), (-0.7, -0.85), (-0.8, -0.74), (-0.16, -0.12)], True),
        ([(0.1, -0.3), (0.74, -0.45), (0.76, -0.32), (0.14, -0.12)], True),
        ([(-0.15, -0.36), (0.15, -0.36), (0.12, 0.05), (0.66, 0.42), (-0.66, 0.42), (-0.12, 0.05)],
         True),
        (ellipse(0, -0.62, 0.22, 0.24), True),
    ],
    "castle": [
        (box(-0.4, -0.3, 0.4, 0.9), True),
        *_both(box(-0.9, -0.5, -0.42, 0.9)),
        *_both([(-0.98, -0.5), (-0.66, -0.98), (-0.34, -0.5)]),
        (ellipse(0, 0.55, 0.18, 0.25, 180, 360) + [(0.18, 0.9), (-0.18, 0.9)], False),
        *_both(box(-0.3, -0.5, -0.1, -0.3)),
    ],
    "lighthouse": [
        (ellipse(0, 0.95, 0.8, 0.16, 180, 360), True),
        ([(-0.24, -0.45), (0.24, -0.45), (0.42, 0.9), (-0.42, 0.9)], True),
        (box(-0.34, -0.52, 0.34, -0.42), True),
        (box(-0.18, -0.75, 0.18, -0.52), True),
        ([(-0.26, -0.75), (0, -0.99), (0.26, -0.75)], True),
    ],
    "tent": [
        ([(-0.95, 0.8), (0, -0.85), (0.95, 0.8)], True),
        ([(-0.28, 0.8), (0, 0.0), (0.28, 0.8)], False),
    ],
    "windmill": [
        ([(-0.22, -0.3), (0.22, -0.3), (0.4, 0.95), (-0.4, 0.95)], True),
        ([(0, -0.3), (-0.75, -0.9), (-0.55, -0.98)], True),
        ([(0, -0.3), (0.55, -0.98), (0.75, -0.8)], True),
        ([(0, -0.3), (0.75, 0.28), (0.6, 0.42)], True),
        ([(0, -0.3), (-0.6, 0.42), (-0.78, 0.26)], True),
        (ellipse(0, -0.3, 0.1, 0.1), True),
    ],
    "tree": [
        (box(-0.13, 0.2, 0.13, 0.95), True),
        (ellipse(-0.36, -0.05, 0.42, 0.4), True),
        (ellipse(0.36, -0.05, 0.42, 0.4), True),
        (ellipse(0, -0.45, 0.52, 0.5), True),
    ],
    "cactus": [
        (box(-0.72, -0.1, -0.52, 0.3), True),
        (box(-0.72, 0.2, 0.0, 0.4), True),
        (box(0.52, -0.4, 0.72, 0.15), True),
        (box(0.0, 0.0, 0.72, 0.2), True),
        (ellipse(0, -0.65, 0.24, 0.32, 180, 360) + [(0.24, 0.95), (-0.24, 0.95)], True),
    ],
    "flower": [
        (box(-0.05, 0.2, 0.05, 0.95), True),
        ([(0.03, 0.75), (0.5, 0.4), (0.42, 0.8)], True),
        *_ring(6, 0.38, 0.27, -0.3),
        (ellipse(0, -0.3, 0.22, 0.22), True),
    ],
    "car": [
        ([(-0.55, 0.0), (-0.34, -0.45), (0.3, -0.45), (0.55, 0.0)], True),
        (box(-0.96, -0.05, 0.96, 0.42), True),
        (ellipse(-0.5, 0.44, 0.23, 0.23), True),
        (ellipse(0.5, 0.44, 0.23, 0.23), True),
        *_both(box(-0.3, -0.34, -0.05, -0.08)),
    ],
    "boat": [
        (box(-0.05, -0.95, 0.05, 0.35), True),
        ([(0.1, -0.9), (0.1, 0.15), (0.78, 0.15)], True),
        ([(-0.1, -0.7), (-0.1, 0.15), (-0.62, 0.15)], True),
        ([(-0.95, 0.3), (0.95, 0.3), (0.6, 0.82), (-0.6, 0.82)], True),
    ],
    "train": [
        (box(-0.72, -0.75, -0.5, -0.2), True),
        (box(-0.9, -0.25, 0.4, 0.4), True),
        (box(0.1, -0.75, 0.9, 0.4), True),
        (box(0.3, -0.55, 0.7, -0.2), False),
        *((ellipse(x, 0.52, _WHEEL, _WHEEL), True) for x in (-0.65, -0.15, 0.6)),
    ],
    "rocket": [
        *_both([(-0.28, 0.3), (-0.7, 0.9), (-0.28, 0.75)]),
        ([(-0.16, 0.7), (0.16, 0.7), (0, 0.99)], True),
        (
            [(-0.3, 0.75), (-0.36, 0.0), (-0.24, -0.5), (0, -0.98), (0.24, -0.5), (0.36, 0.0)]
            + [(0.3, 0.75)],
            True,
        ),
        (ellipse(0, -0.2, _WINDOW, _WINDOW), False),
    ],
}  # fmt: skip
SHAPES: dict[str, Parts] = {**looks.SHAPES, **THINGS}

# what several of them are called, if it is not the noun and an s
PLURALS = {"box": "boxes", "cross": "crosses", "fish": "fish"}

# where eyes and a hat are put, if not at (0, -.12) and (0, -.92)
FACE = {
    **looks.FACE,
    "lamp": (0.0, -0.4), "chair": (-0.28, -0.5), "bottle": (0.0, 0.2), "umbrella": (0.0, -0.35),
    "clock": (0.0, -0.25), "key": (-0.5, -0.34), "guitar": (0.0, 0.6), "book": (0.0, 0.1),
    "bell": (0.0, 0.1), "kite": (0.0, -0.3), "crown": (0.0, 0.2), "anchor": (0.0, -0.32),
    "bird": (-0.5, -0.4), "rabbit": (0.0, -0.22), "turtle": (-0.78, 0.1), "snail": (-0.78, -0.35),
    "butterfly": (0.0, -0.4), "owl": (0.0, -0.42), "elephant": (-0.58, -0.3),
    "penguin": (0.0, -0.68), "whale": (-0.55, 0.1), "king": (0.0, -0.38), "wizard": (0.0, -0.28),
    "robot": (0.0, -0.46), "dancer": (0.0, -0.62), "castle": (0.0, 0.1), "lighthouse": (0.0, -0.1),
    "tent": (0.0, -0.25), "windmill": (0.0, 0.25), "tree": (0.0, -0.35), "cactus": (0.0, -0.3),
    "flower": (0.0, -0.3), "car": (0.0, 0.15), "boat": (0.0, 0.55), "train": (-0.3, 0.05),
    "rocket": (0.0, 0.15),
}  # fmt: skip
TOP = {
    **looks.TOP,
    "clock": (0.0, -0.78), "key": (-0.5, -0.45), "book": (0.0, -0.42), "umbrella": (0.0, -0.82),
    "bird": (-0.48, -0.62), "rabbit": (0.0, -0.52), "turtle": (0.0, -0.42), "snail": (0.2, -0.52),
    "butterfly": (0.0, -0.68), "elephant": (-0.5, -0.56), "whale": (0.0, -0.28),
    "chair": (-0.28, -0.9), "car": (0.0, -0.42), "train": (0.5, -0.72), "crown": (0.0, -0.55),
    "tent": (0.0, -0.75), "wizard": (0.05, -0.9), "dancer": (0.0, -0.82),
}  # fmt: skip

COLORS: dict[str, Color] = {
    **looks.COLORS,
    "brown": (128, 78, 38), "grey": (136, 138, 142), "golden": (218, 168, 20),
    "silver": (196, 202, 212), "navy": (16, 24, 104), "maroon": (112, 10, 36),
    "olive": (122, 124, 22), "lime": (156, 236, 34), "turquoise": (66, 232, 212),
    "magenta": (232, 22, 190), "coral": (252, 122, 98), "beige": (232, 214, 174),
    "lavender": (186, 168, 240), "indigo": (78, 34, 214),
}  # fmt: skip


# --- patterns: object coordinates -> which colour, 0 or 1; materials: how light the first colour is


def _plain(u: np.ndarray, _v: np.ndarray) -> np.ndarray:
    return np.zeros(u.shape, int)


def _wavy(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.floor((v + 0.14 * np.sin(9 * u)) / 0.28).astype(int) % 2


def _starry(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = u % 0.7 - 0.35, v % 0.7 - 0.35
    return (np.abs(x * y) < 0.006).astype(int) * (np.hypot(x, y) < 0.3)


def _woven(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    over = (np.floor(u / 0.24) + np.floor(v / 0.24)) % 2
    across = np.where(over, u, v) % 0.24 / 0.24
    return 0.62 + 0.5 * np.sin(math.pi * across)


def _marbled(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    vein = np.abs(np.sin(4 * u + 3 * v + 1.8 * np.sin(3.1 * v - 2 * u) + np.sin(7 * u)))
    return 0.5 + 0.62 * np.clip(2.2 * vein, 0, 1)


def _furry(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    hair = np.sin(31 * u + 4 * np.sin(9 * v)) * np.sin(13 * v + 5 * np.sin(17 * u))
    return 0.86 + 0.3 * hair


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    **{name: looks.PAINTS[name] for name in looks.PATTERNS},
    "wavy": _wavy,
    "starry": _starry,
}
MATERIALS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "wooden": lambda u, v: 0.84 + 0.22 * np.sin(16 * v + 2.5 * np.sin(2.2 * u)),
    "furry": _furry,
    "shiny": lambda u, v: 0.72 + 0.95 * np.exp(-((u + 0.35) ** 2 + (v + 0.4) ** 2) / 0.09),
    "woven": _woven,
    "marbled": _marbled,
    "rusty": lambda u, v: 0.66 + 0.4 * (np.sin(11 * u + 2) * np.sin(9 * v + u * 4) > -0.25),
}
KINDS = (*PATTERNS, *MATERIALS)
# of concepts alone
CONCEPT_PATTERNS = {name: looks.PAINTS[name] for name in looks.CONCEPT_PATTERNS}
PAINTS = {**PATTERNS, **CONCEPT_PATTERNS, **dict.fromkeys(MATERIALS, _plain)}


def colors_of(kind: str) -> int:
    """How many colours a pattern or material shows, as far as captions say."""
    return 1 if kind == "plain" or kind in MATERIALS else 2
