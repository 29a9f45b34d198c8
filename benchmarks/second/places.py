"""The 26 places of the second world: the ten of the mini-SD's and sixteen more.

in: a place's name, a generator - out: float32 (128, 128, 3) in 0..255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from comfy_continual_lora.mini.drawing import GRID, SIZE, draw_background, mix, noise
from comfy_continual_lora.mini.looks import BACKGROUNDS, Color

Draw = Callable[[np.random.Generator], np.ndarray]
_X, _Y = GRID[..., 0], GRID[..., 1]


def _flat(color: Color) -> np.ndarray:
    return np.broadcast_to(np.array(color, np.float32), (SIZE, SIZE, 3)).copy()


def _painted(
    picture: np.ndarray, points: Sequence[tuple[float, float]], color: Color
) -> np.ndarray:
    """With a polygon (in pixels) on it."""
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).polygon(list(points), fill=255)
    weight = np.asarray(mask, np.float32)[..., None] / 255
    return picture + weight * (np.array(color, np.float32) - picture)


def _rectangle(
    picture: np.ndarray, x0: float, y0: float, x1: float, y1: float, color: Color
) -> np.ndarray:
    return _painted(picture, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)


def _floor(wall: np.ndarray, floor: np.ndarray, height: float) -> np.ndarray:
    return np.where((height < _Y)[..., None], floor, wall)


def _room(rng: np.random.Generator) -> np.ndarray:
    stripes = (_X + rng.integers(0, 20)) % 20 < 10
    wall = mix((214, 206, 178), (226, 220, 198), stripes.astype(np.float32))
    boards = mix((166, 118, 74), (140, 96, 58), ((_X + 0.4 * _Y) % 26 < 13).astype(np.float32))
    picture = _floor(wall, boards, 86)
    return _rectangle(picture, 0, 84, SIZE, 89, (250, 248, 240))


def _street(rng: np.random.Generator) -> np.ndarray:
    picture = _floor(_flat((176, 190, 204)), mix((78, 78, 84), (96, 96, 100), noise(rng, 9, 9)), 84)
    for k in range(4):
        left, top = 34 * k - int(rng.integers(0, 16)), int(rng.integers(14, 46))
        tone = int(rng.integers(110, 175))
        front = (tone, tone - 14, tone - 34)
        picture = _rectangle(picture, left, top, left + 30, 84, front)
        for y in range(top + 6, 78, 14):
            for x in (left + 6, left + 18):
                picture = _rectangle(picture, x, y, x + 6, y + 7, (236, 222, 150))
    for x in range(-10, SIZE, 32):
        picture = _rectangle(picture, x, 106, x + 16, 111, (230, 230, 226))
    return picture


def _forest(rng: np.random.Generator) -> np.ndarray:
    picture = mix((16, 46, 30), (44, 92, 46), 0.5 + 0.5 * noise(rng, 6, 8))
    picture = _floor(picture, mix((66, 58, 34), (88, 86, 42), 0.5 + 0.5 * noise(rng, 8, 12)), 98)
    for x in np.sort(rng.uniform(0, SIZE, 7)):
        width = float(rng.uniform(4, 9))
        shade = int(rng.integers(46, 84))
        trunk = [(x, 0), (x + width, 0), (x + width + 2, 104), (x - 2, 104)]
        picture = _painted(picture, trunk, (shade, int(shade * 0.7), shade // 2))
    return picture


def _table(rng: np.random.Generator) -> np.ndarray:
    lit = mix((96, 112, 128), (120, 136, 150), 0.5 + 0.3 * noise(rng, 2, 2))
    grain = 0.5 + 0.5 * np.sin(_Y / 2.4 + 2 * noise(rng, 2, 3) + rng.uniform(0, 6))
    picture = _floor(lit, mix((190, 146, 96), (170, 124, 76), grain), 72)
    return _rectangle(picture, 0, 70, SIZE, 75, (120, 82, 46))


def _beach(rng: np.random.Generator) -> np.ndarray:
    sky = mix((120, 190, 244), (206, 232, 250), _Y / 44)
    sea = mix((18, 110, 160), (60, 170, 190), 0.5 + 0.5 * np.sin(_Y / 2 + 2 * noise(rng, 3, 3)))
    sand = mix((240, 218, 168), (226, 200, 146), 0.5 + 0.5 * noise(rng, 10, 12))
    shore = 74 + 3 * np.sin(_X / 14 + rng.uniform(0, 6))
    picture = np.where((shore > _Y)[..., None], _floor(sky, sea, 42), sand)
    return np.where((np.abs(_Y - shore) < 2)[..., None], np.float32(250), picture)


def _mountain(rng: np.random.Generator) -> np.ndarray:
    picture = mix((136, 178, 224), (222, 232, 240), _Y / 90)
    for height, tone in ((20, 118), (44, 92)):
        peak = float(rng.uniform(24, 104))
        picture = _painted(
            picture, [(peak - 92, 104), (peak, height), (peak + 92, 104)], (tone, tone, tone + 22)
        )
        cap = [
            (peak - 15, height + 17),
            (peak, height),
            (peak + 15, height + 17),
            (peak, height + 11),
        ]
        picture = _painted(picture, cap, (248, 250, 255))
    return _floor(picture, mix((84, 126, 70), (108, 150, 84), 0.5 + 0.5 * noise(rng, 6, 9)), 98)


def _desert(rng: np.random.Generator) -> np.ndarray:
    picture = mix((250, 200, 120), (252, 232, 190), _Y / 70)
    for level, tone in ((62, 0.94), (82, 0.86), (104, 0.78)):
        ridge = level + 9 * np.sin(_X / 24 + rng.uniform(0, 6))
        dune = np.array((236 * tone, 164 * tone, 84 * tone), np.float32)
        picture = np.where((ridge < _Y)[..., None], dune, picture)
    return picture


def _kitchen(rng: np.random.Generator) -> np.ndarray:
    odd = (np.floor((_X + rng.integers(0, 22)) / 22) + np.floor(_Y / 22)) % 2
    picture = mix((238, 242, 244), (150, 192, 208), odd)
    joint = (_X % 22 < 1.5) | (_Y % 22 < 1.5)
    picture = np.where(joint[..., None], np.float32(206), picture)
    return _floor(picture, _flat((92, 96, 104)), 108)


def _stage(rng: np.random.Generator) -> np.ndarray:
    folds = 0.5 + 0.5 * np.sin(_X / 4.2 + rng.uniform(0, 6))
    picture = _floor(mix((110, 8, 22), (170, 22, 40), folds), _flat((112, 72, 40)), 98)
    beam = np.exp(-(((_X - 64) / (10 + 0.42 * _Y)) ** 2))[..., None]
    return picture * (0.5 + 0.75 * beam)


def _library(rng: np.random.Generator) -> np.ndarray:
    picture = _flat((84, 54, 30))
    for top in range(4, SIZE, 32):
        x = 0
        while x < SIZE:
            width, height = int(rng.integers(4, 9)), int(rng.integers(17, 26))
            tone = tuple(int(c) for c in rng.integers(60, 190, 3))
            spine = (tone[0], tone[1] // 2 + 30, tone[2] // 2 + 20)
            picture = _rectangle(picture, x, top + 26 - height, x + width, top + 26, spine)
            x += width + 1
    return picture


def _meadow(rng: np.random.Generator) -> np.ndarray:
    picture = mix((96, 168, 66), (142, 204, 88), 0.5 + 0.5 * noise(rng, 9, 9))
    petals = ((250, 250, 250), (250, 210, 60), (240, 120, 160), (180, 120, 230))
    for _ in range(34):
        x, y = rng.uniform(0, SIZE, 2)
        spot = np.exp(-(((_X - x) ** 2 + (_Y - y) ** 2) / 5.0))[..., None]
        color = petals[int(rng.integers(len(petals)))]
        picture = picture + spot * (np.array(color, np.float32) - picture)
    return picture


def _rain(rng: np.random.Generator) -> np.ndarray:
    picture = mix((84, 96, 110), (134, 146, 158), _Y / SIZE + 0.2 * noise(rng, 3, 3))
    for _ in range(46):
        x, y, length = rng.uniform((0, 0, 8), (SIZE, SIZE, 18))
        drop = [(x, y), (x + 1.4, y), (x - 1.6, y + length), (x - 3, y + length)]
        picture = _painted(picture, drop, (196, 210, 224))
    return picture


def _sunset(rng: np.random.Generator) -> np.ndarray:
    picture = mix((88, 40, 120), (252, 140, 60), _Y / 84)
    x = float(rng.uniform(30, 98))
    picture = np.where(
        ((_X - x) ** 2 + (_Y - 74) ** 2 < 20**2)[..., None], (255, 226, 130), picture
    )
    ripple = 0.5 + 0.5 * np.sin(_Y / 1.8 + 2 * noise(rng, 3, 3))
    return _floor(picture, mix((96, 36, 80), (222, 112, 72), ripple), 84)


def _space(rng: np.random.Generator) -> np.ndarray:
    haze = np.clip(noise(rng, 3, 3), 0, 1)
    picture = mix((4, 4, 14), (84, 24, 116), 0.8 * haze)
    for x, y, radius in rng.uniform((0, 0, 0.7), (SIZE, SIZE, 1.6), (60, 3)):
        picture = picture + 230 * np.exp(-((_X - x) ** 2 + (_Y - y) ** 2) / radius**2)[..., None]
    x, y, radius = rng.uniform((10, 10, 8), (118, 50, 16))
    shade = np.clip(1 - 0.5 * (_X - x + _Y - y) / radius, 0.2, 1)[..., None]
    planet = np.array((210, 130, 80), np.float32) * shade
    return np.where(((_X - x) ** 2 + (_Y - y) ** 2 < radius**2)[..., None], planet, picture)


def _cave(rng: np.random.Generator) -> np.ndarray:
    rock = mix((40, 34, 36), (98, 84, 78), 0.5 + 0.6 * noise(rng, 7, 7))
    mouth = ((_X - 64) / 46) ** 2 + ((_Y - 70) / 52) ** 2
    light = mix((250, 236, 200), (150, 130, 112), np.clip(mouth, 0, 1))
    return np.where((mouth < 1)[..., None], light * 0.55, rock)


def _roof(rng: np.random.Generator) -> np.ndarray:
    down = _Y + rng.integers(0, 16)
    row = np.floor(down / 16)
    along = (_X + 10 * (row % 2) + rng.integers(0, 20)) % 20 - 10
    scale = mix((126, 142, 166), (70, 82, 106), (down % 16) / 16)
    gap = np.abs(along) > 9.2 - ((down % 16) / 16 - 0.4) * 2
    return np.where((gap | (down % 16 > 14.5))[..., None], np.float32(40), scale)


# each with its phrase in captions
PHRASES: dict[str, str] = {
    **BACKGROUNDS,
    "room": "in a room", "street": "on the street", "forest": "in the forest",
    "table": "on a table", "beach": "at the beach", "mountain": "in front of a mountain",
    "desert": "in the desert", "kitchen": "in the kitchen", "stage": "on a stage",
    "library": "in the library", "meadow": "in a meadow", "rain": "in the rain",
    "sunset": "at sunset", "space": "in space", "cave": "in a cave",
    "roof": "on the roof",
}  # fmt: skip
_DRAWN: dict[str, Draw] = {
    "room": _room, "street": _street, "forest": _forest, "table": _table, "beach": _beach,
    "mountain": _mountain, "desert": _desert, "kitchen": _kitchen, "stage": _stage,
    "library": _library, "meadow": _meadow, "rain": _rain, "sunset": _sunset, "space": _space,
    "cave": _cave, "roof": _roof,
}  # fmt: skip


def draw_place(name: str, rng: np.random.Generator) -> np.ndarray:
    """One place, float32 (128, 128, 3) in 0..255. Errors: ValueError for an unknown one."""
    if name not in _DRAWN:
        return draw_background(name, rng)
    return _DRAWN[name](rng).astype(np.float32) * rng.uniform(0.9, 1.08)
