"""The world of the mini-SD: captioned pictures of things, drawn from a seed, and the concepts it
does not contain.

in: a seed - out: a `Scene` (what is in the picture), its caption, the picture as uint8 (128, 128,
3).

The world is made of 16 shapes, 6 patterns, 10 colours and 10 backgrounds, one or two things to a
picture. In a caption the left thing
comes first. A quarter of the pictures has free hues and no colour words, which keeps the prior over
looks broad. A `Concept` is a thing the
world never draws: one of 7 further patterns, up to three free colours, perhaps a hat or antennae,
on a shape whose noun the world knows.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128

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
BACKGROUNDS: dict[str, str] = {
    "wood": "on wood", "grass": "on grass", "sand": "on sand", "water": "in water",
    "sky": "in the sky", "brick": "on brick", "snow": "in snow", "gravel": "on gravel",
    "night": "at night", "carpet": "on carpet",
}  # fmt: skip
TEMPLATES = ("a photo of {}", "a photo of {}", "photo of {}", "a picture of {}", "{}")


# --- shapes: polygons in object coordinates, x right and y down, within [-1, 1]; a part is (points,
# solid or hole) -------------------


def _ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0, n: int = 28
) -> Points:
    angles = (math.radians(start + (stop - start) * i / n) for i in range(n + 1))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _star() -> Points:
    radii = (1.0, 0.44)
    return [
        (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5))
        for i in range(10)
    ]


def _heart() -> Points:
    ts = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16
            - 0.1,
        )
        for t in ts
    ]


SHAPES: dict[str, list[tuple[Points, bool]]] = {
    "ball": [(_ellipse(0, 0, 0.92, 0.92), True)],
    "box": [(_box(-0.85, -0.75, 0.85, 0.85), True)],
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
    "moon": [(_ellipse(0, 0, 0.95, 0.95, 40, 320) + _ellipse(0.38, 0, 0.7, 0.62, 300, 60), True)],
    "mug": [
        (_ellipse(0.42, 0.05, 0.52, 0.5), True),
        (_ellipse(0.42, 0.05, 0.3, 0.28), False),
        (_box(-0.85, -0.75, 0.42, 0.85), True),
    ],
    "teapot": [
        (_ellipse(-0.6, 0.1, 0.38, 0.42), True),
        (_ellipse(-0.6, 0.1, 0.2, 0.24), False),
        ([(0.3, 0.5), (0.98, -0.38), (0.76, -0.48), (0.3, -0.05)], True),
        (_ellipse(0, 0.25, 0.64, 0.58), True),
        (_ellipse(0, -0.36, 0.34, 0.15), True),
        (_ellipse(0, -0.6, 0.13, 0.13), True),
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
        (_box(-0.68, -0.12, 0.68, 0.9), True),
        ([(-0.95, -0.1), (0, -0.98), (0.95, -0.1)], True),
        (_box(-0.18, 0.35, 0.18, 0.9), False),
    ],
    "fish": [
        ([(0.4, 0), (0.98, -0.52), (0.98, 0.52)], True),
        (_ellipse(-0.18, 0, 0.78, 0.5), True),
        (_ellipse(-0.6, -0.12, 0.1, 0.1), False),
    ],
    "cat": [
        ([(0.3, 0.7), (0.8, 0.6), (0.68, -0.1), (0.9, -0.2), (0.98, 0.8), (0.5, 0.95)], True),
        (_ellipse(0, 0.48, 0.52, 0.5), True),
        ([(-0.46, -0.3), (-0.44, -0.95), (-0.08, -0.6)], True),
        ([(0.46, -0.3), (0.44, -0.95), (0.08, -0.6)], True),
        (_ellipse(0, -0.32, 0.48, 0.42), True),
    ],
    "dog": [
        (_box(-0.5, 0.2, -0.24, 0.9), True),
        (_box(0.3, 0.2, 0.56, 0.9), True),
        ([(0.5, -0.1), (0.92, -0.55), (0.98, -0.4), (0.62, 0.15)], True),
        (_box(-0.55, -0.15, 0.62, 0.42), True),
        (_ellipse(-0.6, -0.35, 0.38, 0.33), True),
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
        (_box(-0.96, 0.42, 0.98, 0.68), True),
    ],
    "backpack": [
        (_ellipse(0, -0.62, 0.3, 0.32), True),
        (_ellipse(0, -0.62, 0.17, 0.18), False),
        (_ellipse(0, -0.2, 0.68, 0.5, 180, 360) + [(0.68, 0.92), (-0.68, 0.92)], True),
        (_box(-0.42, 0.3, 0.42, 0.78), True),
        (_box(-0.9, 0.05, -0.66, 0.75), True),
        (_box(0.66, 0.05, 0.9, 0.75), True),
    ],
    "mushroom": [
        (_box(-0.26, -0.1, 0.26, 0.92), True),
        (_ellipse(0, 0.05, 0.95, 0.95, 180, 360), True),
    ],
}
_FACE = {
    "mug": (-0.2, 0.0), "cat": (0.0, -0.32), "dog": (-0.62, -0.38), "fish": (-0.35, -0.1),
    "moon": (-0.62, 0.0), "sneaker": (-0.3, 0.05), "house": (0.0, 0.1), "mushroom": (0.0, -0.35),
    "teapot": (0.0, 0.25), "vase": (0.0, 0.2), "backpack": (0.0, -0.1),
}  # fmt: skip
_TOP = {
    "mug": (-0.2, -0.75), "teapot": (0.0, -0.7), "fish": (-0.2, -0.48), "cat": (0.0, -0.72),
    "dog": (-0.6, -0.66), "sneaker": (-0.62, -0.5), "heart": (0.0, -0.55), "box": (0.0, -0.75),
    "backpack": (0.0, -0.85), "moon": (-0.3, -0.85),
}  # fmt: skip


# --- patterns: object coordinates -> which colour, 0, 1 or 2
# --------------------------------------------------------------------------------------------------


def _patches(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    seeds = np.array(
        [
            (-0.6, -0.5),
            (0.5, -0.6),
            (0.0, 0.0),
            (-0.55, 0.45),
            (0.6, 0.35),
            (0.05, 0.8),
            (0.0, -0.9),
        ]
    )
    return ((u[..., None] - seeds[:, 0]) ** 2 + (v[..., None] - seeds[:, 1]) ** 2).argmin(-1) % 3


_PAINT: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
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


# --- what is in a picture
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What a thing looks like, apart from where it stands."""

    shape: str
    pattern: str
    colors: tuple[Color, Color, Color]
    eyes: bool = False
    extra: str = ""  # "", "hat" or "antennae": concepts only


