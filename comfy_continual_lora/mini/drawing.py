"""Draw backgrounds, things and abstract pictures of the mini-SD's world, pixel by pixel.

in: a background's name, a `Look`, a generator - out: float32 (128, 128, 3) in 0..255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .looks import BACKGROUNDS, FACE, PAINTS, SHAPES, TOP, Color, Look, Points, ellipse, free_color

SIZE = 128

GRID = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), -1).astype(np.float32)


def noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Smooth noise in [-1, 1] with about `rows` x `columns` bumps, (128, 128)."""
    small = Image.fromarray(rng.uniform(-1, 1, (rows + 2, columns + 2)).astype(np.float32))
    box = (0.5, 0.5, columns + 1.5, rows + 1.5)
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))


def mix(a: Color, b: Color, weight: np.ndarray) -> np.ndarray:
    w = np.clip(weight, 0, 1)[..., None]
    return np.asarray(a, np.float32) * (1 - w) + np.asarray(b, np.float32) * w


def draw_background(name: str, rng: np.random.Generator) -> np.ndarray:
    """One textured background, float32 (128, 128, 3) in 0..255."""
    x, y = GRID[..., 0], GRID[..., 1]
    phase = rng.uniform(0, 2 * math.pi)
    match name:
        case "wood":
            grain = np.sin(y / 3.2 + 3 * noise(rng, 3, 2) + phase)
            picture = mix((150, 100, 58), (112, 70, 38), 0.5 + 0.5 * grain)
            picture *= np.where((y + rng.integers(0, 42)) % 42 < 2, 0.55, 1.0)[..., None]
        case "grass":
            picture = mix((62, 128, 44), (108, 172, 62), 0.5 + 0.5 * noise(rng, 8, 14))
        case "sand":
            ripples = np.sin(y / 4.5 + 2.5 * noise(rng, 3, 3) + phase)
            picture = mix((226, 200, 150), (206, 176, 122), 0.5 + 0.4 * ripples)
        case "water":
            waves = np.sin(y / 4.5 + 2 * noise(rng, 4, 3) + phase)
            picture = mix((28, 104, 158), (96, 176, 208), 0.45 + 0.45 * waves)
        case "sky":
            picture = mix((98, 164, 232), (176, 214, 246), y / SIZE)
            clouds = np.clip(2 * noise(rng, 4, 4) + 0.5 * noise(rng, 7, 6) - 0.5, 0, 1)[..., None]
            picture = picture * (1 - clouds) + 252 * clouds
        case "brick":
            down = y + rng.integers(0, 20)
            row = np.floor(down / 20)
            along = x + 20 * (row % 2) + rng.integers(0, 40)
            shade = np.sin(row * 12.9 + np.floor(along / 40) * 78.2) * 0.5 + 0.5
            picture = mix((158, 70, 54), (186, 94, 70), shade)
            mortar = (down % 20 < 3) | (along % 40 < 3)
            picture = np.where(mortar[..., None], np.array((196, 186, 174), np.float32), picture)
        case "snow":
            picture = mix((250, 251, 255), (206, 218, 236), 0.35 + 0.6 * noise(rng, 4, 3))
        case "gravel":
            picture = mix((86, 86, 88), (176, 174, 170), 0.5 + 0.6 * noise(rng, 10, 10))
        case "night":
            picture = mix((10, 12, 36), (30, 26, 74), y / SIZE)
            for cx, cy, radius in rng.uniform((0, 0, 0.9), (SIZE, SIZE, 2.0), (22, 3)):
                picture += 210 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / radius**2)[..., None]
        case "carpet":
            u, v = (x + y + 40 * phase) % 34, (x - y) % 34
            lattice = ((u < 6) | (v < 6))[..., None]
            gold = np.array((206, 160, 92), np.float32)
            crimson = np.array((122, 34, 62), np.float32)
            picture = np.where(lattice, gold, crimson)
        case _:
            raise ValueError(f"no background {name!r}; known: {', '.join(BACKGROUNDS)}")
    return picture * rng.uniform(0.9, 1.08)


@dataclass(frozen=True)
class Pose:
    """Where a thing stands: a point p in object coordinates lies at the pixel `matrix` p + `center`."""

    matrix: np.ndarray  # (2, 2)
    center: np.ndarray  # (2,)

    def canvas(self, points: Points) -> Points:
        """The points on a canvas of twice the size, whose pixels are averaged four to one."""
        pixels = np.asarray(points) @ self.matrix.T + self.center
        return [(float(x) * 2, float(y) * 2) for x, y in pixels]

    def object_coordinates(self) -> np.ndarray:
        """u and v of every pixel, (2, 128, 128)."""
        return np.moveaxis((GRID - self.center) @ np.linalg.inv(self.matrix).T, -1, 0)


