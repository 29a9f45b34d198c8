"""Does asking for DC scores give the Fisher more to say? The largest eigenvalues of single layers,
with and without the cross-entropy of the scores.

    python benchmarks/fisher/spectrum.py benchmarks/fisher [--concepts 3] [--steps 200]

in: nothing (reporting concepts, learned one after the other by plain `lora`) - out:
OUT/spectrum.json and OUT/spectrum.png: three layers drawn at
random, the top 20 eigenvalues of each one's whole Fisher (not only its diagonal) from 256 single
gradients, falling. Sanity check 2 of Jha et al.
2025, who compare the spectra of EWC's Fisher with and without DC scores.
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
from comfy_continual_lora.fisher import Target, spectrum
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.settings import LearnSettings

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TOP, LOSSES = 20, {"denoising": False, "denoising and DC scores": True}


def spectra(concepts: list[world.Concept], steps: int) -> dict[str, dict[str, list[float]]]:
    """Eigenvalues by layer and loss, of the newest concept's Fisher where plain LoRA left the
    adapter.
    """
    settings = LearnSettings(method="lora", steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "mini.safetensors"
        write_checkpoint(checkpoint)
        for number, concept in enumerate(concepts, start=1):
            pictures = world.save_pictures(concept, Path(folder) / f"V{number}")
            pipeline.learn_concept(
                requests.LearnRequest(
                    checkpoint, pictures, f"V{number}", concept.noun, settings, device="cpu"
                )
            )
        backbone = load_backbone(checkpoint, device="cpu")
        stack = store.load_stack(store.stack_path(checkpoint), backbone.fingerprint)
        latents = backbone.encode_images(load_images(pictures, backbone.size).images)
    *previous, newest = stack.records
    assert stack.adapter is not None
    names = list(layers_of(stack.adapter))
    layers = [
        names[int(i)]
        for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:3]
    ]
    target, found = (
        Target(latents, newest.name, newest.noun, [record.name for record in previous], stack.tau),
        {},
    )
    with attached(backbone, stack.adapter, trainable=True) as factors:
        for loss, scores in LOSSES.items():
            chosen = target if scores else replace(target, tau=None)
            values = spectrum(
                backbone,
                factors,
                chosen,
                FrozenText(backbone, stack.tokens),
                settings.resolved("mini"),
                layers,
                TOP,
            )
            found[loss] = {layer: value.tolist() for layer, value in values.items()}
    return {layer: {loss: found[loss][layer] for loss in LOSSES} for layer in layers}


def draw(out: Path, found: dict[str, dict[str, list[float]]]) -> None:
    """A plot for each layer, eigenvalues in sizes of the largest: how many directions count."""
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), sharey=True)
    for axis, (layer, by_loss) in zip(axes, found.items(), strict=True):
        for loss, values in by_loss.items():
            sizes = [value / values[0] for value in values]
            axis.semilogy(
                range(1, len(values) + 1),
                sizes,
                marker=".",
                label=f"{loss} (largest {values[0]:.2g})",
            )
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
    parser.add_argument("--steps", type=int, default=200, help="a concept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = spectra(world.concepts("reporting")[: arguments.concepts], arguments.steps)
    (arguments.out / "spectrum.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(arguments.out, found)
    for layer, by_loss in found.items():
        tops = {loss: values[0] for loss, values in by_loss.items()}
        print(
            layer,
            {
                loss: (
                    f"largest {top:.3g}, half of it or more: "
                    f"{sum(v > top / 2 for v in by_loss[loss])}"
                )
                for loss, top in tops.items()
            },
        )


if __name__ == "__main__":
    main()
