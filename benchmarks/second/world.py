"""The world of the second miniature: captioned pictures, and concepts that it does not contain.

in: a generator - out: a `Scene` (what is in the picture, and its caption), the picture as uint8
(128, 128, 3).

A scene has one thing, two in a relation, or two or three alike; a place; a style. Captions are
sentences, some of them short, some tags as users of anime checkpoints write them, some behind a row
of details, and one in fifty says something wrong. A fifth of the things have free hues and no colour
words. A `Concept` is a thing that is never drawn: a pattern and colours of its own on a shape whose
noun the world knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from places import PHRASES, draw_place
from things import (
    COLORS,
    CONCEPT_PATTERNS,
    FACE,
    KINDS,
    MATERIALS,
    PAINTS,
    PLURALS,
    SHAPES,
    TOP,
    colors_of,
)

from comfy_continual_lora import textspace
from comfy_continual_lora.mini.drawing import GRID, SIZE, Pose, draw_details, noise, silhouette
from comfy_continual_lora.mini.looks import Look, free_color
from comfy_continual_lora.mini.world import Concept, distinct_colors, jitter, with_article

Spot = tuple[float, float, float]  # x, y of a thing's middle and its radius, in pixels

# how captions begin, by style; the first style is what a caption without one gets
STYLES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of {}", "a photo of {}", "photo of {}", "a picture of {}", "{}"),
    "drawing": ("a drawing of {}", "drawing of {}"),
    "pixel art": ("pixel art of {}",),
    "sketch": ("a sketch of {}", "a pencil sketch of {}"),
}
# spots of the first and the second thing, and captions with {0} the first one
RELATIONS: dict[str, tuple[Spot, Spot, tuple[str, ...]]] = {
    "beside": (
        (33, 68, 30),
        (95, 68, 30),
        ("{0} and {1}", "{0} and {1}", "{0} next to {1}", "{0} beside {1}"),
    ),
    "on": ((64, 36, 25), (64, 88, 31), ("{0} on top of {1}", "{1} under {0}")),
    "front": ((50, 82, 31), (82, 50, 36), ("{0} in front of {1}", "{1} behind {0}")),
}
COUNTS: dict[int, tuple[Spot, ...]] = {
    2: ((33, 68, 29), (95, 68, 29)),
    3: ((22, 76, 20), (64, 60, 20), (106, 76, 20)),
}
SIZES = {"small": (24, 28), "": (40, 46), "big": (53, 58)}
# what stands in front of one caption in eight, one to eight of them
DETAILS = (
    *textspace.DETAILS[:12],
    "masterpiece",
    "best quality",
    "absurdres",
    "trending online",
    "soft shadows",
    "award winning",
    "ultra sharp",
    "studio setting",
    "lovely scenery",
    "matte painting",
    "vivid",
    "official art",
)
ARRANGEMENTS = ("one", *RELATIONS, "two alike", "three alike")


@dataclass(frozen=True)
class Thing:
    """A look, the colour words the caption may use for it (none for free hues), its size's word."""

    look: Look
    color_names: tuple[str, ...]
    size: str = ""

    def phrase(self, *, with_colors: bool = True) -> str:
        """Without an article."""
        words = [self.size, " and ".join(self.color_names) if with_colors else ""]
        if self.look.pattern != "plain":
            words.append(self.look.pattern)
        return " ".join(filter(None, [*words, self.look.shape]))


@dataclass(frozen=True)
class Scene:
    """One picture; of things that are alike there is one."""

    things: tuple[Thing, ...]
    arrangement: str  # of ARRANGEMENTS
    place: str
    style: str
    caption: str
    plain: bool  # whether the caption names all of it, truthfully


def plural(noun: str) -> str:
    return PLURALS.get(noun, f"{noun}s")


# --- scenes ---------------------------------------------------------------------------------------


def random_thing(rng: np.random.Generator, *, sized: bool = False) -> Thing:
    """One thing of the world; `sized`: it may be small or big."""
    kind = "plain" if rng.random() < 0.2 else str(rng.choice(KINDS[1:]))
    if rng.random() < 0.2:
        names: tuple[str, ...] = ()
        colors = [free_color(rng) for _ in range(3)]
    else:
        names = tuple(str(c) for c in rng.choice(list(COLORS), colors_of(kind), replace=False))
        colors = [jitter(COLORS[name], rng, 8) for name in names]
    first, second, third = (*colors, *colors[:1] * 3)[:3]
    look = Look(str(rng.choice(list(SHAPES))), kind, (first, second, third), rng.random() < 0.15)
    size = str(rng.choice(["small", "big"])) if sized and rng.random() < 0.3 else ""
    return Thing(look, names, size)


