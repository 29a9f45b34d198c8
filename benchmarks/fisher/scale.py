"""Does EWC's lambda mean the same on another net? The size of its gradients beside those of the
denoising loss, by rank and on a net as large as SD1.5.

    python benchmarks/fisher/scale.py benchmarks/fisher [--nets narrow:4,narrow:16,narrow:64,stock:16]

in: nothing - out: OUT/scale.json. Two development concepts of the mini-SD's world are learned, the
first by `lora_ewc`, the second by `lora` from there, so that nothing holds it. For the adapter that
results, the norms of the gradients of

    denoising    L_denoise on pictures of the second concept, the mean of `--samples` draws
    mean 1       sum F (theta - theta*)^2, with F of mean 1 and theta* of the first concept
    root         the same divided by sqrt(N), as `ewc` does; N parameters

narrow is the mini-SD, stock the same function widened to SD1.5's layers (`mini --stock`), with other
initial factors; both with the mini-SD's rate.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from comfy_continual_lora import pipeline, requests, store
from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.concepts import load_images
from comfy_continual_lora.diffusion import generator_for, loss_per_example, noised, random_batch
from comfy_continual_lora.ewc import ewc_penalty
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.settings import LearnSettings

PICTURE = 128  # pixels a side


def ratios(net: str, rank: int, steps: int, batch: int, samples: int) -> dict[str, float]:
    """The norms of the gradients and of the change that the second concept made, and N."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "mini.safetensors"
        write_checkpoint(checkpoint, stock=net == "stock")
        concepts = world.concepts("development")[:2]
        for number, (concept, method) in enumerate(
            zip(concepts, ("lora_ewc", "lora"), strict=True), start=1
        ):
            pictures = world.save_pictures(concept, Path(folder) / f"V{number}")
            settings = LearnSettings(
                method=method,
                rank=rank,
                steps=steps,
                batch=batch,
                fisher_samples=samples,
                size=PICTURE,
            )
            request = requests.LearnRequest(
                checkpoint, pictures, f"V{number}", concept.noun, settings, device="cpu"
            )
            pipeline.learn_concept(request)
        backbone = load_backbone(checkpoint, device="cpu")
        stack = store.load_stack(store.stack_path(checkpoint), backbone.fingerprint)
        latents = backbone.encode_images(load_images(pictures, PICTURE).images)
    first, second = stack.records
    fisher, anchor = stack.fishers[first.id], stack.adapter_after(first.id)
    assert stack.adapter is not None
    assert anchor is not None
    features = FrozenText(backbone, stack.tokens)([f"a photo of a {second.name}"])
    with attached(backbone, stack.adapter, trainable=True) as factors:
        for number in range(samples // batch):
            _, clean, timestep, noise = random_batch(latents, batch, generator_for("scale", number))
            noisy, wanted = noised(backbone, clean, noise, timestep)
            predicted = backbone.predict(noisy, timestep, features.repeat(batch, 1, 1))
            (loss_per_example(predicted, wanted).mean() * batch / samples).backward()
        denoising = _norm(factors.values())
        for parameter in factors.values():
            parameter.grad = None
        ewc_penalty(factors, anchor, fisher).backward()
        mean_1 = _norm(factors.values())
        moved = torch.cat([(factors[k] - anchor[k]).flatten() for k in anchor]).norm()
    numbers = sum(t.numel() for t in anchor.values())
    return {
        "denoising": denoising,
        "mean 1 to denoising": mean_1 / denoising,
        "root to denoising": mean_1 / math.sqrt(numbers) / denoising,
        "numbers": numbers,
        "moved": float(moved.detach()),
    }


def _norm(parameters: Iterable[Tensor]) -> float:
    """Of all gradients together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(torch.cat([g.flatten() for g in gradients]).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description="EWC's gradients beside the loss', on two nets.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100, help="per concept")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--nets", default="narrow:4,narrow:16,narrow:64,stock:16")
    arguments = parser.parse_args()
    found = {}
    for net in arguments.nets.split(","):
        name, _, rank = net.partition(":")
        found[net] = ratios(name, int(rank), arguments.steps, arguments.batch, arguments.samples)
        print(net, json.dumps(found[net]), flush=True)
    (arguments.out / "scale.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
