"""One LoRA for all concepts of a long stack, or one for those that a picture needs: how near does
each way draw them?

    python benchmarks/retention/selected.py OUT RUN ... --sizes 1,2,5,10,25

in: folders that run.py left, with their stacks - out: OUT/selected.json, and OUT/<run>.jpg (a row
for every so many concepts: a real picture, then
as drawn by LoRAs solved for so many, all at last). For each size the stack is cut into groups of so
many concepts in the order they were learned,
and each group has a LoRA solved for it (`solve.selected`). Prompts, seeds, solver, guidance and
distances as in `run.py`; pictures are kept and not
drawn again.

    a_mmd, i2i    of what is drawn of all concepts, as in `run.py`
    nearer        concepts drawn nearer than by the stack's own LoRA, which is for all
    rank, lost    mean over the groups: of the LoRA, and the share of what concepts' own adapters
    did to their prompts that is lost
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import run as retention
import torch
from change import Run
from PIL import Image

from comfy_continual_lora import concepts, metrics, report, solve, store
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.progress import ignore
from comfy_continual_lora.settings import SolveSettings
from comfy_continual_lora.store import ConceptStack

SHOWN = 8


def measure(run: Run, out: Path, sizes: list[int], every: int) -> list[dict[str, Any]]:
    backbone, stack = (
        load_backbone(run.checkpoint, device="cpu"),
        store.open_stack(store.stack_path(run.checkpoint)),
    )
    count, job = len(stack.records), replace(run.job, out=out)
    numbers = range(0, count, every)
    real = [
        retention.features_of(retention.real_pictures(job.sequence[n], job.pictures))
        for n in numbers
    ]
    rows, alone = [], {}
    for size in [*sizes, count]:
        ranks, lost, drawn = [], [], []
        for start in sorted({n // size * size for n in numbers}):
            group = stack.records[start : start + size]
            part = (
                stack
                if size == count
                else solve.selected(
                    backbone, stack, [record.token for record in group], SolveSettings(), ignore
                )
            )
            ranks.append(part.rank or 0)
            lost += _lost(backbone, part)
            for number in (n for n in numbers if start <= n < start + size):
                name = stack.records[number].name
                drawn.append(
                    retention.features_of(
                        retention._drawn(job, backbone, part, name, f"{size}-{number}")
                    )
                )
        alone[size] = [
            1000 * metrics.mmd2(retention.unit(r), retention.unit(d))
            for r, d in zip(real, drawn, strict=True)
        ]
        likeness = [metrics.similarity(r, d) for r, d in zip(real, drawn, strict=True)]
        told = {"a_mmd": alone[size], "i2i": likeness, "rank": ranks, "lost": lost}
        rows.append(
            {
                "run": run.folder.name,
                "size": size,
                **{name: round(retention._mean(values), 4) for name, values in told.items()},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        row["nearer"] = sum(
            one < other for one, other in zip(alone[row["size"]], alone[count], strict=True)
        )
    shown = []
    for number in numbers[:: -(-len(numbers) // SHOWN)]:
        files = [job.folder / "drawn" / f"{size}-{number}" / "1.png" for size in (*sizes, count)]
        shown += [
            concepts.to_pil(retention.real_pictures(job.sequence[number], 2)[1]),
            *map(Image.open, files),
        ]
    report.grid(shown, 2 + len(sizes)).save(out / f"{run.folder.name}.jpg", quality=90)
    return rows


def _lost(backbone: Any, stack: ConceptStack) -> list[float]:
    assert stack.adapter
    memory = solve.memory_of(backbone, stack, ignore)
    wishes = memory.about_one(memory.targets(solve.adapters_of(stack), SolveSettings()))
    return [solve.relative_drift(stack.adapter, wish) for wish in wishes]


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
    rows = [
        row
        for folder in arguments.runs
        for row in measure(Run(folder, arguments.pictures), arguments.out, sizes, arguments.every)
    ]
    (arguments.out / "selected.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