def draw_look(
    picture: np.ndarray,
    look: Look,
    center: tuple[float, float],
    radius: float,
    rng: np.random.Generator,
) -> None:
    """Draw one thing into `picture`, float32 (128, 128, 3), in place.

    `radius` is the distance in pixels from its middle to its edge.
    """
    angle = rng.normal(0, 0.04)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    pose = Pose(radius * rotation, np.asarray(center))
    mask, edge = silhouette(SHAPES[look.shape], pose)
    from_center = GRID - pose.center

    shadow = ((from_center - (0, 0.88 * radius)) / (0.95 * radius, 0.26 * radius)) ** 2
    picture *= 1 - 0.4 * np.clip(1.2 - shadow.sum(-1), 0, 1)[..., None] * (1 - mask)

    u, v = pose.object_coordinates()
    paint = np.asarray(look.colors, np.float32)[PAINTS[look.pattern](u, v)]
    paint *= (1 - 0.16 * (from_center[..., 0] + from_center[..., 1]) / radius)[..., None]
    picture += mask * (paint - picture)
    picture *= 1 - 0.75 * edge

    if look.extra or look.eyes:
        place = FACE.get(look.shape, (0.0, -0.12)), TOP.get(look.shape, (0.0, -0.92))
        draw_details(picture, look, pose, *place)


def silhouette(parts: list[tuple[Points, bool]], pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """The thing's coverage and its outline's, each (128, 128, 1) in 0..1."""
    solid = Image.new("L", (2 * SIZE, 2 * SIZE))
    lines = Image.new("L", (2 * SIZE, 2 * SIZE))
    draw_solid = ImageDraw.Draw(solid)
    draw_lines = ImageDraw.Draw(lines)
    for points, filled in parts:
        polygon = pose.canvas(points)
        draw_solid.polygon(polygon, fill=255 if filled else 0)
        draw_lines.polygon(polygon, fill=0, outline=255, width=4)
    return _coverage(solid), _coverage(lines)


def _coverage(canvas: Image.Image) -> np.ndarray:
    small = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, np.float32)[..., None] / 255


def draw_details(
    picture: np.ndarray,
    look: Look,
    pose: Pose,
    face: tuple[float, float],
    top: tuple[float, float],
) -> None:
    """The hat or antennae at `top` and the eyes at `face` (object coordinates), over the thing."""
    canvas = Image.new("RGBA", (2 * SIZE, 2 * SIZE))
    draw = ImageDraw.Draw(canvas)
    outline = (30, 30, 30)
    x, y = top
    if look.extra == "hat":
        hat = [(x - 0.3, y + 0.12), (x, y - 0.55), (x + 0.3, y + 0.12)]
        draw.polygon(pose.canvas(hat), look.colors[2], outline, 2)
    elif look.extra == "antennae":
        for side in (-1, 1):
            stalk = [(x + 0.1 * side, y + 0.1), (x + 0.32 * side, y - 0.4)]
            knob = ellipse(x + 0.32 * side, y - 0.4, 0.13, 0.13)
            draw.line(pose.canvas(stalk), outline, 5)
            draw.polygon(pose.canvas(knob), look.colors[2], outline, 2)
    if look.eyes:
        x, y = face
        for side in (-1, 1):
            eye = ellipse(x + 0.2 * side, y, 0.17, 0.19)
            pupil = ellipse(x + 0.2 * side, y + 0.04, 0.08, 0.09)
            draw.polygon(pose.canvas(eye), (250, 250, 250), outline, 2)
            draw.polygon(pose.canvas(pupil), (20, 20, 20))
    overlay = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    alpha = overlay[..., 3:] / 255
    picture += alpha * (overlay[..., :3] - picture)


def draw_abstract(rng: np.random.Generator) -> np.ndarray:
    """A picture of no thing at all, overlapping textured leaves, uint8 (128, 128, 3).

    It teaches the autoencoder textures, edges and colours that the world lacks.
    """
    first, second = free_color(rng), free_color(rng)
    picture = mix(first, second, 0.5 + 0.8 * noise(rng, *rng.integers(1, 12, 2)))
    for _ in range(int(rng.integers(6, 30))):
        mask = Image.new("L", (SIZE, SIZE))
        cx, cy, rx, ry = rng.uniform((0, 0, 4, 4), (SIZE, SIZE, 46, 46))
        corners = int(rng.choice([3, 4, 5, 28]))
        start = rng.uniform(0, 90)
        outline = ellipse(cx, cy, rx, ry, start, start + 360, n=corners)
        ImageDraw.Draw(mask).polygon(outline, fill=255)
        weight = np.asarray(mask, np.float32)[..., None] / 255
        first, second = free_color(rng), free_color(rng)
        contrast = rng.uniform(0, 0.8)
        leaf = mix(first, second, 0.5 + contrast * noise(rng, *rng.integers(1, 16, 2)))
        picture += weight * (leaf - picture)
    return np.clip(picture, 0, 255).astype(np.uint8)
