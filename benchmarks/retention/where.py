"""Where in its prompt does the look of a learned thing lie: on its words, or in the padding behind
them?

    python benchmarks/retention/where.py OUT RUN ...

in: folders that run.py left (OUT/runs/METHOD-CONCEPTS-SEED-STEPS; reporting concepts), with their
stacks - out: OUT/where.json, and two grids of
pictures for each run and place. The adapter acts on all positions of the prompt, on those up to its
end only, on those behind it only, or nowhere.
"a photo of a V1 mug" for each concept, "a photo of a V1 mug and a V2 fish" for neighbours, four
seeds each.

    i2i        likeness to real pictures, of each thing alone (mini-CLIP, mean cosine over all
    pairs)
    shapes     share of things in pictures of two that have their shape, by the attribute reader
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import run as retention
import torch
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
    behind = backbone.padding([prompt], stack.tokens)[0].float()
    masks = {
        "everywhere": torch.ones_like(behind),
        "up to the end": 1 - behind,
        "behind the end": behind,
        "nowhere": torch.zeros_like(behind),
    }
    with attached(backbone, stack.adapter), acting(backbone, masks[place]):
        return sample.draw(backbone, stack.tokens, [prompt] * 4, range(4), retention.DRAWING)


def likeness(concept: world.Concept, pictures: Tensor) -> float:
    return metrics.similarity(
        retention.features_of(retention.real_pictures(concept, 16)), retention.features_of(pictures)
    )


def measure(run: Path, out: Path) -> list[dict[str, Any]]:
    backbone, stack, sequence = retention.left_by(run)
    names, rows = [record.name for record in stack.records], []
    pairs = [(n, n + 1) for n in range(len(names) - 1)]
    for place in PLACES:
        alone = [drawn(backbone, stack, f"a photo of a {name}", place) for name in names]
        both = [
            drawn(backbone, stack, f"a photo of a {names[a]} and a {names[b]}", place)
            for a, b in pairs
        ]
        i2i = [likeness(concept, own) for concept, own in zip(sequence, alone, strict=True)]
        right = [
            retention.shaped(pictures, f"shape_{side}", [sequence[pair[n]]] * len(pictures))
            for pictures, pair in zip(both, pairs, strict=True)
            for n, side in enumerate("ab")
        ]
        rows.append(
            {
                "run": run.name,
                "acts": place,
                "i2i": sum(i2i) / len(i2i),
                "shapes": float(torch.cat(right).mean()),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        report.grid([concepts.to_pil(p) for p in torch.cat(alone)], 8).save(
            out / f"{run.name}-{place.replace(' ', '-')}-alone.png"
        )
        report.grid([concepts.to_pil(p) for p in torch.cat(both)], 8).save(
            out / f"{run.name}-{place.replace(' ', '-')}-both.png"
        )
    return rows


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
