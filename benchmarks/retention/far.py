r"""How far beyond the protected prompts does holding in text space reach? Drift of learned stacks
over prompts closer and further away.

    python benchmarks/retention/far.py RUNS/retention-6-0-200 RUNS/lora-6-0-200 ... \
        [--out benchmarks/retention/results/far.json]

Input: folders of `run.py` with the mini-SD and its stack. Output: a row for each folder. No picture
and no call of the U-Net: what K and V do to a prompt is its text features times the adapter.

All figures are thousandths of E || W0 c ||^2 over ordinary prompts, mean over layers (`textspace`):

    learned              what the adapter right after a concept was learned does to that concept's
                         protected prompts: the size to compare with
    protected ... long   how far prompts that name a concept have moved since it was learned; mean
                         over all concepts but the newest
    the others           how far prompts that name none have moved since before the first concept
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comfy_continual_lora import consolidation, store, textspace
from comfy_continual_lora.adapters.adapter import Adapter
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import world

# {} is the concept. None of these prompts is protected, and few of their words are.
REWORDED = (
    "{}",
    "my {} yesterday",
    "this is the {} I told you about",
    "look, a {}!",
    "an oil painting of a {}",
    "a {} made of glass, studio light",
    "the {}, seen from above",
    "a tiny {} in somebody's hand",
    "two {}s",
    "no {} here",
)
LONG = (
    "a highly detailed photograph of a {} standing on an old wooden pier at sunrise, soft light, "
    "mist over the lake, 50 mm lens",
    "once upon a time a {} travelled through seven kingdoms, met a dragon, a baker and three "
    "sisters, and came home before winter",
    "in the middle of a crowded market between fruit, carpets and lamps, half hidden behind a "
    "blue curtain, there is a {}",
)
WITH_ANOTHER = tuple(
    f"a photo of a {{}} and a {thing}"
    for thing in ("tractor", "violin", "ladder", "pizza", "lamp", "clock")
)
EVERYDAY = (
    "a woman reading in a train",
    "sunset over a city skyline",
    "two children playing chess",
    "a bowl of ramen, food photography",
    "portrait of an old fisherman, black and white",
    "an astronaut riding a horse",
    "abstract shapes",
    "a poster for a jazz concert",
)
NEGATIVE = (
    "blurry, low quality, jpeg artifacts, extra fingers, watermark",
    "ugly, deformed, bad anatomy",
    "text, logo, frame",
)


def drift_by_kind(backbone: Backbone, stack: store.ConceptStack) -> dict[str, float]:
    """Drift by kind of prompt."""
    *earlier, _ = stack.records
    now = stack.adapter
    assert now
    then = [consolidation.as_of(stack, n + 1).adapter for n in range(len(earlier))]

    def moment(prompts: Sequence[str]) -> Tensor:
        return textspace.moment(backbone, stack.tokens, prompts)

    def naming(templates: Sequence[str]) -> list[Tensor]:
        return [moment([text.format(record.name) for text in templates]) for record in earlier]

    plain = moment(textspace.ordinary_prompts([record.noun for record in stack.records]))
    sizes = textspace.sizes(backbone, plain)

    def drift(
        moments: Sequence[Tensor],
        adapters: Sequence[Adapter | None],
        anchors: Sequence[Adapter | None],
    ) -> float:
        drifts = [
            textspace.drift(adapter or {}, anchor, m, sizes)
            for m, adapter, anchor in zip(moments, adapters, anchors, strict=True)
        ]
        return round(1000 * float(torch.stack(drifts).mean()), 2)

    own = [moment(textspace.single_prompts(record)) for record in earlier]
    about_concepts = {
        "protected": own,
        "with another thing": naming(WITH_ANOTHER),
        "reworded": naming(REWORDED),
        "long": naming(LONG),
    }
    rng = np.random.default_rng(11)
    captions = moment([world.random_scene(rng).caption for _ in range(64)])
    ordinary = {
        "protected ordinary": plain,
        "captions of the world": captions,
        "everyday": moment(EVERYDAY),
        "negative": moment(NEGATIVE),
    }
    return {
        "learned": drift(own, then, [None] * len(then)),
        **{kind: drift(about, [now] * len(then), then) for kind, about in about_concepts.items()},
        **{kind: drift([about], [now], [None]) for kind, about in ordinary.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure drift over prompts near to and far from the protected ones."
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for folder in arguments.runs:
        checkpoint = folder / "mini.safetensors"
        backbone = load_backbone(checkpoint, device="cpu")
        stack = store.load_stack(store.stack_path(checkpoint), backbone.fingerprint)
        rows[str(folder)] = drift_by_kind(backbone, stack)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    columns = list(next(iter(rows.values())))
    print("| run | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
