"""Two learned things in one picture: named in one prompt, or each in an area of its own.

    python benchmarks/retention/beside.py OUT RUN ... --pairs 8

Input: folders that run.py left (OUT/runs/METHOD-CONCEPTS-SEED-STEPS; reporting concepts), with
their stacks. Output: OUT/beside.json, and a grid of pictures for each run and way.

Neighbours of the sequence, each pair on four grounds:

    one prompt    "a photo of a V1 mug and a V2 fish on grass"
    beside        "a photo of a V1 mug on grass" and, to the right of it, "a photo of a V2 fish on
                  grass" (`draw --beside`)
    alone         both of these as pictures of their own: the best that can be had

    bled      share of things that look more like the other one of the two, in its place, than like
              themselves (a coin gets .5)
    shapes    share of things that have their shape, by the attribute reader
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import judging
import numpy as np
import torch
from jobs import DRAWING
from judging import PairScene
from torch import Tensor

from comfy_continual_lora import concepts, report, sample
from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.mini import drawing, trainset, world
from comfy_continual_lora.store import ConceptStack

WAYS = ("one prompt", "beside", "alone")


def measure(run: Path, out: Path, pairs: int) -> list[dict[str, Any]]:
    backbone, stack, sequence = judging.load_run(run)
    neighbours = [
        (n, n + 1, ground)
        for n in range(min(pairs, len(stack.records) - 1))
        for ground in list(world.BACKGROUNDS)[:4]
    ]
    rows = []
    for way in WAYS:
        pictures, bled, shapes = drawn(way, backbone, stack, sequence, neighbours)
        things = 2 * len(neighbours)
        row = {"run": run.name, "drawn": way, "things": things, "bled": bled, "shapes": shapes}
        rows.append(row)
        print(json.dumps(row), flush=True)
        sheet = report.grid([concepts.to_pil(picture) for picture in pictures], 4)
        sheet.save(out / f"{run.name}-{way.replace(' ', '-')}.jpg", quality=90)
    return rows


def drawn(
    way: str,
    backbone: Backbone,
    stack: ConceptStack,
    sequence: Sequence[world.Concept],
    pairs: Sequence[tuple[int, int, str]],
) -> tuple[Tensor, float, float]:
    """Pictures (n, 3, 128, width), the share of things that bled, and the share of right shapes.

    `pairs`: numbers of the left and the right concept, and the ground they are on.
    """
    scenes = [PairScene(sequence[a], sequence[b], ground) for a, b, ground in pairs]
    with attached(backbone, stack.adapter):
        columns = [
            sample.draw(backbone, stack.tokens, prompts, range(len(prompts)), DRAWING)
            for prompts in _prompts(way, [record.name for record in stack.records], pairs)
        ]
    pictures = torch.cat(columns, 3)
    judge = judged_together if way == "one prompt" else judged_beside
    return pictures, *judge(pictures, scenes)


def _prompts(
    way: str, names: Sequence[str], pairs: Sequence[tuple[int, int, str]]
) -> list[Sequence[str | Sequence[str]]]:
    """The prompts of all pairs, once for each picture that is drawn of a pair."""
    together, left, right = [], [], []
    for a, b, ground in pairs:
        place = world.BACKGROUNDS[ground]
        together.append(f"a photo of a {names[a]} and a {names[b]} {place}")
        left.append(f"a photo of a {names[a]} {place}")
        right.append(f"a photo of a {names[b]} {place}")
    if way == "one prompt":
        return [together]
    if way == "beside":
        return [list(zip(left, right, strict=True))]
    return [left, right]


def judged_together(pictures: Tensor, scenes: Sequence[PairScene]) -> tuple[float, float]:
    return judging.bleeding(pictures, scenes), judging.right_shapes(pictures, scenes)


def judged_beside(
    pictures: Tensor,
    scenes: Sequence[PairScene],
    features_of: Callable[[Tensor], Tensor] = judging.features_of,
) -> tuple[float, float]:
    """The same of pictures (n, 3, 128, width), whose ends are pictures of one thing."""
    left, right = [s.left for s in scenes], [s.right for s in scenes]
    grounds = [scene.ground for scene in scenes]
    left_end, right_end = pictures[..., : drawing.SIZE], pictures[..., -drawing.SIZE :]
    bled, shapes = [], []
    for end, own, other in ((left_end, left, right), (right_end, right, left)):
        features = judging.unit(features_of(end))
        real, exchanged = (
            judging.unit(features_of(alone(concepts, grounds))) for concepts in (own, other)
        )
        bled.append(judging.nearer_to_other(features, real, exchanged))
        shapes.append(judging.has_shape(end, "shape_a", own))
    return float(torch.cat(bled).mean()), float(torch.cat(shapes).mean())


def nearness_beside(
    pictures: Tensor, scenes: Sequence[PairScene], features_of: Callable[[Tensor], Tensor]
) -> float:
    """`judging.nearness` of pictures (n, 3, 128, width), whose ends are pictures of one thing."""
    grounds = [scene.ground for scene in scenes]
    left = pictures[..., : drawing.SIZE], [scene.left for scene in scenes]
    right = pictures[..., -drawing.SIZE :], [scene.right for scene in scenes]
    both = [
        judging.unit(features_of(end)) * judging.unit(features_of(alone(concepts, grounds)))
        for end, concepts in (left, right)
    ]
    return float(torch.cat(both).sum(1).mean())


def alone(concepts: Sequence[world.Concept], grounds: Sequence[str]) -> Tensor:
    """Each concept as the world draws it by itself, (n, 3, 128, 128)."""
    pictures = []
    for concept, ground in zip(concepts, grounds, strict=True):
        scene = world.Scene((world.Thing(concept.look, (), ""),), ground, "")
        pictures.append(world.draw_scene(scene, np.random.default_rng(0)))
    return trainset.to_tensor(np.stack(pictures))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure two learned things in one picture: in one prompt, or beside each other."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument(
        "--pairs", type=int, default=8, help="neighbours of each run's sequence, from the first on"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [row for run in arguments.runs for row in measure(run, arguments.out, arguments.pairs)]
    (arguments.out / "beside.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