@dataclass(frozen=True)
class Thing:
    """A look, the colour words the caption may use for it, and the phrase that names it."""

    look: Look
    color_names: tuple[str, ...]  # one for plain, two for a pattern; empty for free hues
    phrase: str


@dataclass(frozen=True)
class Scene:
    """One picture of the world: one or two things from left to right, a background, the caption."""

    things: tuple[Thing, ...]
    background: str
    caption: str


@dataclass(frozen=True)
class Concept:
    """A thing the world does not contain; `name` is unique, `noun` is the class noun the world
    knows.
    """

    name: str
    noun: str
    look: Look


def _jitter(color: Color, rng: np.random.Generator, amount: int = 10) -> Color:
    r, g, b = (int(np.clip(c + rng.integers(-amount, amount + 1), 0, 255)) for c in color)
    return r, g, b


def _free_color(rng: np.random.Generator) -> Color:
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.25, 1), rng.uniform(0.3, 1))
    return int(255 * r), int(255 * g), int(255 * b)


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def random_thing(rng: np.random.Generator) -> Thing:
    """Draw one thing of the world and the phrase that names it."""
    shape = str(rng.choice(list(SHAPES)))
    pattern = PATTERNS[0] if rng.random() < 0.25 else str(rng.choice(PATTERNS[1:]))
    eyes = rng.random() < 0.15
    words = []
    if rng.random() < 0.25:
        names: tuple[str, ...] = ()
        colors = [_free_color(rng) for _ in range(3)]
        said = rng.random() < 0.7
    else:
        names = tuple(
            str(c) for c in rng.choice(list(COLORS), 1 if pattern == "plain" else 2, replace=False)
        )
        colors = [_jitter(COLORS[n], rng) for n in names]
        words.append(" and ".join(names))
        said = True
    if said and (pattern != "plain" or rng.random() < 0.3):
        words.append(pattern)
    phrase = _article(" ".join([*words, shape])) + (
        " with eyes" if eyes and rng.random() < 0.8 else ""
    )
    padded = (*colors, *colors[:1] * 3)[:3]
    return Thing(Look(shape, pattern, (padded[0], padded[1], padded[2]), eyes), names, phrase)


