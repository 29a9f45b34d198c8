"""Rank against number of concepts: how many directions a growing stack's one LoRA uses, and how
many the closed form asks for.

    python benchmarks/retention/rank.py OUT RUN ...

Input: folders that run.py left, with their stacks. Output: OUT/rank.json. No picture and no U-Net:
all of it is text space.

    used     rank that holds .99 and .999 of what the LoRA does to the stack's prompts and ordinary
             ones: || delta L ||^2, L L^T = E c c^T, mean over the layers; it can't be more than the
             LoRA's rank
    moved    how far the newest concept moved what the LoRA does to the earlier concepts' prompts,
             as a share of what it did to them
    asked    rank at which the closed form holds .99 and .999 of what every concept's own LoRA did
             to its prompts
    lost     mean share, over the concepts, of what each one's own LoRA did to prompts about it
             alone that is lost at the LoRA's rank
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_continual_lora import consolidation, solve, store, targets
from comfy_continual_lora.adapters.adapter import Adapter, factored, layers_of
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.language import LANGUAGE
from comfy_continual_lora.settings import SolveSettings

COUNTS = (1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 50, 100, 150, 200)
ENERGIES = (0.99, 0.999)


def measure(run: Path) -> list[dict[str, Any]]:
    backbone = load_backbone(run / "mini.safetensors", device="cpu")
    stack = store.open_stack(run / "mini.concepts.safetensors")
    stack = targets.with_prompts(targets.PromptBank(backbone, stack.tokens), stack)
    rows = []
    for count in (one for one in COUNTS if one <= len(stack.records)):
        past = consolidation.as_of(stack, count)
        newest = past.adapter
        previous = consolidation.as_of(stack, max(1, count - 1)).adapter
        assert newest
        assert stack.ordinary
        held, _ = consolidation.solution(past, SolveSettings(rank=stack.rank))
        assert held
        goals = targets.targets_of(past, targets.own_adapters(past))
        moments = stack.ordinary.moment(LANGUAGE) + sum(goal.moment for goal in goals)
        lost = [targets.relative_drift(held, goal) for goal in targets.about_one(past, goals)]
        row = {
            "run": run.name,
            "concepts": count,
            "rank": stack.rank,
            "used": used(newest, moments),
            "moved": moved(newest, previous, goals[:-1]),
            "asked": [
                consolidation.solution(past, SolveSettings(energy=energy))[1] for energy in ENERGIES
            ],
            "lost": sum(lost) / count,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def moved(newest: Adapter, previous: Adapter | None, goals: Sequence[solve.Target]) -> float:
    """Mean drift of the newest adapter from the previous one over these prompts."""
    drifts = [
        targets.relative_drift(newest, solve.Target(goal.name, goal.rows, previous))
        for goal in goals
    ]
    return sum(drifts) / len(drifts) if drifts else 0.0


def used(adapter: Adapter, moment: Tensor) -> list[int]:
    """The rank that holds each of ENERGIES of what the adapter does to prompts with this second
    moment (d, d).
    """
    size = len(moment)
    ridge = 1e-6 * moment.trace() / size * torch.eye(size)
    lower = torch.linalg.cholesky(moment.double() + ridge)
    kept = []
    for parts in layers_of(adapter).values():
        left, right = factored(parts, size)
        values = torch.linalg.svdvals(left.double() @ (right.double() @ lower))
        energy = values[: right.shape[0]].square()
        kept.append((energy / energy.sum()).cumsum(0))
    mean = torch.stack(kept).mean(0)
    return [int((mean < energy).sum()) + 1 for energy in ENERGIES]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank against number of concepts, in text space.")
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [row for run in arguments.runs for row in measure(run)]
    (arguments.out / "rank.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
