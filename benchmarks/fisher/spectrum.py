"""Does asking for DC scores give the Fisher more to say? The largest eigenvalues of single layers,
with and without the cross-entropy of the scores.

    python benchmarks/fisher/spectrum.py benchmarks/fisher [--concepts 3] [--steps 200]

Input: nothing (reporting concepts, learned one after the other by plain `lora`).
Output: OUT/spectrum.json and OUT/spectrum.png: three layers drawn at random, the top 20 eigenvalues
of each one's whole Fisher (not only its diagonal) from 256 single gradients, falling.

Sanity check 2 of Jha et al. 2025, who compare the spectra of EWC's Fisher with and without DC
scores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

from comfy_continual_lora import pipeline, requests, store
from comfy_continual_lora.adapters.adapter import attached, layers_of
from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.concepts import load_images
from comfy_continual_lora.fisher import FisherInputs, spectrum
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.settings import LearnSettings

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TOP = 20
LOSSES = {"denoising": False, "denoising and DC scores": True}
Spectra = dict[str, dict[str, list[float]]]  # eigenvalues by layer and loss


def spectra(concepts: list[world.Concept], steps: int) -> Spectra:
    """Of the newest concept's Fisher where plain LoRA left the adapter."""
    settings = LearnSettings(method="lora", steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "mini.safetensors"
        write_checkpoint(checkpoint)
        for number, concept in enumerate(concepts, start=1):
            pictures = world.save_pictures(concept, Path(folder) / f"V{number}")
            request = requests.LearnRequest(
                checkpoint, pictures, f"V{number}", concept.noun, settings, device="cpu"
            )
            pipeline.learn_concept(request)
        backbone = load_backbone(checkpoint, device="cpu")
        stack = store.load_stack(store.stack_path(checkpoint), backbone.fingerprint)
        latents = backbone.encode_images(load_images(pictures, backbone.size).images)
    *previous, newest = stack.records
    assert stack.adapter is not None
    names = list(layers_of(stack.adapter))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    layers = [names[int(i)] for i in order[:3]]
    earlier = [record.name for record in previous]
    inputs = FisherInputs(latents, newest.name, newest.noun, earlier, stack.tau)
    text, resolved = FrozenText(backbone, stack.tokens), settings.resolved("mini")
    by_layer: Spectra = {layer: {} for layer in layers}
    with attached(backbone, stack.adapter, trainable=True) as factors:
        for loss, scores in LOSSES.items():
            chosen = inputs if scores else replace(inputs, tau=None)
            values = spectrum(backbone, factors, chosen, text, resolved, layers, TOP)
            for layer in layers:
                by_layer[layer][loss] = values[layer].tolist()
    return by_layer


def draw(out: Path, by_layer: Spectra) -> None:
    """A plot for each layer, eigenvalues relative to the largest: how many directions count."""
    figure, axes = plt.subplots(1, len(by_layer), figsize=(4.2 * len(by_layer), 3.6), sharey=True)
    for axis, (layer, by_loss) in zip(axes, by_layer.items(), strict=True):
        for loss, values in by_loss.items():
            ranks = range(1, len(values) + 1)
            relative = [value / values[0] for value in values]
            label = f"{loss} (largest {values[0]:.2g})"
            axis.semilogy(ranks, relative, marker=".", label=label)
        axis.set_title(layer, fontsize=7)
        axis.set(xlabel="eigenvalue, by size")
        axis.legend(fontsize=7)
    axes[0].set(ylabel="of the largest")
    figure.tight_layout()
    figure.savefig(out / "spectrum.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Spectra of the Fisher with and without DC scores."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="per concept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    by_layer = spectra(world.concepts("reporting")[: arguments.concepts], arguments.steps)
    (arguments.out / "spectrum.json").write_text(json.dumps(by_layer, indent=1) + "\n")
    draw(arguments.out, by_layer)
    for layer, by_loss in by_layer.items():
        for loss, (largest, *rest) in by_loss.items():
            count = 1 + sum(value > largest / 2 for value in rest)
            print(f"{layer}, {loss}: largest {largest:.3g}, half of it or more: {count}")


if __name__ == "__main__":
    main()