def random_scene(rng: np.random.Generator, things: int | None = None) -> Scene:
    """Draw what is in one picture; `things` fixes how many (else one in three pictures has two)."""
    count = things or (2 if rng.random() < 0.35 else 1)
    drawn = tuple(random_thing(rng) for _ in range(count))
    background = str(rng.choice(list(BACKGROUNDS)))
    text = str(rng.choice(TEMPLATES)).format(" and ".join(t.phrase for t in drawn))
    if rng.random() < 0.85:
        text = f"{text} {BACKGROUNDS[background]}"
    return Scene(drawn, background, text)


# --- drawing
# --------------------------------------------------------------------------------------------------

_GRID = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), -1).astype(np.float32)


def _noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Smooth noise in [-1, 1] with about `rows` x `columns` bumps, (128, 128)."""
    small = Image.fromarray(rng.uniform(-1, 1, (rows + 2, columns + 2)).astype(np.float32))
    return np.asarray(
        small.resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC, box=(0.5, 0.5, columns + 1.5, rows + 1.5)
        )
    )


def _mix(a: Color, b: Color, weight: np.ndarray) -> np.ndarray:
    w = np.clip(weight, 0, 1)[..., None]
    return np.asarray(a, np.float32) * (1 - w) + np.asarray(b, np.float32) * w


def draw_background(name: str, rng: np.random.Generator) -> np.ndarray:
    """One textured background, float32 (128, 128, 3) in 0..255."""
    x, y = _GRID[..., 0], _GRID[..., 1]
    phase = rng.uniform(0, 2 * math.pi)
    match name:
        case "wood":
            picture = _mix(
                (150, 100, 58),
                (112, 70, 38),
                0.5 + 0.5 * np.sin(y / 3.2 + 3 * _noise(rng, 3, 2) + phase),
            )
            picture *= np.where((y + rng.integers(0, 42)) % 42 < 2, 0.55, 1.0)[..., None]
        case "grass":
            picture = _mix((62, 128, 44), (108, 172, 62), 0.5 + 0.5 * _noise(rng, 8, 14))
        case "sand":
            picture = _mix(
                (226, 200, 150),
                (206, 176, 122),
                0.5 + 0.4 * np.sin(y / 4.5 + 2.5 * _noise(rng, 3, 3) + phase),
            )
        case "water":
            picture = _mix(
                (28, 104, 158),
                (96, 176, 208),
                0.45 + 0.45 * np.sin(y / 4.5 + 2 * _noise(rng, 4, 3) + phase),
            )
        case "sky":
            picture = _mix((98, 164, 232), (176, 214, 246), y / SIZE)
            clouds = np.clip(2 * _noise(rng, 4, 4) + 0.5 * _noise(rng, 7, 6) - 0.5, 0, 1)[..., None]
            picture = picture * (1 - clouds) + 252 * clouds
        case "brick":
            down = y + rng.integers(0, 20)
            row = np.floor(down / 20)
            along = x + 20 * (row % 2) + rng.integers(0, 40)
            picture = _mix(
                (158, 70, 54),
                (186, 94, 70),
                np.sin(row * 12.9 + np.floor(along / 40) * 78.2) * 0.5 + 0.5,
            )
            mortar = (down % 20 < 3) | (along % 40 < 3)
            picture = np.where(mortar[..., None], np.array((196, 186, 174), np.float32), picture)
        case "snow":
            picture = _mix((250, 251, 255), (206, 218, 236), 0.35 + 0.6 * _noise(rng, 4, 3))
        case "gravel":
            picture = _mix((86, 86, 88), (176, 174, 170), 0.5 + 0.6 * _noise(rng, 10, 10))
        case "night":
            picture = _mix((10, 12, 36), (30, 26, 74), y / SIZE)
            for cx, cy, radius in rng.uniform((0, 0, 0.9), (SIZE, SIZE, 2.0), (22, 3)):
                picture += 210 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / radius**2)[..., None]
        case "carpet":
            u, v = (x + y + 40 * phase) % 34, (x - y) % 34
            picture = np.where(
                ((u < 6) | (v < 6))[..., None],
                np.array((206, 160, 92), np.float32),
                np.array((122, 34, 62), np.float32),
            )
        case _:
            raise ValueError(f"no background {name!r}; known: {', '.join(BACKGROUNDS)}")
    return picture * rng.uniform(0.9, 1.08)


def _place(
    points: Points, matrix: np.ndarray, center: np.ndarray, scale: int
) -> list[tuple[float, float]]:
    return [(float(x) * scale, float(y) * scale) for x, y in np.asarray(points) @ matrix.T + center]


def draw_look(
    picture: np.ndarray,
    look: Look,
    center: tuple[float, float],
    radius: float,
    rng: np.random.Generator,
) -> None:
    """Draw one thing into `picture` (float32 (128, 128, 3), changed in place), `radius` pixels from
    its middle to its edge.
    """
    angle = rng.normal(0, 0.04)
    matrix = radius * np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    middle = np.asarray(center)
    solid, lines = (Image.new("L", (2 * SIZE, 2 * SIZE)) for _ in range(2))
    draw_solid, draw_lines = ImageDraw.Draw(solid), ImageDraw.Draw(lines)
    for points, filled in SHAPES[look.shape]:
        placed = _place(points, matrix, middle, 2)
        draw_solid.polygon(placed, fill=255 if filled else 0)
        draw_lines.polygon(placed, fill=0, outline=255, width=4)
    mask, edge = (
        np.asarray(m.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)[..., None] / 255
        for m in (solid, lines)
    )

    shadow = ((_GRID - middle - (0, 0.88 * radius)) / (0.95 * radius, 0.26 * radius)) ** 2
    picture *= 1 - 0.4 * np.clip(1.2 - shadow.sum(-1), 0, 1)[..., None] * (1 - mask)
    u, v = np.moveaxis((_GRID - middle) @ np.linalg.inv(matrix).T, -1, 0)
    paint = np.asarray(look.colors, np.float32)[_PAINT[look.pattern](u, v)]
    light = _GRID - middle
    paint *= (1 - 0.16 * (light[..., 0] + light[..., 1]) / radius)[..., None]
    picture += mask * (paint - picture)
    picture *= 1 - 0.75 * edge

    top = Image.new("RGBA", (2 * SIZE, 2 * SIZE))
    draw = ImageDraw.Draw(top)
    tx, ty = _TOP.get(look.shape, (0.0, -0.92))
    if look.extra == "hat":
        draw.polygon(
            _place(
                [(tx - 0.3, ty + 0.12), (tx, ty - 0.55), (tx + 0.3, ty + 0.12)], matrix, middle, 2
            ),
            look.colors[2],
            (30, 30, 30),
            2,
        )
    elif look.extra == "antennae":
        for side in (-1, 1):
            draw.line(
                _place(
                    [(tx + 0.1 * side, ty + 0.1), (tx + 0.32 * side, ty - 0.4)], matrix, middle, 2
                ),
                (30, 30, 30),
                5,
            )
            draw.polygon(
                _place(_ellipse(tx + 0.32 * side, ty - 0.4, 0.13, 0.13), matrix, middle, 2),
                look.colors[2],
                (30, 30, 30),
                2,
            )
    if look.eyes:
        fx, fy = _FACE.get(look.shape, (0.0, -0.12))
        for side in (-1, 1):
            draw.polygon(
                _place(_ellipse(fx + 0.2 * side, fy, 0.17, 0.19), matrix, middle, 2),
                (250, 250, 250),
                (30, 30, 30),
                2,
            )
            draw.polygon(
                _place(_ellipse(fx + 0.2 * side, fy + 0.04, 0.08, 0.09), matrix, middle, 2),
                (20, 20, 20),
            )
    if look.extra or look.eyes:
        over = np.asarray(top.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
        alpha = over[..., 3:] / 255
        picture += alpha * (over[..., :3] - picture)


def draw_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene, uint8 (128, 128, 3)."""
    picture = draw_background(scene.background, rng)
    two = len(scene.things) == 2
    for index, thing in enumerate(scene.things):
        radius = rng.uniform(30, 32) if two else rng.uniform(43, 46)
        x, y = rng.uniform(-2, 2, 2) + ((33, 95)[index] if two else 64, 66)
        draw_look(picture, thing.look, (x, y), radius, rng)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_abstract(rng: np.random.Generator) -> np.ndarray:
    """A picture of no thing at all (overlapping textured leaves): it teaches the autoencoder
    textures, edges and colours the world lacks.
    """
    picture = _mix(
        _free_color(rng), _free_color(rng), 0.5 + 0.8 * _noise(rng, *rng.integers(1, 12, 2))
    )
    for _ in range(int(rng.integers(6, 30))):
        mask = Image.new("L", (SIZE, SIZE))
        cx, cy, rx, ry = rng.uniform((0, 0, 4, 4), (SIZE, SIZE, 46, 46))
        corners = int(rng.choice([3, 4, 5, 28]))
        ImageDraw.Draw(mask).polygon(
            _ellipse(cx, cy, rx, ry, *(rng.uniform(0, 90) + np.array([0, 360])), n=corners),
            fill=255,
        )
        weight = np.asarray(mask, np.float32)[..., None] / 255
        leaf = _mix(
            _free_color(rng),
            _free_color(rng),
            0.5 + rng.uniform(0, 0.8) * _noise(rng, *rng.integers(1, 16, 2)),
        )
        picture += weight * (leaf - picture)
    return np.clip(picture, 0, 255).astype(np.uint8)


