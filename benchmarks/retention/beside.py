"""Two learned things in one picture: named in one prompt, or each in an area of its own.

    python benchmarks/retention/beside.py OUT RUN ... --pairs 8

in: folders that run.py left (OUT/runs/METHOD-CONCEPTS-SEED-STEPS; reporting concepts), with their
stacks - out: OUT/beside.json, and a grid of
pictures for each run and way. Neighbours of the sequence, each pair on four grounds:

    one prompt    "a photo of a V1 mug and a V2 fish on grass"
    beside        "a photo of a V1 mug on grass" and, to the right of it, "a photo of a V2 fish on
    grass" (`draw --beside`)
    alone         both of these as pictures of their own: what can be had

    bled      share of things that look more like the other one of the two, in its place, than like
    themselves (a coin gets .5)
    shapes    share of things that have their shape, by the attribute reader
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import run as retention
import torch
from torch import Tensor

from comfy_continual_lora import concepts, lora, report, sample
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.mini import drawing, trainset, world
from comfy_continual_lora.store import ConceptStack

WAYS = ("one prompt", "beside", "alone")


def measure(run: Path, out: Path, pairs: int) -> list[dict[str, Any]]:
    (backbone, stack, sequence), rows = retention.left_by(run), []
    asked = [
        (n, n + 1, place)
        for n in range(min(pairs, len(stack.records) - 1))
        for place in list(world.BACKGROUNDS)[:4]
    ]
    for way in WAYS:
        pictures, bled, shapes = drawn(way, backbone, stack, sequence, asked)
        rows.append(
            {
                "run": run.name,
                "drawn": way,
                "things": 2 * len(asked),
                "bled": bled,
                "shapes": shapes,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        report.grid([concepts.to_pil(p) for p in pictures], 4).save(
            out / f"{run.name}-{way.replace(' ', '-')}.jpg", quality=90
        )
    return rows


def drawn(
    way: str,
    backbone: Backbone,
    stack: ConceptStack,
    sequence: Sequence[world.Concept],
    asked: Sequence[tuple[int, int, str]],
) -> tuple[Tensor, float, float]:
    """Pictures (n, 3, 128, width), the shares of things that bled, and of right shapes.

    `asked`: numbers of the left and right one; ground.
    """
    names = [f"a {record.name}" for record in stack.records]
    parts = [
        [f"a photo of {names[n]} {world.BACKGROUNDS[place]}" for n in (a, b)]
        for a, b, place in asked
    ]
    prompts: dict[str, list[Sequence[str | Sequence[str]]]] = {
        "one prompt": [
            [
                f"a photo of {names[a]} and {names[b]} {world.BACKGROUNDS[place]}"
                for a, b, place in asked
            ]
        ],
        "beside": [parts],
        "alone": [[pair[n] for pair in parts] for n in (0, 1)],
    }
    with lora.attached(backbone, stack.adapter):
        pictures = torch.cat(
            [
                sample.draw(backbone, stack.tokens, ps, range(len(ps)), retention.DRAWING)
                for ps in prompts[way]
            ],
            3,
        )
    scenes = [(sequence[a], sequence[b], place) for a, b, place in asked]
    return pictures, *(
        judged_together(pictures, scenes)
        if way == "one prompt"
        else judged_beside(pictures, scenes)
    )


def judged_together(
    pictures: Tensor, scenes: list[tuple[world.Concept, world.Concept, str]]
) -> tuple[float, float]:
    right = [
        retention.shaped(pictures, f"shape_{side}", [scene[:2][n] for scene in scenes])
        for n, side in enumerate("ab")
    ]
    return retention.bleeding(pictures, scenes), float(torch.cat(right).mean())


def judged_beside(
    pictures: Tensor, scenes: list[tuple[world.Concept, world.Concept, str]]
) -> tuple[float, float]:
    """The same of pictures (n, 3, 128, width), whose ends are pictures of one thing."""
    bled, right = [], []
    for n, end in enumerate((pictures[..., : drawing.SIZE], pictures[..., -drawing.SIZE :])):
        own, other = (
            retention.unit(
                retention.features_of(
                    torch.cat([_alone(scene[:2][m], scene[2]) for scene in scenes])
                )
            )
            for m in (n, 1 - n)
        )
        drawn = retention.unit(retention.features_of(end))
        bled.append(((drawn * other).sum(1) > (drawn * own).sum(1)).float())
        right.append(retention.shaped(end, "shape_a", [scene[:2][n] for scene in scenes]))
    return float(torch.cat(bled).mean()), float(torch.cat(right).mean())


def _alone(concept: world.Concept, place: str) -> Tensor:
    scene = world.Scene((world.Thing(concept.look, (), ""),), place, "")
    return trainset.to_tensor(world.draw_scene(scene, np.random.default_rng(0))[None])


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
