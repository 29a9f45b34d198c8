"""How well the second miniature draws what a caption asks for, judged by the reader of `train.py`, which
was trained on real pictures only.

    python benchmarks/second/quality.py OUT --captions 1024 --device cuda

in: OUT of `train.py` - out: OUT/quality.json: shares of things (and pictures) that are read right, in
real pictures (the reader's ceiling), through the autoencoder, and drawn; the autoencoder's PSNR on
unseen pictures, dB; OUT/samples.jpg, the first 48 captions drawn, and OUT/captions.txt.

Captions are of scenes the training never saw; only those are used that name all of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import dataset
import nets
import numpy as np
import torch
import world
from safetensors.torch import load_file
from torch import Tensor

from comfy_continual_lora import sample
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.concepts import to_pil
from comfy_continual_lora.mini.trainset import to_tensor
from comfy_continual_lora.report import grid
from comfy_continual_lora.settings import DrawSettings

SEED = 77_000_000  # no picture of a training set has an index as large


def unseen(count: int) -> list[tuple[world.Scene, np.random.Generator]]:
    found = []
    for index in range(SEED, SEED + 40 * count):
        scene, rng = dataset.scene(0, index)
        if scene.plain and len(found) < count:
            found.append((scene, rng))
    return found


@torch.no_grad()
def read(
    reader: nets.Reader, pictures: Tensor, scenes: Sequence[world.Scene], device: str
) -> dict[str, float]:
    """The share of each kind that is read right, and of it alone in scenes of two things: of nouns,
    kinds, colours; of the arrangement.
    """
    chunks = [reader(chunk.to(device)) for chunk in pictures.split(128)]
    logits = {
        name: torch.cat([one[name] for one in chunks]).float().cpu() for name in dataset.SIZES
    }
    right = nets.is_right(logits, dataset.labels(scenes))
    two = torch.tensor([scene.arrangement in world.RELATIONS for scene in scenes])
    found = {}
    for what in ("place", "style", "noun", "kind", "colors"):
        own = torch.stack([values for name, values in right.items() if name.startswith(what)])
        found[what] = float(own.nanmean())
        if len(own) > 1:
            found[f"{what} of two"] = float(own[:, two].nanmean())
    found["relation"] = float(right["arrangement"][two].mean())
    found["count"] = float(right["arrangement"][~two].mean())
    both = torch.stack(
        [right[f"{what}_{slot}"][two] for what in ("noun", "colors") for slot in "ab"]
    )
    found["two things, nouns and colors"] = float(both.nan_to_num(1.0).prod(0).mean())
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how well captions are drawn.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--captions", type=int, default=1024)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    backbone = load_backbone(arguments.out / "second.safetensors", device=device)
    reader = nets.Reader().eval()
    reader.load_state_dict(load_file(arguments.out / "reader.safetensors"))
    reader.to(device)
    pairs = unseen(arguments.captions)
    scenes = [scene for scene, _ in pairs]
    real = to_tensor(np.stack([world.draw_scene(*pair) for pair in pairs]))
    latents = [one for chunk in real.split(32) for one in backbone.encode_images(chunk)]
    parts = torch.stack(latents).split(32)
    decoded = torch.cat([backbone.decode_latents(chunk).cpu().float() for chunk in parts])
    settings = DrawSettings(guidance=arguments.guidance).resolved(backbone.preset)
    seeds = range(len(scenes))
    drawn = sample.draw(backbone, {}, [one.caption for one in scenes], seeds, settings).cpu()
    error = (decoded - real).square().mean((1, 2, 3))
    row = {
        "captions": len(scenes),
        "guidance": settings.guidance,
        "steps": settings.steps,
        "psnr": round(float((-10 * torch.log10(error / 4)).mean()), 2),
        "real": read(reader, real, scenes, device),
        "autoencoder": read(reader, decoded, scenes, device),
        "drawn": read(reader, drawn, scenes, device),
    }
    (arguments.out / "quality.json").write_text(json.dumps(row, indent=1) + "\n")
    captions = "\n".join(scene.caption for scene in scenes[:48])
    (arguments.out / "captions.txt").write_text(captions + "\n")
    sheet = grid([to_pil(picture) for picture in drawn[:48]], 8)
    sheet.save(arguments.out / "samples.jpg", quality=92)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
