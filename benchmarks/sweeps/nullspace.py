r"""Holding earlier prompts by a hard constraint instead of a penalty: the update may only act where
nothing protected lies.

    python benchmarks/sweeps/nullspace.py benchmarks/sweeps/nullspace.json \
        [--energies 0.9,0.99,0.999,0.9999] [--steps 200]

Input: nothing (the first two development concepts). Output: that file and a table on the screen.

The first concept is learned by `retention`. The second is learned on top of it once with the
penalty and, for every energy, once as a LoRA of its own whose A stays orthogonal to the leading
eigenvectors of M = E c c^T, over ordinary prompts and those of the first concept, that hold this
share of M: (delta - delta*) c = 0 there. Its A starts larger by what was taken from the second
concept's features, so that rates mean the same. Same pictures, seed, rate and steps; gains as in
`sweep.py`.

    closed, open     directions of text space the update may not use, and may use
    left             share of the energy of the second concept's own prompts that lies in the open
                     ones
    first, second    error on held-out pictures with the checkpoint alone minus after the second
                     concept: larger is better
    prior            error added to ordinary pictures
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sweep import gain, prior_error
from torch import Tensor

from comfy_continual_lora import concepts, pipeline, requests, store, targets, textspace
from comfy_continual_lora.adapters.adapter import new_adapter
from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.learn import TrainingInputs, learn
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.penalty import Step
from comfy_continual_lora.presets import TEMPLATES
from comfy_continual_lora.progress import Progress, ignore
from comfy_continual_lora.settings import LearnSettings


def closed_directions(moment: Tensor, energy: float) -> Tensor:
    """The fewest orthonormal directions (d, k) that hold this share of the second moment (d, d)."""
    values, vectors = torch.linalg.eigh(moment.double())
    kept = values.flip(0).cumsum(0) / values.sum()
    return vectors.flip(1)[:, : int((kept < energy).sum()) + 1].float()


class Constraint:
    """Sees the factors as if it were a penalty, and after every step takes out of A what the step
    put into closed directions.
    """

    def __init__(self, closed: Tensor) -> None:
        self.closed = closed
        self.factors: Mapping[str, Tensor] = {}

    def penalty(self, step: Step) -> Tensor:
        self.factors = step.factors
        return torch.zeros(())

    @torch.no_grad()
    def after_step(self, _: Progress) -> None:
        for name, tensor in self.factors.items():
            if name.endswith("A"):
                tensor.copy_(self.open_part(tensor))

    def open_part(self, a: Tensor) -> Tensor:
        return a - a @ self.closed @ self.closed.T


def measure(energies: list[float], steps: int, folder: Path) -> list[dict[str, Any]]:
    checkpoint, settings = folder / "mini.safetensors", LearnSettings(steps=steps)
    write_checkpoint(checkpoint)
    first, second = world.concepts("development")[:2]
    pictures = world.save_pictures(first, folder / "V1")
    request = requests.LearnRequest(checkpoint, pictures, "V1", first.noun, settings, device="cpu")
    pipeline.learn_concept(request)
    backbone = load_backbone(checkpoint, device="cpu")
    stack = store.load_stack(store.stack_path(checkpoint), backbone.fingerprint)
    settings = settings.resolved("mini")
    images = concepts.load_images(world.save_pictures(second, folder / "V2"), backbone.size).images
    latents = backbone.encode_images(images)
    prompts = concepts.prompts_for("V2", second.noun, TEMPLATES, None)
    word = backbone.word_start(second.noun, torch.Generator().manual_seed(0))
    inputs = TrainingInputs(latents, [prompts], "V2", stack.tokens, stack.adapter, word)

    def row(
        name: str, inputs: TrainingInputs, after_step: Callable[[Progress], None] = ignore
    ) -> dict[str, Any]:
        learned = learn(backbone, inputs, settings, folder / f"{name}.snapshot", after_step)
        text = FrozenText(backbone, {**stack.tokens, "V2": learned.word})
        return {
            "held by": name,
            "first": gain(backbone, learned.adapter, text, "V1", first),
            "second": gain(backbone, learned.adapter, text, "V2", second),
            "prior": prior_error(backbone, learned.adapter) - prior_error(backbone, None),
        }

    text = FrozenText(backbone, stack.tokens)
    before = gain(backbone, stack.adapter, text, "V1", first)
    bank = targets.PromptBank(backbone, stack.tokens)
    stack = targets.with_prompts(bank, stack, [second.noun])
    assert stack.ordinary
    ordinary = stack.ordinary.moment(settings.retention_language)
    goals = targets.targets_of(stack, targets.own_adapters(stack))
    penalty = targets.retention_penalty(backbone, ordinary, goals, settings, 1.0)
    rows = [
        {"held by": "before", "first": before},
        row("penalty", replace(inputs, penalties={"retention": penalty})),
    ]
    protected = [
        *textspace.ordinary_prompts([first.noun, second.noun]),
        *textspace.single_prompts(stack.records[0]),
    ]
    moment = textspace.moment(backbone, stack.tokens, protected)
    own = textspace.moment(backbone, {"V2": word}, prompts)
    for energy in energies:
        constraint = Constraint(closed_directions(moment, energy))
        closed = constraint.closed.shape[1]
        left = 1 - float((constraint.closed.T @ own @ constraint.closed).trace() / own.trace())
        adapter = new_adapter(backbone, settings.rank or 1, torch.Generator().manual_seed(0))
        adapter = {
            name: constraint.open_part(factor) / left**0.5 if name.endswith("A") else factor
            for name, factor in adapter.items()
        }
        held = replace(
            inputs,
            adapter=adapter,
            frozen_adapter=stack.adapter,
            penalties={"open": constraint.penalty},
        )
        figures = row(f"energy {energy:g}", held, constraint.after_step)
        figures |= {"closed": closed, "open": len(moment) - closed, "left": left}
        rows.append(figures)
        print(figures, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("held by", "closed", "open", "left", "first", "second", "prior")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        values = [row.get(column, "") for column in columns]
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in values]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare a hard null-space constraint with the penalty in text space."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--energies", default="0.9,0.99,0.999,0.9999")
    parser.add_argument("--steps", type=int, default=200, help="per concept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    energies = [float(energy) for energy in arguments.energies.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(energies, arguments.steps, Path(folder))
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
