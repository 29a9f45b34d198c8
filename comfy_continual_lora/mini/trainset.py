"""The 64,000 captioned pictures that the mini-SD is trained on, drawn from seeds.

Shapes: n pictures, uint8 (n, 128, 128, 3) as drawn, float32 (n, 3, 128, 128) in -1..1 as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import world
from .drawing import SIZE

PICTURES = 64_000
SEED = 20


def scene(index: int) -> tuple[world.Scene, np.random.Generator]:
    """Picture `index` of the training set: what is in it, and the generator that draws it."""
    rng = np.random.default_rng((SEED, index))
    return world.random_scene(rng), rng


def scenes(count: int = PICTURES) -> list[world.Scene]:
    """What is in each of the training set's first pictures."""
    return [scene(index)[0] for index in range(count)]


def captions(scenes: Sequence[world.Scene]) -> list[str]:
    """The empty caption, then the caption of every picture."""
    return ["", *(scene.caption for scene in scenes)]


def draw(path: Path, processes: int, count: int = PICTURES) -> None:
    """Draw the first pictures of the training set into one .npy file, with several processes.

    Errors: RuntimeError if one of them fails.
    """
    partial = path.with_suffix(".partial.npy")
    np.lib.format.open_memmap(partial, "w+", np.uint8, (count, SIZE, SIZE, 3)).flush()
    bounds = np.linspace(0, count, processes + 1).astype(int)
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_draw_range, args=(str(partial), start, stop))
        for start, stop in pairwise(bounds)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"drawing the pictures failed with exit status {worker.exitcode}")
    partial.rename(path)


def _draw_range(path: str, start: int, stop: int) -> None:
    array = np.lib.format.open_memmap(path, "r+")
    for index in range(start, stop):
        array[index] = world.draw_scene(*scene(index))


class Pictures:
    """The drawn training set.

    Which pictures a step sees is a function of the step, so a resumed run sees the same ones.
    """

    def __init__(self, path: Path) -> None:
        self.array = np.load(path, mmap_mode="r")

    def indices(self, step: int, n: int, stream: int = 0) -> np.ndarray:
        """The n pictures of a step, (n,), ascending; a stage has a `stream` of its own."""
        rng = np.random.default_rng((SEED, stream, step))
        return np.sort(rng.choice(len(self.array), n, replace=False))

    def images(self, indices: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        return to_tensor(self.array[indices], device)


def to_tensor(pictures: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (n, h, w, 3) -> float32 (n, 3, h, w) in -1..1."""
    return scaled(torch.from_numpy(np.ascontiguousarray(pictures)).to(device))


def scaled(pixels: Tensor) -> Tensor:
    """The same of a tensor, where it lies."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
