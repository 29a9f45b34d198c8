r"""Two of a kind, as two people in one LoRA: do they bleed into each other, alone and in one picture?

    python benchmarks/retention/alike.py benchmarks/retention/results/alike --pairs 1,8 \
        --methods lora,lora_ewc_dc,retention,separate

Input: nothing (pair n is the reporting concepts n and n + 16: one class noun, two looks).
Output: OUT/table.md, pairs.jpg (a real picture, then four drawn ones, of each), one-prompt.jpg and
beside.jpg (a row for each job), and what run.py leaves of each job.

The first is learned, then the second. Places, seeds, solver and guidance are the same for all.

    alone         share of pictures drawn of one of them that look more like the other's pictures
                  than like its own (mini-CLIP; by its closest picture)
    one prompt    share of things in pictures of both that look more like the other one (`bleeding`
                  of judging.py); one thing twice gives .5
    beside        the same with a prompt and an area each (beside.py)
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import beside
import judging
import torch
from jobs import PICTURES, Job
from PIL import Image
from run import run_all
from torch import Tensor

from comfy_continual_lora import concepts, report
from comfy_continual_lora.mini import world

KINDS = 16  # class nouns: after so many concepts they begin again
TOGETHER = ("one prompt", "beside")


@dataclass(frozen=True)
class Pair(Job):
    """`seed` says which pair."""

    @property
    def sequence(self) -> list[world.Concept]:
        reporting = world.concepts("reporting")
        return [reporting[self.seed], reporting[self.seed + KINDS]]


Together = dict[str, tuple[Tensor, float]]  # by way: pictures, and the share of things that bled


def mistaken(job: Pair) -> float:
    """Share of the pictures drawn alone, at the end, whose closest real picture is the other one's."""
    real = [features(judging.real_pictures(concept, job.pictures)) for concept in job.sequence]
    shares = []
    for own, other in ((0, 1), (1, 0)):
        images = [concepts.to_tensor(image) for image in drawn_alone(job, own)]
        drawn = features(torch.stack(images))
        to_own = (drawn @ real[own].T).max(1).values
        to_other = (drawn @ real[other].T).max(1).values
        shares.append(to_other > to_own)
    return float(torch.cat(shares).float().mean())


def together(job: Pair) -> Together:
    """Pictures of both, in either order, on eight grounds."""
    backbone, stack, _ = judging.load_run(job.folder)
    grounds = list(world.BACKGROUNDS)[:8]
    scenes = [(a, 1 - a, ground) for ground in grounds for a in (0, 1)]
    return {way: beside.drawn(way, backbone, stack, job.sequence, scenes)[:2] for way in TOGETHER}


def drawn_alone(job: Pair, j: int) -> list[Image.Image]:
    return [Image.open(job.folder / "drawn" / f"1-{j}" / f"{n}.png") for n in range(job.pictures)]


def features(pictures: Tensor) -> Tensor:
    return judging.unit(judging.features_of(pictures))


def table(jobs: Sequence[Pair], rows: Sequence[dict[str, Any]], both: dict[Pair, Together]) -> str:
    lines = [
        "| method | pair | alone | one prompt | beside | A_MMD | DC scores right |",
        "|---" * 7 + "|",
    ]
    for job, row in zip(jobs, rows, strict=True):
        cells = [
            job.variant,
            " and ".join(concept.name for concept in job.sequence),
            _share(mistaken(job)),
            *(_share(both[job][way][1] if job in both else None) for way in TOGETHER),
            f"{row['a_mmd']:.4f}",
            _share(row["dc_accuracy"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw(out: Path, jobs: Sequence[Pair], both: dict[Pair, Together]) -> None:
    alone = []
    for job, j in itertools.product(jobs, (0, 1)):
        alone.append(concepts.to_pil(judging.real_pictures(job.sequence[j], 1)[0]))
        alone += drawn_alone(job, j)[:4]
    report.grid(alone, 10).save(out / "pairs.jpg", quality=90)
    for way in TOGETHER if both else ():
        pictures = torch.cat([drawn[way][0][:8] for drawn in both.values()])
        sheet = report.grid([concepts.to_pil(picture) for picture in pictures], 8)
        sheet.save(out / f"{way.replace(' ', '-')}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure how two concepts of one class noun bleed into each other."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", default="1,8")
    parser.add_argument("--methods", default="lora,lora_dsc_ewc_dc,retention,separate")
    parser.add_argument("--steps", type=int, default=200, help="per concept")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    pairs = [int(n) for n in arguments.pairs.split(",")]
    jobs = [
        Pair(variant, pair, 2, PICTURES, arguments.out, arguments.steps)
        for variant in arguments.methods.split(",")
        for pair in pairs
    ]
    rows = run_all(jobs, arguments.processes, ray=False)
    # with a LoRA for each concept there is no picture of both
    both = {job: together(job) for job in jobs if job.method != "separate"}
    text = table(jobs, rows, both)
    (arguments.out / "table.md").write_text(text + "\n")
    draw(arguments.out, jobs, both)
    print(text)


if __name__ == "__main__":
    main()
