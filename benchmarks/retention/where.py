"""Where in its prompt does the look of a learned thing lie: on its words, or in the padding behind
them?

    python benchmarks/retention/where.py OUT RUN ...

Input: folders that run.py left (OUT/runs/METHOD-CONCEPTS-SEED-STEPS; reporting concepts), with
their stacks. Output: OUT/where.json, and two grids of pictures for each run and place.

The adapter acts on all positions of the prompt, on those up to its end only, on those behind it
only, or nowhere. "a photo of a V1 mug" for each concept, "a photo of a V1 mug and a V2 fish" for
neighbours, four seeds each.

    i2i       likeness to real pictures, of each thing alone (mini-CLIP, mean cosine over all pairs)
    shapes    share of things in pictures of two that have their shape, by the attribute reader
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import judging
import torch
from jobs import DRAWING
from torch import Tensor, nn

from comfy_continual_lora import concepts, metrics, report, sample, store
from comfy_continual_lora.adapters.adapter import adapted_layers, attached
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.mini import world

PLACES = ("everywhere", "up to the end", "behind the end", "nowhere")


@contextmanager
def acting(backbone: Backbone, where: Tensor) -> Iterator[None]:
    """Inside, the attached adapter acts on these positions (77,) only."""

    def hook(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        plain = module.get_base_layer()(inputs[0])
        return plain + where[:, None] * (output - plain)

    handles = [
        nn.Module.register_forward_hook(layer, hook) for layer in adapted_layers(backbone).values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drawn(backbone: Backbone, stack: store.ConceptStack, prompt: str, place: str) -> Tensor:
    padding = backbone.padding([prompt], stack.tokens)[0].float()
    masks = {
        "everywhere": torch.ones_like(padding),
        "up to the end": 1 - padding,
        "behind the end": padding,
        "nowhere": torch.zeros_like(padding),
    }
    with attached(backbone, stack.adapter), acting(backbone, masks[place]):
        return sample.draw(backbone, stack.tokens, [prompt] * 4, range(4), DRAWING)


def likeness(concept: world.Concept, pictures: Tensor) -> float:
    real = judging.features_of(judging.real_pictures(concept, 16))
    return metrics.similarity(real, judging.features_of(pictures))


def measure(run: Path, out: Path) -> list[dict[str, Any]]:
    backbone, stack, sequence = judging.load_run(run)
    names = [record.name for record in stack.records]
    rows = []
    for place in PLACES:
        alone = [drawn(backbone, stack, f"a photo of a {name}", place) for name in names]
        prompts = [f"a photo of a {a} and a {b}" for a, b in pairwise(names)]
        both = [drawn(backbone, stack, prompt, place) for prompt in prompts]
        i2i = [likeness(concept, own) for concept, own in zip(sequence, alone, strict=True)]
        row = {
            "run": run.name,
            "acts": place,
            "i2i": judging.mean(i2i),
            "shapes": right_shapes(both, sequence),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        for kind, pictures in (("alone", alone), ("both", both)):
            sheet = report.grid([concepts.to_pil(picture) for picture in torch.cat(pictures)], 8)
            sheet.save(out / f"{run.name}-{place.replace(' ', '-')}-{kind}.png")
    return rows


def right_shapes(both: Sequence[Tensor], sequence: Sequence[world.Concept]) -> float:
    """Share of right shapes in pictures of each concept with the one behind it."""
    right = []
    for n, pictures in enumerate(both):
        for head, concept in zip(("shape_a", "shape_b"), sequence[n : n + 2], strict=True):
            right.append(judging.has_shape(pictures, head, [concept] * len(pictures)))
    return float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure where in a prompt the look of a learned thing lies."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [row for run in arguments.runs for row in measure(run, arguments.out)]
    (arguments.out / "where.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
