"""The world of the mini-SD: captioned pictures of things, and concepts that it does not contain.

in: a seed - out: a `Scene` (what is in the picture, and its caption), the picture as uint8
(128, 128, 3).

The world is made of 16 shapes, 6 patterns, 10 colours and 10 backgrounds, one or two things to a
picture. In a caption the left thing comes first. A quarter of the things have free hues and no
colour words, which keeps the prior over looks broad. A `Concept` is a thing the world never draws:
one of 7 further patterns, up to three free colours, perhaps a hat or antennae, on a shape whose noun
the world knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .drawing import draw_background, draw_look
from .looks import BACKGROUNDS, COLORS, CONCEPT_PATTERNS, PATTERNS, SHAPES, Color, Look, free_color

TEMPLATES = ("a photo of {}", "a photo of {}", "photo of {}", "a picture of {}", "{}")


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
    """A thing the world does not contain."""

    name: str  # unique
    noun: str  # the class noun, which the world knows
    look: Look


def jitter(color: Color, rng: np.random.Generator, amount: int = 10) -> Color:
    """The colour, each channel off by at most `amount`."""
    r, g, b = (int(np.clip(c + rng.integers(-amount, amount + 1), 0, 255)) for c in color)
    return r, g, b


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def random_thing(rng: np.random.Generator) -> Thing:
    """Draw one thing of the world and the phrase that names it."""
    shape = str(rng.choice(list(SHAPES)))
    pattern = PATTERNS[0] if rng.random() < 0.25 else str(rng.choice(PATTERNS[1:]))
    eyes = rng.random() < 0.15
    words = []
    if rng.random() < 0.25:
        names: tuple[str, ...] = ()
        colors = [free_color(rng) for _ in range(3)]
        pattern_named = rng.random() < 0.7
    else:
        count = 1 if pattern == "plain" else 2
        names = tuple(str(c) for c in rng.choice(list(COLORS), count, replace=False))
        colors = [jitter(COLORS[n], rng) for n in names]
        words.append(" and ".join(names))
        pattern_named = True
    if pattern_named and (pattern != "plain" or rng.random() < 0.3):
        words.append(pattern)
    phrase = with_article(" ".join([*words, shape]))
    if eyes and rng.random() < 0.8:
        phrase += " with eyes"
    first, second, third = (*colors, *colors[:1] * 3)[:3]
    return Thing(Look(shape, pattern, (first, second, third), eyes), names, phrase)


def random_scene(rng: np.random.Generator, things: int | None = None) -> Scene:
    """Draw what is in one picture: `things` things, by default two in one picture of three."""
    count = things or (2 if rng.random() < 0.35 else 1)
    drawn = tuple(random_thing(rng) for _ in range(count))
    background = str(rng.choice(list(BACKGROUNDS)))
    text = str(rng.choice(TEMPLATES)).format(" and ".join(t.phrase for t in drawn))
    if rng.random() < 0.85:
        text = f"{text} {BACKGROUNDS[background]}"
    return Scene(drawn, background, text)


def draw_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene, uint8 (128, 128, 3)."""
    picture = draw_background(scene.background, rng)
    two = len(scene.things) == 2
    for index, thing in enumerate(scene.things):
        radius = rng.uniform(30, 32) if two else rng.uniform(43, 46)
        x, y = rng.uniform(-2, 2, 2) + ((33, 95)[index] if two else 64, 66)
        draw_look(picture, thing.look, (x, y), radius, rng)
    return np.clip(picture, 0, 255).astype(np.uint8)


# --- concepts

SPLITS = ("development", "reporting", "test", "pairs")
CONCEPTS_PER_SPLIT = 30


def concepts(split: str, count: int = CONCEPTS_PER_SPLIT) -> list[Concept]:
    """The first `count` concepts of a split, the same at every call.

    Settings are tuned on "development". Results until 2026-11 are of "reporting", on which some
    settings were chosen as well; since then they are of "test", and of "pairs" for several things
    in one prompt, which no decision has looked at.
    """
    rng = np.random.default_rng((2410, SPLITS.index(split)))
    nouns = list(SHAPES)
    drawn = []
    for index in range(count):
        noun = nouns[(index * 7 + 3 * SPLITS.index(split)) % len(nouns)]
        pattern = CONCEPT_PATTERNS[index % len(CONCEPT_PATTERNS)]
        colors = distinct_colors(rng)
        look = Look(
            noun,
            pattern,
            colors,
            eyes=bool(rng.random() < 0.3),
            extra=str(rng.choice(("", "", "hat", "antennae"))),
        )
        drawn.append(Concept(f"{split[:3]}{index:02d}-{pattern}-{noun}", noun, look))
    return drawn


def distinct_colors(rng: np.random.Generator) -> tuple[Color, Color, Color]:
    """Three colours of any hue that nobody takes for one another."""
    while True:
        a, b, c = (free_color(rng) for _ in range(3))
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
    """Write `concept_pictures` as 0.png, 1.png, ... to `folder`, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number}.png" for number in range(count)]
    for file, picture in zip(files, concept_pictures(concept, count, seed=seed), strict=True):
        Image.fromarray(picture).save(file)
    return files
