"""The captioned pictures that the second miniature is trained on, drawn once by many processes.

in: a seed - out: FOLDER/pictures.npy, uint8 (n, 128, 128, 3), captions.json (n texts) and
labels.safetensors: what is in each picture, (n,) or (n, colours); -1 where there is nothing to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import world
from places import PHRASES
from safetensors.torch import load_file, save_file
from things import COLORS, KINDS, SHAPES
from torch import Tensor

from comfy_continual_lora.mini.drawing import SIZE
from comfy_continual_lora.mini.trainset import scaled, to_tensor

SIZES = {
    "arrangement": len(world.ARRANGEMENTS),
    "place": len(PHRASES),
    "style": len(world.STYLES),
    **{f"noun_{slot}": len(SHAPES) for slot in "ab"},
    **{f"kind_{slot}": len(KINDS) for slot in "ab"},
    **{f"colors_{slot}": len(COLORS) for slot in "ab"},
}
_CHUNK = 500


def scene(seed: int, index: int) -> tuple[world.Scene, np.random.Generator]:
    """Picture `index`: what is in it, and the generator that draws it."""
    rng = np.random.default_rng((seed, index))
    return world.random_scene(rng), rng


def labels(scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """By name, (n,) int64, and (n, 24) float32 for colours."""
    places, styles, nouns = list(PHRASES), list(world.STYLES), list(SHAPES)
    values: dict[str, list] = {name: [] for name in SIZES}
    for one in scenes:
        values["arrangement"].append(world.ARRANGEMENTS.index(one.arrangement))
        values["place"].append(places.index(one.place))
        values["style"].append(styles.index(one.style))
        for slot, thing in zip("ab", (*one.things, None)[:2], strict=False):
            values[f"noun_{slot}"].append(nouns.index(thing.look.shape) if thing else -1)
            values[f"kind_{slot}"].append(KINDS.index(thing.look.pattern) if thing else -1)
            named = thing.color_names if thing and one.style != "sketch" else ()
            colors = [float(name in named) for name in COLORS] if named else [-1.0] * len(COLORS)
            values[f"colors_{slot}"].append(colors)
    return {name: torch.tensor(np.array(rows)) for name, rows in values.items()}


def draw(folder: Path, seed: int, count: int, processes: int) -> None:
    """Draw the training set, if it is not there."""
    path = folder / "pictures.npy"
    if path.exists():
        return
    partial_file = path.with_suffix(".partial.npy")
    np.lib.format.open_memmap(partial_file, "w+", np.uint8, (count, SIZE, SIZE, 3)).flush()
    captions: list[str] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in SIZES}
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        starts = range(0, count, _CHUNK)
        for texts, found in pool.imap(partial(_draw_chunk, str(partial_file), seed, count), starts):
            captions += texts
            for name, values in found.items():
                rows[name].append(values)
    (folder / "captions.json").write_text(json.dumps(captions))
    save_file({name: torch.cat(values) for name, values in rows.items()}, _labels_file(folder))
    partial_file.rename(path)


def _draw_chunk(
    path: str, seed: int, count: int, start: int
) -> tuple[list[str], dict[str, Tensor]]:
    array = np.lib.format.open_memmap(path, "r+")
    scenes = []
    for index in range(start, min(start + _CHUNK, count)):
        one, rng = scene(seed, index)
        array[index] = world.draw_scene(one, rng)
        scenes.append(one)
    return [one.caption for one in scenes], labels(scenes)


def _labels_file(folder: Path) -> Path:
    return folder / "labels.safetensors"


class Dataset:
    """The drawn training set; on a GPU all of its pictures lie there.

    Which ones a step sees is a function of seed, stream and step, so a resumed run sees the same.
    """

    def __init__(self, folder: Path, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.captions: list[str] = json.loads((folder / "captions.json").read_text())
        self.labels: Mapping[str, Tensor] = load_file(_labels_file(folder))
        self.array = np.load(folder / "pictures.npy", mmap_mode="r")
        self.there = torch.from_numpy(self.array[:]).to(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.captions)

    def indices(self, step: int, n: int, stream: int) -> np.ndarray:
        """The n pictures of a step, (n,); a stage has a `stream` of its own."""
        return np.random.default_rng((self.seed, stream, step)).integers(0, len(self), n)

    def images(self, indices: np.ndarray) -> Tensor:
        """(n, 3, 128, 128) in -1..1."""
        if self.there is None:
            return to_tensor(self.array[indices], self.device)
        return scaled(self.there[torch.from_numpy(indices).to(self.device)])
