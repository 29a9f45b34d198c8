"""Make the mini-Anima on a CPU: Anima's architecture at 20 million parameters, of the mini-SD's world.

    python benchmarks/second/small.py OUT --processes 2        # two hours on two cores
    python benchmarks/second/small.py OUT --scale 0.01         # tries it in minutes

in: nothing (the world is drawn) - out: OUT/anima, a diffusers folder; OUT/log.jsonl.

The stages are `anima.STAGES`, with the mini-SD's pictures, captions and reader. Processes of one
thread each see different pictures and average their weights. Each stage goes on from its snapshot, and
one whose file exists is skipped.
"""

from __future__ import annotations

import argparse
from functools import cached_property, partial
from pathlib import Path

import anima
import numpy as np
import torch
import torch.distributed as dist
import train
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from comfy_continual_lora.mini import trainset
from comfy_continual_lora.mini.training import Loss, fit, in_processes, rank
from comfy_continual_lora.mini.weights import load_reader

STEPS = {"language": 600, "vae16": 1300, "flow": 1400}
BATCHES = {"language": 64, "vae16": 16, "flow": 64}
PLACES = 21  # layers of the reader up to its features of 8 x 8 places
ALONE = ("tokenizers", "language", "pack3")  # stages of one process


class World:
    """The mini-SD's training set. Every process sees pictures of its own."""

    def __init__(self, out: Path, seed: int, share: float) -> None:
        self.pictures = trainset.Pictures(out / "pictures.npy")
        count = round(trainset.PICTURES * min(1.0, share))
        self.captions = [trainset.scene(index)[0].caption for index in range(count)]
        self.seed = seed

    def __len__(self) -> int:
        return len(self.captions)

    def indices(self, step: int, n: int, stream: int) -> np.ndarray:
        """The n pictures of a step, (n,)."""
        rng = np.random.default_rng((self.seed, stream, rank(), step))
        return rng.integers(0, len(self), n)

    def images(self, indices: np.ndarray) -> Tensor:
        """(n, 3, 128, 128) in -1..1."""
        return self.pictures.images(indices)


class Small(train.Recipe):
    all_steps, all_batches = STEPS, BATCHES
    sizes = anima.Sizes(language=4, conditioner=2, net=8)

    @cached_property
    def data(self) -> World:
        return World(self.run.out, self.seed, 4 * self.arguments.scale)

    def fast(self, module: torch.nn.Module) -> torch.nn.Module:
        """Compiled if it is of convolutions, which are twice as fast then."""
        return module if isinstance(module, anima.Flow) else super().fast(module)

    def fit(self, name: str, model: torch.nn.Module, loss: Loss, **options: float) -> None:
        if dist.is_initialized():
            options["average_every"] = 4
        fit(self.run, name, model, loss, steps=self.steps(name), **options)  # type: ignore[arg-type]

    def encoded(self, encode: train.Coder, count: int | None = None) -> Tensor:
        """Each process encodes its share, and has all in the end."""
        if not dist.is_initialized():
            return super().encoded(encode, count)
        count, processes = min(count or len(self.data), len(self.data)), dist.get_world_size()
        share = -(-count // processes)
        first = rank() * share
        rows = [np.arange(i, i + 64) for i in range(first, first + share, 64)]
        latents = torch.cat([encode(self.data.images(row % count)) for row in rows]).float()[:share]
        parts = [torch.empty_like(latents) for _ in range(processes)]
        dist.all_gather(parts, latents)
        return torch.cat(parts)[:count]

    def reader_of_places(self) -> train.Coder:
        reader = load_reader().body[:PLACES]

        def places(images: Tensor) -> Tensor:
            return reader(images).flatten(2).transpose(1, 2)

        return places


def run_stage(stage: str, arguments: argparse.Namespace) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # the gradients of the other one take long in bfloat16
        getattr(anima, stage)(Small(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the mini-Anima.")
    parser.add_argument("out", type=Path, help="folder for data, snapshots and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps, to try it")
    arguments = parser.parse_args()
    arguments.device, arguments.compile = "cpu", True
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "pictures.npy").exists():
        trainset.draw(arguments.out / "pictures.npy", arguments.processes)
    torch.manual_seed(arguments.seed)
    for stage in anima.STAGES:
        if not (arguments.out / f"{stage}.safetensors").exists():
            count = 1 if stage in ALONE else arguments.processes
            in_processes(partial(run_stage, stage, arguments), count, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
