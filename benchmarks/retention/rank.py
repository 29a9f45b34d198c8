"""Rank against number of concepts: how many directions a growing stack's one LoRA uses, and how
many the closed form asks for.

    python benchmarks/retention/rank.py OUT RUN ...

in: folders that run.py left, with their stacks - out: OUT/rank.json. No picture and no U-Net: all
of it is text space.

    used      rank that holds .99 and .999 of what the LoRA does to the stack's prompts and ordinary
    ones: || delta L ||^2, L L^T = E c c^T,
              mean over the layers; it can't be more than the LoRA's rank
    moved     how far the newest concept moved what the LoRA does to the earlier concepts' prompts,
    as a share of what it did to them
    asked     rank at which the closed form holds .99 and .999 of what every concept's own LoRA did
    to its prompts
    lost      the mean share of what each concept's own did to prompts about it alone that is lost
    at the LoRA's rank
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_continual_lora import lora, solve, store
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.settings import SolveSettings

COUNTS = (1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 50, 100, 150, 200)
ENERGIES = (0.99, 0.999)


def measure(run: Path) -> list[dict[str, Any]]:
    backbone, stack = (
        load_backbone(run / "mini.safetensors", device="cpu"),
        store.open_stack(run / "mini.concepts.safetensors"),
    )
    memory, adapters, rows = (
        solve.Memory(backbone, [record.noun for record in stack.records]),
        solve.adapters_of(stack),
        [],
    )
    for count, record in enumerate(stack.records, start=1):
        memory.add(record, stack.words[record.id])
        if count not in COUNTS:
            continue
        newest, before = (
            stack.adapter_after(stack.records[max(0, n)].id) for n in (count - 1, count - 2)
        )
        assert newest
        wishes = memory.targets(adapters[:count], SolveSettings())
        earlier = [
            solve.relative_drift(newest, solve.Target(w.name, w.moment, before))
            for w in wishes[1:-1]
        ]
        held, _ = solve.solve(wishes, SolveSettings(rank=stack.rank))
        rows.append(
            {
                "run": run.name,
                "concepts": count,
                "rank": stack.rank,
                "used": used(newest, sum((w.moment for w in wishes[1:]), memory.ordinary.clone())),
                "moved": sum(earlier) / len(earlier) if earlier else 0.0,
                "asked": [
                    solve.solve(wishes, SolveSettings(energy=energy))[1] for energy in ENERGIES
                ],
                "lost": sum(solve.relative_drift(held, wish) for wish in memory.about_one(wishes))
                / count,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def used(adapter: lora.Adapter, moment: Tensor) -> list[int]:
    lower = torch.linalg.cholesky(
        moment.double() + 1e-6 * moment.trace() / len(moment) * torch.eye(len(moment))
    )
    kept = []
    for parts in lora.layers_of(adapter).values():
        left, right = lora.factored(parts, len(moment))
        energy = torch.linalg.svdvals(left.double() @ (right.double() @ lower))[
            : right.shape[0]
        ].square()
        kept.append((energy / energy.sum()).cumsum(0))
    mean = torch.stack(kept).mean(0)
    return [int((mean < energy).sum()) + 1 for energy in ENERGIES]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank against number of concepts, in text space.")
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "rank.json").write_text(
        json.dumps([row for run in arguments.runs for row in measure(run)], indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
