"""Curves of a run as images. Needs only Pillow: the tab draws them inside its host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from PIL import Image, ImageDraw

LOOKS = "how much better held-out pictures are predicted (blue), earlier ones moved (red)"


def smoothed(values: Sequence[float]) -> list[float]:
    """The running mean over a twentieth of the steps."""
    window = max(1, len(values) // 20)
    sums = [0.0, *accumulate(values)]
    return [
        (sums[i + 1] - sums[max(0, i - window + 1)]) / min(i + 1, window)
        for i in range(len(values))
    ]


def thinned(values: Sequence[float], most: int = 200) -> list[float]:
    """At most so many means of equal parts, of five digits each."""
    parts = min(most, len(values))
    edges = [len(values) * i // parts for i in range(parts + 1)] if parts else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    return [float(f"{mean:.5g}") for mean in means]


def curve_picture(
    values: Sequence[float], caption: str, *, width: int = 520, height: int = 200
) -> Image.Image:
    """The `smoothed` values over the steps; without values, a note that there is nothing to plot."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    if not values:
        caption = f"{caption}: nothing to plot, it was done before"
    draw.text((50, height - 16), caption, fill="#555555")
    if values:
        smooth = smoothed(values)
        low, high = min(smooth), max(smooth)
        across = (width - 60) / max(1, len(smooth) - 1)
        down = (height - 40) / (high - low or 1.0)
        points = [(50 + i * across, 10 + (high - v) * down) for i, v in enumerate(smooth)]
        draw.line(points if len(points) > 1 else points * 2, fill="#2563eb", width=2)
        draw.text((2, 6), f"{high:.3f}", fill="#555555")
        draw.text((2, height - 36), f"{low:.3f}", fill="#555555")
    return image


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width, one below the other."""
    image = Image.new("RGB", (pictures[0].width, sum(one.height for one in pictures)), "white")
    top = 0
    for one in pictures:
        image.paste(one, (0, top))
        top += one.height
    return image


def looks_picture(
    looks: Sequence[Sequence[float]], caption: str = LOOKS, *, width: int = 520, height: int = 200
) -> Image.Image:
    """The looks at a run (`watch`): likeness to the pictures held out in blue, how far earlier
    concepts moved in red, over the steps; the grey line is the floor, 0.
    """
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    values = [value for _, *pair in looks for value in pair]
    low, high = min(0.0, *values), max(0.01, *values)
    last = looks[-1][0]
    down = (height - 50) / (high - low)

    def at(step: float, value: float) -> tuple[float, float]:
        return 50 + step / last * (width - 60), 10 + (high - value) * down

    draw.line([at(0, 0), at(last, 0)], fill="#aaaaaa")
    for which, color in ((1, "#2563eb"), (2, "#c0392b")):
        if any(look[which] for look in looks):
            points = [(50.0, at(0, 0)[1]), *(at(look[0], look[which]) for look in looks)]
            draw.line(points, fill=color, width=2)
    draw.text((2, 6), f"{high:.0%}", fill="#555555")
    draw.text((2, height - 46), f"{low:.0%}", fill="#555555")
    draw.text((50, height - 32), "step 0", fill="#555555")
    draw.text((width - 40, height - 32), f"{last:.0f}", fill="#555555")
    draw.text((50, height - 16), caption, fill="#555555")
    return image