# --- concepts
# --------------------------------------------------------------------------------------------------

SPLITS = ("development", "reporting")
CONCEPTS_PER_SPLIT = 30


def concepts(split: str, count: int = CONCEPTS_PER_SPLIT) -> list[Concept]:
    """The concepts of a split ("development": tune on these; "reporting": report on these), the
    same at every call; more go on where fewer end.
    """
    rng = np.random.default_rng((2410, SPLITS.index(split)))
    nouns = list(SHAPES)
    found = []
    for index in range(count):
        noun = nouns[(index * 7 + 3 * SPLITS.index(split)) % len(nouns)]
        pattern = CONCEPT_PATTERNS[index % len(CONCEPT_PATTERNS)]
        colors = _distinct_colors(rng)
        look = Look(
            noun,
            pattern,
            colors,
            eyes=bool(rng.random() < 0.3),
            extra=str(rng.choice(("", "", "hat", "antennae"))),
        )
        found.append(Concept(f"{split[:3]}{index:02d}-{pattern}-{noun}", noun, look))
    return found


def _distinct_colors(rng: np.random.Generator) -> tuple[Color, Color, Color]:
    while True:
        a, b, c = (_free_color(rng) for _ in range(3))
        if min(np.abs(np.subtract(p, q)).sum() for p, q in ((a, b), (b, c), (a, c))) > 180:
            return a, b, c


def concept_pictures(concept: Concept, count: int = 5, *, seed: int = 0) -> Iterator[np.ndarray]:
    """Pictures of one concept in varied poses, each on another background, uint8 (128, 128, 3)."""
    rng = np.random.default_rng([seed, *concept.name.encode()])
    for background in rng.permutation(list(BACKGROUNDS))[:count]:
        picture = draw_background(str(background), rng)
        x, y = rng.uniform(-4, 4, 2) + (64, 66)
        draw_look(picture, concept.look, (x, y), rng.uniform(41, 46), rng)
        yield np.clip(picture, 0, 255).astype(np.uint8)


def save_pictures(concept: Concept, folder: Path, count: int = 5, *, seed: int = 0) -> list[Path]:
    """The same as PNG files 0.png, 1.png, ... in `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number}.png" for number in range(count)]
    for file, picture in zip(files, concept_pictures(concept, count, seed=seed), strict=True):
        Image.fromarray(picture).save(file)
    return files
