r"""How well one concept is learned alone: settings against what is drawn.

    python benchmarks/sweeps/first.py OUT '{}' '{"token_rate": 2e-3, "weighting": "uniform"}' \
        [--concepts 2,3]

Input: settings as JSON (method: retention unless given). Output: a row for each of them in
OUT/first.jsonl, means over development concepts that are learned one by one on the bare mini-SD
with seed 0; OUT/<number>.png: five real pictures of each, then ten drawn ones.

    gain     error of held-out pictures with the concept's prompt, taken from the bare checkpoint's
             with its noun (sweep.py)
    prior    error added to ordinary pictures
    look     mean absolute difference of the drawn thing from the real one, blurred, where real
             pictures agree; 0..2, and what real ones have
    i2i      cosine of drawn and real pictures' features (mini-CLIP)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sweep import held_out_error, prior_error, prompts_of
from torch import Tensor

from comfy_continual_lora import metrics, pipeline, report, requests, sample, store
from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.concepts import to_pil
from comfy_continual_lora.mini import trainset, weights, world
from comfy_continual_lora.settings import DrawSettings, LearnSettings


def measure(
    concept: world.Concept, settings: LearnSettings, folder: Path
) -> tuple[dict[str, float], list[Tensor]]:
    """The figures of one concept learned alone, and its pictures: real ones and drawn ones."""
    checkpoint = folder / "mini.safetensors"
    weights.write_checkpoint(checkpoint)
    files = world.save_pictures(concept, folder / "pictures")
    request = requests.LearnRequest(checkpoint, files, "V1", concept.noun, settings, device="cpu")
    pipeline.learn_concept(request)
    backbone = load_backbone(checkpoint, device="cpu")
    stack = store.load_stack(store.stack_path(checkpoint), backbone.fingerprint)
    real = trainset.to_tensor(np.stack(list(world.concept_pictures(concept, 10, seed=1))))
    latents = backbone.encode_images(real[:5])
    own, bare = FrozenText(backbone, stack.tokens)(prompts_of(concept, "V1"))
    places = world.BACKGROUNDS.values()
    prompts = [f"a photo of a V1 {concept.noun} {place}" for place in places]
    seeds = range(50, 50 + len(prompts))
    with attached(backbone, stack.adapter):
        drawn = sample.draw(backbone, stack.tokens, prompts, seeds, DrawSettings().resolved("mini"))
    before = held_out_error(backbone, None, latents, bare)
    row = {
        "gain": before - held_out_error(backbone, stack.adapter, latents, own),
        "prior": prior_error(backbone, stack.adapter) - prior_error(backbone, None),
        "look": unlike(drawn, real),
        "look_real": unlike(real, real),
        "i2i": metrics.similarity(weights.vision_features(real), weights.vision_features(drawn)),
    }
    return row, [*real[:5], *drawn]


def unlike(pictures: Tensor, real: Tensor) -> float:
    """Mean absolute difference from the mean real picture, (n, 3, h, w) in -1..1, where real ones
    agree: the thing, not what is around it.
    """
    blurred, wanted = (F.avg_pool2d(x, 9, 4) for x in (pictures, real))
    thing = wanted.std(0).mean(0) < 0.25
    return float((blurred - wanted.mean(0)).abs().mean(1)[:, thing].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how well a concept is learned alone.")
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="+", type=json.loads)
    parser.add_argument("--concepts", default="2,3")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = [int(n) for n in arguments.concepts.split(",")]
    for index, chosen in enumerate(arguments.settings):
        settings = LearnSettings(**{"method": "retention", **chosen})
        rows, pictures = [], []
        for n in numbers:
            with tempfile.TemporaryDirectory() as folder:
                row, drawn = measure(world.concepts("development")[n], settings, Path(folder))
            rows.append(row)
            pictures += drawn
        means: dict[str, Any] = {"settings": chosen, "concepts": numbers}
        means |= {name: round(statistics.mean(row[name] for row in rows), 5) for name in rows[0]}
        with (arguments.out / "first.jsonl").open("a") as file:
            file.write(json.dumps(means) + "\n")
        report.grid([to_pil(p) for p in pictures], 15).save(arguments.out / f"{index}.png")
        print(means, flush=True)


if __name__ == "__main__":
    main()
