"""One LoRA for all concepts of a long stack, or one for those that a picture needs: how close does
each way draw them?

    python benchmarks/retention/selected.py OUT RUN ... --sizes 1,2,5,10,25

Input: folders that run.py left, with their stacks. Output: OUT/selected.json, and OUT/<run>.jpg (a
row for every so many concepts: a real picture, then as drawn by LoRAs solved for so many, for all
last).

For each size the stack is cut into groups of that many concepts in the order they were learned, and
each group has a LoRA solved for it (`consolidation.selected`). Prompts, seeds, solver, guidance and
distances as in `run.py`; pictures are kept and not drawn again.

    a_mmd, i2i    of what is drawn of all concepts, as in `run.py`
    closer        number of concepts drawn closer than by the stack's own LoRA, which is for all
    rank, lost    mean over the groups: of the LoRA, and the share of what concepts' own adapters
                  did to their prompts that is lost
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import judging
import torch
from change import Run
from jobs import Job
from PIL import Image

from comfy_continual_lora import concepts, consolidation, metrics, report, store, targets
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.settings import SolveSettings
from comfy_continual_lora.store import ConceptStack

STRIPS = 8


@dataclass
class Figures:
    """Of all concepts that are drawn, or of all groups."""

    a_mmd: list[float] = field(default_factory=list)
    i2i: list[float] = field(default_factory=list)
    rank: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        return {name: round(judging.mean(values), 4) for name, values in vars(self).items()}


def measure(run: Run, out: Path, sizes: list[int], every: int) -> list[dict[str, Any]]:
    backbone = load_backbone(run.checkpoint, device="cpu")
    stack = store.open_stack(store.stack_path(run.checkpoint))
    job = replace(run.job, out=out)
    sequence, count = job.sequence, len(stack.records)
    real = {
        n: judging.features_of(judging.real_pictures(sequence[n], job.pictures))
        for n in range(0, count, every)
    }
    rows, distances = [], {}
    for size in [*sizes, count]:
        figures = Figures()
        for part, numbers in groups(backbone, stack, list(real), size):
            figures.rank.append(part.rank or 0)
            figures.lost += _lost(backbone, part)
            for n in numbers:
                prompts = job.prompts_about(n)
                pictures = judging.drawn_pictures(job, backbone, part, prompts, f"{size}-{n}")
                drawn = judging.features_of(pictures)
                mmd = metrics.mmd2(judging.unit(real[n]), judging.unit(drawn))
                figures.a_mmd.append(1000 * mmd)
                figures.i2i.append(metrics.similarity(real[n], drawn))
        distances[size] = figures.a_mmd
        rows.append({"run": run.folder.name, "size": size, **figures.means()})
        print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        pairs = zip(distances[row["size"]], distances[count], strict=True)
        row["closer"] = sum(one < other for one, other in pairs)
    draw(out / f"{run.folder.name}.jpg", job, list(real), [*sizes, count])
    return rows


def groups(
    backbone: Backbone, stack: ConceptStack, numbers: Sequence[int], size: int
) -> Iterator[tuple[ConceptStack, list[int]]]:
    """The stack solved for each group of `size` concepts, and which of `numbers` are in it."""
    for start in sorted({n // size * size for n in numbers}):
        tokens = [record.token for record in stack.records[start : start + size]]
        part = stack
        if size != len(stack.records):
            bank = targets.PromptBank(backbone, stack.tokens)
            whole = targets.with_prompts(bank, stack)
            part = consolidation.selected(whole, tokens, SolveSettings())
        yield part, [n for n in numbers if start <= n < start + size]


def _lost(backbone: Backbone, stack: ConceptStack) -> list[float]:
    assert stack.adapter
    stack = targets.with_prompts(targets.PromptBank(backbone, stack.tokens), stack)
    assert stack.adapter
    goals = targets.targets_of(stack, targets.own_adapters(stack))
    return [targets.relative_drift(stack.adapter, goal) for goal in targets.about_one(stack, goals)]


def draw(path: Path, job: Job, numbers: Sequence[int], sizes: Sequence[int]) -> None:
    pictures = []
    for n in numbers[:: -(-len(numbers) // STRIPS)]:
        pictures.append(concepts.to_pil(judging.real_pictures(job.sequence[n], 2)[1]))
        folders = [job.folder / "drawn" / f"{size}-{n}" for size in sizes]
        pictures += [Image.open(folder / "1.png") for folder in folders]
    report.grid(pictures, 1 + len(sizes)).save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure LoRAs solved for some concepts of a stack."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--sizes", default="1,2,5,10,25")
    parser.add_argument(
        "--every", type=int, default=1, help="draw every so many concepts of the stack"
    )
    parser.add_argument("--pictures", type=int, default=4, help="drawn of each concept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    rows = []
    for folder in arguments.runs:
        run = Run(folder, arguments.pictures)
        rows += measure(run, arguments.out, sizes, arguments.every)
    (arguments.out / "selected.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
