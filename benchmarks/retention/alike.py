"""Two of a kind, as two people in one LoRA: do they bleed into each other, alone and in one
picture?

    python benchmarks/retention/alike.py benchmarks/retention/results/alike --pairs 1,8 --methods
    lora,lora_ewc_dc,retention,separate

in: nothing (pair n is the reporting concepts n and n + 16: one class noun, two looks) - out:
OUT/table.md, pairs.jpg (a real picture, then four drawn
ones, of each), one-prompt.jpg and beside.jpg (a row for each job), and what run.py leaves of each
job. The first is learned, then the second. Places,
seeds, solver and guidance are the same for all.

    alone        share of pictures drawn of one of them that look more like the other's pictures
    than like its own (mini-CLIP; by its nearest picture)
    one prompt   share of things in pictures of both that look more like the other one (run.py's
    `bleeding`); one thing twice gives .5
    beside       the same with a prompt and an area each (beside.py)
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import beside
import run as retention
import torch
from PIL import Image
from torch import Tensor

from comfy_continual_lora import concepts, report
from comfy_continual_lora.mini import world

KINDS = 16  # class nouns: after so many concepts they begin again
TOGETHER = ("one prompt", "beside")


@dataclass(frozen=True)
class Pair(retention.Job):
    """`seed` says which pair."""

    @property
    def sequence(self) -> list[world.Concept]:
        every = world.concepts("reporting")
        return [every[self.seed], every[self.seed + KINDS]]


def mistaken(job: Pair) -> float:
    """Share of the pictures drawn alone, at the end, whose nearest real picture is the other one's."""
    real = [features(retention.real_pictures(concept, job.pictures)) for concept in job.sequence]
    drawn = [
        features(torch.stack([concepts.to_tensor(image) for image in pictures_of(job, j)]))
        for j in (0, 1)
    ]
    nearest = [[(d @ r.T).max(1).values for r in real] for d in drawn]
    return float(torch.cat([nearest[j][1 - j] > nearest[j][j] for j in (0, 1)]).float().mean())


def together(job: Pair) -> dict[str, tuple[Tensor, float]]:
    """By way: pictures of both, in either order, on eight grounds, and the share of their things
    that bled.
    """
    backbone, stack, _ = retention.left_by(job.folder)
    asked = [(a, 1 - a, place) for place in list(world.BACKGROUNDS)[:8] for a in (0, 1)]
    return {way: beside.drawn(way, backbone, stack, job.sequence, asked)[:2] for way in TOGETHER}


def pictures_of(job: Pair, j: int) -> list[Image.Image]:
    return [Image.open(job.folder / "drawn" / f"1-{j}" / f"{n}.png") for n in range(job.pictures)]


def features(pictures: Tensor) -> Tensor:
    return retention.unit(retention.features_of(pictures))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure how two concepts of one class noun bleed into each other."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", default="1,8")
    parser.add_argument("--methods", default="lora,lora_dsc_ewc_dc,retention,separate")
    parser.add_argument("--steps", type=int, default=200, help="a concept")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    methods, pairs = arguments.methods.split(","), [int(n) for n in arguments.pairs.split(",")]
    jobs = [
        Pair(name, pair, 2, retention.PICTURES, arguments.out, arguments.steps)
        for name in methods
        for pair in pairs
    ]
    rows = retention.run_all(jobs, arguments.processes, ray=False)
    both = {
        job: together(job) for job in jobs if not job.row.startswith("separate")
    }  # where each has no LoRA of its own
    lines = [
        "| method | pair | alone | one prompt | beside | A_MMD | DC scores right |",
        "|---" * 7 + "|",
    ]
    for job, row in zip(jobs, rows, strict=True):
        shares = (mistaken(job), *(both[job][way][1] if job in both else None for way in TOGETHER))
        cells = [
            " and ".join(concept.name for concept in job.sequence),
            *("-" if share is None else f"{share:.2f}" for share in shares),
        ]
        cells += [
            f"{row['a_mmd']:.4f}",
            "-" if row["dc_accuracy"] is None else f"{row['dc_accuracy']:.2f}",
        ]
        lines.append(f"| {job.row} | " + " | ".join(cells) + " |")
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
    shown = []
    for job, j in itertools.product(jobs, (0, 1)):
        shown += [
            concepts.to_pil(retention.real_pictures(job.sequence[j], 1)[0]),
            *pictures_of(job, j)[:4],
        ]
    report.grid(shown, 10).save(arguments.out / "pairs.jpg", quality=90)
    for way in TOGETHER if both else ():
        sheet = [
            concepts.to_pil(picture) for drawn in both.values() for picture in drawn[way][0][:8]
        ]
        report.grid(sheet, 8).save(arguments.out / f"{way.replace(' ', '-')}.jpg", quality=90)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
