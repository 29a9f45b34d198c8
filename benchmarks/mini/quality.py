"""How well the mini-SD draws what a caption asks for, judged by the attribute reader, which was
trained on real pictures of the world only.

    python benchmarks/mini/quality.py benchmarks/mini [--captions 512] [--checkpoint FOLDER]

Input: the shipped weights, or another checkpoint of the same world. Output: OUT/quality.json,
OUT/samples.png (the first 48 captions drawn) and OUT/captions.txt.

Captions come from scenes the training never saw; only those are used that name shape, colours and
background, so that there is something to judge.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comfy_continual_lora import sample
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.concepts import to_pil
from comfy_continual_lora.mini import parts, trainset, weights, world
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.report import grid
from comfy_continual_lora.settings import DrawSettings

SEED = 77


def unseen_scenes(count: int) -> list[world.Scene]:
    """Scenes whose captions name the background and the colours of every thing; one in three has
    two things.
    """
    rng = np.random.default_rng(SEED)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.random_scene(rng)
        names_background = world.BACKGROUNDS[scene.background] in scene.caption
        if names_background and all(thing.color_names for thing in scene.things):
            scenes.append(scene)
    return scenes


def real_pictures(scenes: list[world.Scene]) -> Tensor:
    """The same scenes as the world draws them: what a perfect net would do, and the reader's own
    ceiling.
    """
    rng = np.random.default_rng(SEED + 1)
    return trainset.to_tensor(np.stack([world.draw_scene(scene, rng) for scene in scenes]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure how well the mini-SD draws what captions ask for."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.checkpoint or Path(folder) / "mini.safetensors"
        if arguments.checkpoint is None:
            weights.write_checkpoint(path)
        backbone = load_backbone(path)
    scenes = unseen_scenes(arguments.captions)
    captions = [scene.caption for scene in scenes]
    settings = DrawSettings(guidance=arguments.guidance, size=128).resolved(backbone.preset)

    def show(progress: Progress) -> None:
        print(f"\r{progress.step}/{progress.steps}", end="", file=sys.stderr, flush=True)

    seeds = range(SEED, SEED + len(scenes))
    drawn = sample.draw(backbone, {}, captions, seeds, settings, show)
    real = real_pictures(scenes)
    through_vae = backbone.decode_latents(torch.stack(backbone.encode_images(real)))
    two = torch.tensor([len(scene.things) == 2 for scene in scenes])
    scenes_of_two = [scene for scene in scenes if len(scene.things) == 2]
    reader = weights.load_reader()
    row = {
        "captions": len(scenes),
        "with_two_things": int(two.sum()),
        "guidance": settings.guidance,
        "steps": settings.steps,
    }
    for name, pictures in (("real", real), ("autoencoder", through_vae), ("drawn", drawn)):
        row[name] = parts.read_accuracy(reader, pictures, scenes)
        row[f"{name}_two_things"] = parts.read_accuracy(reader, pictures[two], scenes_of_two)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "quality.json").write_text(json.dumps(row, indent=1) + "\n")
    (arguments.out / "captions.txt").write_text("\n".join(captions[:48]) + "\n")
    grid([to_pil(picture) for picture in drawn[:48]], 8).save(arguments.out / "samples.png")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