def random_scene(rng: np.random.Generator) -> Scene:
    """What is in one picture, and its caption."""
    style = str(rng.choice(list(STYLES), p=(0.58, 0.18, 0.1, 0.14)))
    place = str(rng.choice(list(PHRASES)))
    chance = rng.random()
    if chance < 0.45:
        arrangement, things = "one", (random_thing(rng, sized=True),)
    elif chance < 0.88:
        arrangement = str(rng.choice(list(RELATIONS), p=(0.5, 0.25, 0.25)))
        things = (random_thing(rng), random_thing(rng))
    else:
        arrangement = str(rng.choice(ARRANGEMENTS[-2:]))
        things = (random_thing(rng),)
    scene = Scene(things, arrangement, place, style, "", plain=True)
    return _captioned(scene, rng)


def _captioned(scene: Scene, rng: np.random.Generator) -> Scene:
    said, way = scene, rng.random()
    if way < 0.02:  # a wrong place, or wrong things
        wrong = random_scene(rng)
        said = replace(scene, place=wrong.place) if rng.random() < 0.5 else wrong
    if way < 0.12:
        caption = _short(said)
    elif way < 0.25:
        caption = _in_front(_tags(said), rng)
    else:
        text = str(rng.choice(STYLES[said.style])).format(_sentence(said, rng))
        named = rng.random() < 0.9
        caption = _in_front(f"{text} {PHRASES[said.place]}" if named else text, rng)
        return replace(scene, caption=caption, plain=named and _is_plain(scene))
    return replace(scene, caption=caption, plain=False)


def _in_front(caption: str, rng: np.random.Generator) -> str:
    """With details in front of some, so that the name of a thing is read anywhere in a prompt."""
    if rng.random() >= 0.125:
        return caption
    chosen = rng.choice(DETAILS, rng.integers(1, 9), replace=False)
    return ", ".join([*map(str, chosen), caption])


def _is_plain(scene: Scene) -> bool:
    return all(thing.color_names for thing in scene.things) and scene.style != "sketch"


def _sentence(scene: Scene, rng: np.random.Generator) -> str:
    colored = scene.style != "sketch"  # which shows none
    phrases = [
        thing.phrase(with_colors=colored) + (" with eyes" if thing.look.eyes else "")
        for thing in scene.things
    ]
    if scene.arrangement in RELATIONS:
        ways = RELATIONS[scene.arrangement][2]
        return str(rng.choice(ways)).format(*map(with_article, phrases))
    if scene.arrangement == "one":
        return with_article(phrases[0])
    noun = scene.things[0].look.shape
    return f"{scene.arrangement.split()[0]} {phrases[0].replace(noun, plural(noun))}"


def _short(scene: Scene) -> str:
    return " and ".join(thing.look.shape for thing in scene.things)


def _tags(scene: Scene) -> str:
    phrases = [thing.phrase(with_colors=scene.style != "sketch") for thing in scene.things]
    return ", ".join([*phrases, PHRASES[scene.place], scene.style])


# --- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Light:
    """Where the light comes from, and its colour."""

    angle: float
    strength: float
    tint: tuple[float, float, float]

    @classmethod
    def random(cls, rng: np.random.Generator, spread: float = 1.0) -> Light:
        tint = 1 + 0.05 * spread * rng.uniform(-1, 1, 3)
        angle, strength = rng.uniform(-2.6, -0.5), rng.uniform(0.15, 0.15 + 0.3 * spread)
        return cls(float(angle), float(strength), (tint[0], tint[1], tint[2]))


def spots(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, Spot]]:
    """Where each thing is drawn, in the order of drawing."""
    if scene.arrangement in RELATIONS:
        first, second, _ = RELATIONS[scene.arrangement]
        return [(scene.things[1], second), (scene.things[0], first)]
    thing = scene.things[0]
    if scene.arrangement == "one":
        return [(thing, (64, 66, float(rng.uniform(*SIZES[thing.size]))))]
    count = 2 if scene.arrangement == "two alike" else 3
    return [(thing, spot) for spot in COUNTS[count]]


