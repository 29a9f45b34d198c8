r"""C-LoRA's degenerate minimum: how large each concept's change B A is while it is learned.

    python benchmarks/c_lora/curve.py benchmarks/c_lora [--concepts 3] \
        [--variants sequential,published] [--weight 1e8]

Input: nothing. Output: OUT/curve.json and OUT/curve.png: the natural logarithm of the L1 norm of
B A over all layers, at every step (Jha et al. 2025 report 7.7 -> 0.3 within the second task of
SD1.4). Concepts of the reporting split, seed 0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from comfy_continual_lora import pipeline, requests
from comfy_continual_lora.adapters.adapter import layers_of
from comfy_continual_lora.methods import METHODS
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.penalty import Penalty, Step
from comfy_continual_lora.settings import LearnSettings

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EVERY = 5  # steps between two figures kept


def log_norm(factors: Mapping[str, Tensor]) -> float:
    """ln of sum |B A| over all layers."""
    with torch.no_grad():
        norms = [(parts["B"] @ parts["A"]).abs().sum() for parts in layers_of(factors).values()]
        return float(torch.stack(norms).sum().clamp(min=1e-12).log())


def curves(variant: str, count: int, weight: float) -> list[list[float]]:
    """The norm at every step of every concept."""
    norms: list[list[float]] = []
    settings = LearnSettings(method="c_lora", c_lora_variant=variant, c_lora_weight=weight)
    method = type(METHODS["c_lora"])
    penalties_of = method.penalties

    def watched(self: object, session: Any, *rest: Any) -> dict[str, Penalty]:
        own = penalties_of(self, session, *rest)  # type: ignore[arg-type]
        norms.append([])

        def watch(step: Step) -> Tensor:
            norms[-1].append(log_norm(step.factors))
            return torch.zeros(())

        return {**own, "watch": watch}

    method.penalties = watched  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "mini.safetensors"
            write_checkpoint(checkpoint)
            for number, concept in enumerate(world.concepts("reporting")[:count], start=1):
                files = world.save_pictures(concept, Path(folder) / str(number))
                request = requests.LearnRequest(
                    checkpoint, files, f"V{number}", concept.noun, settings, device="cpu"
                )
                pipeline.learn_concept(request)
    finally:
        method.penalties = penalties_of  # type: ignore[method-assign]
    return norms


def draw(out: Path, kept: dict[str, list[list[float]]]) -> None:
    """Each variant's norms, concept after concept; while B is still 0 there is nothing to draw."""
    size = (5.5 * len(kept), 3.6)
    figure, axes = plt.subplots(1, len(kept), figsize=size, sharey=True, squeeze=False)
    for axis, (variant, lines) in zip(axes[0], kept.items(), strict=True):
        start = 0
        for number, line in enumerate(lines, start=1):
            end = start + EVERY * len(line)
            axis.plot(range(start, end, EVERY), line, label=f"concept {number}")
            start = end
        axis.set(title=f"C-LoRA, {variant}", xlabel="step", ylim=(0, None))
        axis.legend()
    axes[0][0].set_ylabel("ln || B A ||$_1$")
    figure.tight_layout()
    figure.savefig(out / "curve.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw C-LoRA's norm curve.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--variants", default="sequential,published")
    parser.add_argument("--weight", type=float, default=1e8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, list[list[float]]] = {}
    ends = {}
    for variant in arguments.variants.split(","):
        lines = curves(variant, arguments.concepts, arguments.weight)
        kept[variant] = [[round(value, 3) for value in line[::EVERY]] for line in lines]
        ends[variant] = [(round(line[0], 2), round(line[-1], 2)) for line in lines]
    arguments.out.mkdir(parents=True, exist_ok=True)
    row = {"weight": arguments.weight, "every": EVERY, "log_l1_norm": kept}
    (arguments.out / "curve.json").write_text(json.dumps(row) + "\n")
    draw(arguments.out, kept)
    print(ends)


if __name__ == "__main__":
    main()
