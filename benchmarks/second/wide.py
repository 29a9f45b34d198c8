"""The mini-SD with a text encoder of another width, on a CPU: is it the 256 numbers of its text
features that fifty concepts in one LoRA lack?

    python benchmarks/second/wide.py OUT --width 768       # an hour of one core
    python benchmarks/mini/quality.py OUT/quality --captions 128 --checkpoint OUT/wide.safetensors

in: nothing (the world is drawn) - out: OUT/wide.safetensors, a checkpoint; OUT/log.jsonl.

    pictures   the first 12,000 of the mini-SD's training set
    seen       what the shipped image tower sees in them
    clip       a new text tower of this width: the contrastive loss against what was seen, and the
               attribute loss, as the shipped one was trained
    latents, features
    start      the shipped U-Net, its K and V fitted to the new features by least squares
    unet       trained on, all of it
    pack       the checkpoint

Each stage goes on from its snapshot, and one whose file exists is skipped. With `--width 256` it makes
what the wider one is to be compared with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from comfy_continual_lora.mini import parts, stages, trainset, weights
from comfy_continual_lora.mini.training import Run, fit

PICTURES = 12_000
STEPS = {"clip": 600, "unet": 400}


def draw_pictures(run: Run) -> None:
    path = run.out / "pictures.npy"
    if not path.exists():
        trainset.draw(path, 2, PICTURES)


@torch.no_grad()
def look(run: Run) -> None:
    """Write the shipped parts, and the image tower's features of every picture (n, 192)."""
    weights.unpack(run.out)
    for name in ("clip", "unet"):
        (run.out / f"{name}.safetensors").rename(run.out / f"shipped-{name}.safetensors")
    pictures = trainset.Pictures(run.out / "pictures.npy")
    chunks = np.array_split(np.arange(PICTURES), PICTURES // 64)
    seen = torch.cat([weights.vision_features(pictures.images(chunk)) for chunk in chunks])
    save_file({"seen": seen}, run.out / "seen.safetensors")


def train_text(run: Run, width: int, steps: int, n: int = 32) -> None:
    shipped = load_file(run.out / "shipped-clip.safetensors")
    model = parts.new_clip(text_width=width)
    images = {k: v for k, v in shipped.items() if k.startswith(("vision_model.", "visual_proj"))}
    model.load_state_dict(images, strict=False)
    heads = parts.AttributeHeads(width)
    seen = F.normalize(load_file(run.out / "seen.safetensors")["seen"], dim=-1)
    captions = stages.Captions(run.device)
    own = torch.arange(n // 2)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((trainset.SEED, 6, step))
        # half of them from the pictures that were looked at, for the contrastive loss
        known = rng.choice(PICTURES, n // 2, replace=False)
        indices = np.concatenate([known, rng.integers(0, len(captions), n - n // 2)])
        pooled, features = captions.read(model, indices)
        said = stages.attribute_loss(heads(features), captions.targets(indices))
        projected = model.text_projection(pooled[: n // 2])
        logits = 50 * seen[torch.from_numpy(known)] @ F.normalize(projected, dim=-1).T
        contrastive = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        found = {"said": float(said.detach()), "contrastive": float(contrastive.detach())}
        return contrastive + 0.3 * said, found

    trained = nn.ModuleList([model.text_model, model.text_projection, heads])
    fit(run, "clip", trained, loss, steps=steps, rate=1e-3 * (parts.TEXT_WIDTH / width) ** 0.5)
    run.save("clip", model)


@torch.no_grad()
def start_unet(run: Run, width: int, captions: int = 800) -> None:
    """Fit x -> M x from the new features to the shipped ones, and put K M and V M for K and V."""
    stages.encode_captions(run, PICTURES, width)
    old = parts.new_clip().eval()
    old.load_state_dict(load_file(run.out / "shipped-clip.safetensors"))
    every = sorted(set(trainset.captions(trainset.scenes(PICTURES))))
    new = load_file(run.out / "features.safetensors")["features"]
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:captions]
    ids = parts.Vocabulary().encode([every[int(row)] for row in chosen])
    target = torch.cat([old.text_model(input_ids=part).last_hidden_state for part in ids.split(64)])
    x, y = (features.flatten(0, 1).double() for features in (new[chosen].float(), target))
    gram = x.T @ x
    ridge = 1e-4 * float(gram.diagonal().mean()) * torch.eye(width, dtype=torch.float64)
    fitted = torch.linalg.solve(gram + ridge, x.T @ y).T.float()
    left = (x.float() @ fitted.T - y.float()).square().mean() / y.float().var()
    unet = load_file(run.out / "shipped-unet.safetensors")
    for name in unet:
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            unet[name] = unet[name] @ fitted
    save_file(unet, run.out / "unet.start.safetensors")
    run.log(stage="start", width=width, unexplained=round(float(left), 4))


def pack(run: Run) -> None:
    state = weights.complete(weights.joined(run.out), parts.Vocabulary().tokens)
    metadata = {**weights.METADATA, "modelspec.title": "mini-SD with another text encoder"}
    save_file(state, run.out / "wide.safetensors", metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a mini-SD with another text encoder.")
    parser.add_argument("out", type=Path, help="folder for data, snapshots and results")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps, to try it")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(trainset.SEED)
    torch.set_num_threads(1)
    run, width = Run(arguments.out, torch.device("cpu")), arguments.width
    steps = {name: max(2, round(arguments.scale * count)) for name, count in STEPS.items()}
    every: dict[str, Callable[[], None]] = {
        "pictures.npy": partial(draw_pictures, run),
        "seen.safetensors": partial(look, run),
        "clip.safetensors": partial(train_text, run, width, steps["clip"]),
        "latents.safetensors": partial(stages.encode_latents, run),
        "unet.start.safetensors": partial(start_unet, run, width),
        "unet.safetensors": partial(stages.train_unet, run, steps["unet"], width=width),
        "wide.safetensors": partial(pack, run),
    }
    for name, stage in every.items():
        if not (run.out / name).exists():
            stage()


if __name__ == "__main__":
    main()