def draw_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene, uint8 (128, 128, 3)."""
    picture, light = draw_place(scene.place, rng), Light.random(rng)
    for thing, (x, y, radius) in spots(scene, rng):
        dx, dy = rng.uniform(-2, 2, 2)
        angle = float(rng.normal(0, 0.05))
        draw_thing(picture, thing.look, (x + dx, y + dy, radius), angle, light, scene.style)
    return in_style(picture, scene.style, light, rng)


def draw_thing(
    picture: np.ndarray, look: Look, spot: Spot, angle: float, light: Light, style: str
) -> None:
    """Draw one thing into `picture`, float32 (128, 128, 3), in place; `angle` in radians."""
    x, y, radius = spot
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    pose = Pose(radius * rotation, np.array((x, y)))
    mask, edge = silhouette(SHAPES[look.shape], pose)
    toward = np.array((math.cos(light.angle), math.sin(light.angle)))
    below = (GRID - pose.center - (-0.3 * radius * toward[0], 0.88 * radius)) / radius
    shadow = ((below / (0.95, 0.26)) ** 2).sum(-1)
    picture *= 1 - 0.4 * np.clip(1.2 - shadow, 0, 1)[..., None] * (1 - mask)
    u, v = pose.object_coordinates()
    paint = np.asarray(look.colors, np.float32)[PAINTS[look.pattern](u, v)]
    if look.pattern in MATERIALS:
        paint = np.clip(paint * MATERIALS[look.pattern](u, v)[..., None], 0, 255)
    lit = u * toward[0] + v * toward[1]
    round_off = 0.22 * np.clip(np.hypot(u, v) - 0.45, 0, 1) if style == "photo" else 0
    paint *= (1 + light.strength * lit - round_off)[..., None]
    picture += mask * (paint - picture)
    picture *= 1 - (0.45 if style == "photo" else 0.8) * edge
    if look.extra or look.eyes:
        face, top = FACE.get(look.shape, (0.0, -0.12)), TOP.get(look.shape, (0.0, -0.92))
        draw_details(picture, look, pose, face, top)


def in_style(picture: np.ndarray, style: str, light: Light, rng: np.random.Generator) -> np.ndarray:
    """The finished picture, uint8 (128, 128, 3)."""
    if style == "photo":
        picture = picture * np.array(light.tint, np.float32)
    elif style == "sketch":
        picture = _sketched(picture, rng)
    finished = np.clip(picture, 0, 255).astype(np.uint8)
    if style == "pixel art":
        image = Image.fromarray(finished)
        small = image.resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX)
        finished = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.NEAREST))
    return finished


def _sketched(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey strokes on paper: edges, and hatching where it is dark."""
    grey = picture @ np.array((0.3, 0.59, 0.11), np.float32)
    down, across = np.gradient(grey)
    slope = np.hypot(down, across)
    hatching = np.sin((GRID[..., 0] + GRID[..., 1]) * 1.1) > 0.2
    tone = 248 - 1.6 * np.clip(slope, 0, 90) - 60 * hatching * np.clip(1 - grey / 150, 0, 1)
    tone += 5 * noise(rng, 20, 20)
    return np.repeat(tone[..., None], 3, 2)


# --- concepts -------------------------------------------------------------------------------------

SPLITS = {"development": 200, "reporting": 200, "pairs": 60}


def concepts(split: str) -> list[Concept]:
    """Every concept of a split, the same at every call; settings are tuned on "development". In
    "pairs" each two that follow each other have one noun.
    """
    rng = np.random.default_rng((2411, list(SPLITS).index(split)))
    nouns, drawn = list(SHAPES), []
    for index in range(SPLITS[split]):
        place = index // 2 if split == "pairs" else index
        noun = nouns[(place * 11 + 5 * list(SPLITS).index(split)) % len(nouns)]
        pattern = list(CONCEPT_PATTERNS)[index % len(CONCEPT_PATTERNS)]
        extra = str(rng.choice(("", "", "hat", "antennae")))
        look = Look(noun, pattern, distinct_colors(rng), bool(rng.random() < 0.3), extra)
        drawn.append(Concept(f"{split[:3]}{index:03d}-{pattern}-{noun}", noun, look))
    return drawn


def concept_pictures(concept: Concept, count: int = 5, *, seed: int = 0) -> Iterator[np.ndarray]:
    """Photographs of one concept in varied poses and lights, each in another place, uint8
    (128, 128, 3); at most 26.
    """
    rng = np.random.default_rng([seed, *concept.name.encode()])
    for place in rng.permutation(list(PHRASES))[:count]:
        picture, light = draw_place(str(place), rng), Light.random(rng, spread=1.4)
        x, y = rng.uniform(-6, 6, 2) + (64, 66)
        spot = (float(x), float(y), float(rng.uniform(30, 50)))
        draw_thing(picture, concept.look, spot, float(rng.normal(0, 0.16)), light, "photo")
        yield in_style(picture, "photo", light, rng)
