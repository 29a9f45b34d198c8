"""How far from the protected prompts does holding in text space reach? Drift of learned stacks over prompts nearer and further away.

    python benchmarks/retention/far.py RUNS/retention-6-0-200 RUNS/lora-6-0-200 ... [--out benchmarks/retention/results/far.json]

in: folders of `run.py` with the mini-SD and its stack - out: a row for each folder. No picture and no call of the U-Net: what K and V do to a
prompt is its text features times the adapter. All figures are thousandths of E || W0 c ||^2 over ordinary prompts, mean over layers (`textspace`):

    learned              what the adapter right after a concept was learned does to that concept's protected prompts: the size to compare with
    protected ... long   how far prompts that name a concept have moved since it was learned; mean over all concepts but the newest
    the others           how far prompts that name none have moved since before the first concept
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from comfy_continual_lora import store, textspace
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.lora import Adapter
from comfy_continual_lora.mini import world

# {} is the concept. None of these is among the prompts that are protected, and few of their words are.
REWORDED = (
    "{}", "my {} yesterday", "this is the {} I told you about", "look, a {}!", "an oil painting of a {}", "a {} made of glass, studio light",
    "the {}, seen from above", "a tiny {} in somebody's hand", "two {}s", "no {} here",
)  # fmt: skip
LONG = (
    "a highly detailed photograph of a {} standing on an old wooden pier at sunrise, soft light, mist over the lake, 50 mm lens",
    "once upon a time a {} travelled through seven kingdoms, met a dragon, a baker and three sisters, and came home before winter",
    "in the middle of a crowded market between fruit, carpets and lamps, half hidden behind a blue curtain, there is a {}",
)
WITH_ANOTHER = tuple(f"a photo of a {{}} and a {thing}" for thing in ("tractor", "violin", "ladder", "pizza", "lamp", "clock"))
EVERYDAY = (
    "a woman reading in a train", "sunset over a city skyline", "two children playing chess", "a bowl of ramen, food photography",
    "portrait of an old fisherman, black and white", "an astronaut riding a horse", "abstract shapes", "a poster for a jazz concert",
)  # fmt: skip
NEGATIVE = ("blurry, low quality, jpeg artifacts, extra fingers, watermark", "ugly, deformed, bad anatomy", "text, logo, frame")


def families(backbone: Backbone, stack: store.ConceptStack) -> dict[str, float]:
    """Drift by kind of prompt."""
    *earlier, _ = stack.records
    now, rng = stack.adapter, np.random.default_rng(11)
    assert now
    captions = [world.random_scene(rng).caption for _ in range(64)]

    def moment(prompts: Sequence[str]) -> torch.Tensor:
        return textspace.moment(backbone, stack.tokens, prompts)

    def drift(prompts: Sequence[str], adapter: Adapter | None, anchor: Adapter | None) -> float:
        return 1000 * float(textspace.drift(adapter or {}, anchor, moment(prompts), sizes))

    def moved(templates: Sequence[str] | None, *, since: bool = True) -> float:
        """Of prompts that name an earlier concept, since it was learned; or how far learning it moved them."""
        found = []
        for record in earlier:
            prompts = [t.format(record.name) for t in templates] if templates else textspace.single_prompts(record)
            then = stack.adapter_after(record.id)
            found.append(drift(prompts, now, then) if since else drift(prompts, then, None))
        return sum(found) / len(found)

    plain = textspace.ordinary_prompts([record.noun for record in stack.records])
    weights = {layer: module.weight.float() for layer, module in backbone.kv_layers.items()}
    about = moment(plain)
    sizes = {layer: ((w @ about) * w).sum() for layer, w in weights.items()}
    concepts = {
        "learned": moved(None, since=False), "protected": moved(None), "with another thing": moved(WITH_ANOTHER), "reworded": moved(REWORDED),
        "long": moved(LONG),
    }  # fmt: skip
    others = {"protected ordinary": plain, "captions of the world": captions, "everyday": EVERYDAY, "negative": NEGATIVE}
    ordinary = {kind: drift(prompts, now, None) for kind, prompts in others.items()}
    return {key: round(value, 2) for key, value in {**concepts, **ordinary}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure drift over prompts near to and far from the protected ones.")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for folder in arguments.runs:
        backbone = load_backbone(folder / "mini.safetensors", device="cpu")
        rows[folder.name] = families(backbone, store.load_stack(store.stack_path(folder / "mini.safetensors"), backbone.fingerprint))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    columns = list(next(iter(rows.values())))
    print("| run | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
