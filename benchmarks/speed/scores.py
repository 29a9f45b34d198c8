"""How many calls of the net a Diffusion Classifier decision takes, beside the published program."""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from programs import checkout
from torch import Tensor

from comfy_continual_lora.checkpoint.backbone import FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.classifier import classify
from comfy_continual_lora.mini import trainset, world
from comfy_continual_lora.settings import ScoreSettings

# latent (4, h, w), its number -> what it is, and how often the net was asked about one prompt
Way = Callable[[Tensor, int], tuple[str, int]]
# what the published program imports and nothing here calls
STAND_INS = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "pandas",
    "diffusion.datasets",
)


def scores(path: Path, pictures: int, trials: int) -> dict[str, Any]:
    """Which of the world's 16 things is in a picture? Ours, on all trials and with staged
    elimination on the same draws; the published program.
    """
    backbone, rng = load_backbone(path, device="cpu"), np.random.default_rng(7)
    scenes = [world.random_scene(rng, 1) for _ in range(pictures)]
    drawn = trainset.to_tensor(np.stack([world.draw_scene(scene, rng) for scene in scenes]))
    names = list(world.SHAPES)
    prompts = FrozenText(backbone, {})([f"a photo of a {name}" for name in names])
    features = dict(zip(names, prompts, strict=True))

    def ours(stages: int, trials: int = trials) -> Way:
        def way(latent: Tensor, number: int) -> tuple[str, int]:
            settings = ScoreSettings(trials=trials, stages=stages, seed=number)
            result = classify(backbone, latent, features, 1e-3, settings)
            return result.best, sum(result.trials)

        return way

    ways = {
        "all prompts": ours(1),
        "2 stages": ours(2),
        "3 stages": ours(3),
        "all stages": ours(16),
        "all stages, half the trials": ours(16, trials // 2),
        "all stages, a quarter": ours(16, trials // 4),
    }
    failed = {}
    try:
        ways |= _published(backbone.unet, features, trials)
    except FileNotFoundError as error:
        failed["published"] = {"failed": str(error)}
    decisions: dict[str, list[str]] = {name: [] for name in ways}
    calls: dict[str, list[int]] = {name: [] for name in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for number, latent in enumerate(backbone.encode_images(drawn)):
        for name, way in ways.items():
            started = time.process_time()
            best, asked = way(latent, number)
            seconds[name] += time.process_time() - started
            decisions[name].append(best)
            calls[name].append(asked)
    truth = [scene.things[0].look.shape for scene in scenes]
    calls_of_all = statistics.mean(calls["all prompts"])
    return {
        "pictures": pictures,
        "prompts": len(names),
        "trials": trials,
        "ways": failed
        | {
            name: {
                "calls_a_picture": statistics.mean(calls[name]),
                "of_all_prompts": statistics.mean(calls[name]) / calls_of_all,
                "calls_a_cpu_second": sum(calls[name]) / seconds[name],
                "right": _agreement(decisions[name], truth),
                "as_all_prompts": _agreement(decisions[name], decisions["all prompts"]),
            }
            for name in ways
        },
    }


def _agreement(one: list[str], other: list[str]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _published(unet: Any, features: dict[str, Tensor], trials: int) -> dict[str, Way]:
    """`eval_prob_adaptive` of diffusion-classifier/diffusion-classifier on our net and prompts (77,
    d), at its own timesteps and with our seeds.

    Adaptive: five prompts are left after a tenth of the trials, as in its commands for CIFAR-10 and
    Pets (10 and 37 prompts); with its usual squared error, and with the absolute one that those
    commands ask for. Its file is used as it is, with its `device` set to the CPU. While it is
    imported, torchvision, pandas and its own data sets are stood in for; what it imports from
    diffusers must have been imported before.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline  # noqa: F401

    path = [str(checkout("published")), *sys.path]
    with (
        patch.dict(sys.modules, {name: MagicMock() for name in STAND_INS}),
        patch.object(sys, "path", path),
    ):
        program: Any = importlib.import_module("eval_prob_adaptive")
    program.device = "cpu"
    names, prompts = list(features), torch.stack(list(features.values()))

    def theirs(n_samples: list[int], to_keep: list[int], loss: str) -> Way:
        arguments = argparse.Namespace(
            version="1-5",
            dtype="float32",
            n_samples=n_samples,
            to_keep=to_keep,
            loss=loss,
            n_trials=1,
            batch_size=32,
        )
        scheduler = EulerDiscreteScheduler.from_config(program.get_scheduler_config(arguments))

        def way(latent: Tensor, number: int) -> tuple[str, int]:
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn((trials, *latent.shape), generator=generator)
            best, data = program.eval_prob_adaptive(
                unet, latent[None], prompts, scheduler, arguments, all_noise=noise
            )
            return names[best], sum(len(one["pred_errors"]) for one in data.values())

        return way

    tenth = [max(1, trials // 10), trials]
    return {
        "published": theirs([trials], [1], "l2"),
        "published adaptive": theirs(tenth, [5, 1], "l2"),
        "published adaptive l1": theirs(tenth, [5, 1], "l1"),
    }
