"""Judges of pictures that do not share the mini-CLIP's features: an encoder that has seen neither
captions nor labels, and a reader of what one thing looks like.

    python benchmarks/retention/judges.py FOLDER
        train them (nine minutes of one core), print how good they are on unseen pictures

Input: pictures (n, 3, 128, 128) in -1..1. Output: features (n, 256), or how far the pictures show a
concept; FOLDER/judges.safetensors.

    Encoder       a CNN trained without labels: two drawings of the same things, each in a pose and
                  on a background of its own, cropped, jittered and blurred, are to have the same
                  features, which are to vary and not to repeat each other (VICReg). Crops of one
                  drawing do not do: background is then all that the features tell apart.
    Attributes    a CNN trained with labels: shape, pattern, eyes, extra; each of a look's colours
                  is the mean of the pixels that it attends to.

Both see half the resolution. They are trained on random looks of all shapes and patterns, from a
seed of their own: on no concept of `world.concepts` and no generated picture.

On unseen pictures: shape 1.0 right, pattern .975, colours off by 8 of 255 in the mean (development
concepts: 1.0, 1.0, 8). The nearest of 60 concepts' pictures, on other backgrounds, shows the same
concept for .998 of pictures (mini-CLIP: .03). MMD^2 of real pictures from ones that were shrunk onto
their mean is .08 with the Gaussian kernel, .000005 with the quadratic one.

Source: VICReg, Bardes et al. 2022 (arXiv 2105.04906).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from judgepictures import (
    CLASSES,
    SEED,
    Pictures,
    augment,
    color_errors,
    draw_concepts,
    draw_pictures,
    half_size,
    labels,
)
from judgequality import quality
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from comfy_continual_lora import metrics
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.training import Loss, Run, fit


class Budget(NamedTuple):
    """How much the judges are trained."""

    scenes: int = 8000  # each is drawn twice
    encoder_steps: int = 600
    attribute_steps: int = 1500
    batch: int = 128


# --- the judges -----------------------------------------------------------------------------------


def _stage(before: int, after: int) -> list[nn.Module]:
    """Half the resolution."""
    conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU()]


class Encoder(nn.Module):
    """Pictures (n, 3, 64, 64) -> features (n, 256), each of mean 0 and variance 1."""

    def __init__(self) -> None:
        super().__init__()
        stages = [*_stage(3, 32), *_stage(32, 64), *_stage(64, 128), *_stage(128, 256)]
        self.body = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.norm = nn.BatchNorm1d(256, affine=False)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.norm(self.body(pictures))


class Attributes(nn.Module):
    """Pictures of one thing (n, 3, 64, 64) -> logits (n, classes) by attribute, and the look's
    three colours (n, 3, 3) in -1..1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(*_stage(3, 32))
        late = [*_stage(32, 64), *_stage(64, 96), *_stage(96, 128), nn.Flatten()]
        self.late = nn.Sequential(
            *late, nn.Linear(128 * 16, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()
        )
        self.heads = nn.ModuleDict({key: nn.Linear(256, size) for key, size in CLASSES.items()})
        self.queries = nn.Linear(256, 3 * (32 + 64))
        self.places = nn.Parameter(torch.zeros(64, 32, 32))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        early = self.early(pictures)  # (n, 32, 32, 32)
        hidden = self.late(early)
        places = self.places.expand(len(pictures), -1, -1, -1)
        keys = torch.cat([early, places], 1).flatten(2)
        attention = (self.queries(hidden).view(-1, 3, 96) @ keys / 4).softmax(2)  # (n, 3, pixels)
        colors = attention @ F.avg_pool2d(pictures, 2).flatten(2).transpose(1, 2)
        return {"colors": colors, **{key: head(hidden) for key, head in self.heads.items()}}


class Judges(nn.Module):
    """Both judges, and the width of the Gaussian kernel that suits the encoder's features."""

    width: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.attributes = Attributes()
        self.register_buffer("width", torch.ones(()))

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """(n, 3, 128, 128) in -1..1 -> (n, 256)."""
        return torch.cat([self.encoder(half_size(chunk)) for chunk in pictures.split(64)])

    def features_by_concept(self, pictures: Tensor) -> Tensor:
        """(concepts, n, 3, 128, 128) -> (concepts, n, 256)."""
        return self.features(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """The Gaussian kernel for features of length 1, as `metrics.mmd2` takes it."""
        return metrics.gaussian(x, y, float(self.width))

    @torch.no_grad()
    def agreement(self, pictures: Tensor, concept: world.Concept) -> dict[str, Tensor]:
        """For pictures of one thing, each (n,): whether its `shape` and `pattern` are the
        concept's, 0 or 1; the mean distance of its `colors` (R, G, B in 0..255) from the concept's
        that are seen on its shape in its pattern.
        """
        chunks = [self.attributes(half_size(chunk)) for chunk in pictures.split(64)]
        read = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
        true = labels([concept.look])
        right = {key: (read[key].argmax(1) == true[key]).float() for key in ("shape", "pattern")}
        return {**right, "colors": color_errors(read, true)[:, true["shown"][0]].mean(1)}


# --- training -------------------------------------------------------------------------------------


def load_judges(folder: Path, budget: Budget | None = None) -> Judges:
    """The judges of this folder; trained first if it has none. One process trains, others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "judges.safetensors"
    with FileLock(folder / ".judges.lock"):
        if not path.exists():
            partial = path.with_suffix(".partial")
            state = train(budget or Budget()).state_dict()
            save_file({key: value.contiguous() for key, value in state.items()}, partial)
            partial.rename(path)
    judges = Judges()
    judges.load_state_dict(load_file(path))
    return judges.eval()


def train(budget: Budget) -> Judges:
    """The same judges at every call."""
    pictures = draw_pictures(budget.scenes)
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as scratch:
        judges = Judges()
        run = Run(Path(scratch), torch.device("cpu"))
        judges.attributes = train_attributes(run, pictures, budget)
        judges.encoder = train_encoder(run, pictures, budget)
    judges.eval()
    judges.width.fill_(median_width(judges))
    return judges


def train_attributes(run: Run, pictures: Pictures, budget: Budget) -> Attributes:
    torch.manual_seed(SEED)
    reader = Attributes()
    loss = attribute_loss(reader, run, pictures, budget.batch)
    fit(run, "attributes", reader, loss, steps=budget.attribute_steps, rate=3e-3)
    return reader


def train_encoder(run: Run, pictures: Pictures, budget: Budget) -> Encoder:
    torch.manual_seed(SEED)
    encoder = Encoder()
    projector = nn.Sequential(
        nn.Linear(256, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512)
    )
    both = nn.Sequential(encoder, projector)
    loss = encoder_loss(both, run, pictures, budget.batch)
    fit(run, "encoder", both, loss, steps=budget.encoder_steps, rate=2e-3)
    return encoder


def encoder_loss(encoder: nn.Module, run: Run, pictures: Pictures, batch: int) -> Loss:
    """VICReg on two drawings of the same things. `encoder` ends with the projector."""
    scenes = torch.cat([pictures.single, pictures.double])

    def loss(_step: int) -> tuple[Tensor, dict[str, float]]:
        both = scenes[torch.randint(len(scenes), (batch,))].float()
        views = augment(torch.cat([both[:, 0], both[:, 1]]), (0.7, 1.0), tint=0.15)
        with run.autocast():
            projected = encoder(views)
        first, second = projected.float().chunk(2)
        apart = F.mse_loss(first, second)
        spread = torch.stack([_variance_and_covariance(view) for view in (first, second)]).sum(0)
        total = 25 * apart + 12.5 * spread[0] + spread[1]
        return total, {"apart": float(apart.detach())}

    return loss


def _variance_and_covariance(features: Tensor) -> Tensor:
    """VICReg's penalties of a deviation below 1 and of correlated features, (2,)."""
    centered = features - features.mean(0)
    low = F.relu(1 - (centered.var(0) + 1e-4).sqrt()).mean()
    covariance = centered.T @ centered / (len(features) - 1)
    others = covariance.square().sum() - covariance.diagonal().square().sum()
    return torch.stack([low, others / features.shape[1]])


def attribute_loss(reader: nn.Module, run: Run, pictures: Pictures, batch: int) -> Loss:
    """Cross-entropy of the classes, absolute error of the colours that are seen."""
    true = labels(pictures.looks)

    def loss(_step: int) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(pictures.single), (batch,))
        single = pictures.single[index, torch.randint(2, (batch,))].float()
        with run.autocast():
            read = reader(augment(single, (0.9, 1.1), tint=0.0))
        errors = [F.cross_entropy(read[key].float(), true[key][index]) for key in CLASSES]
        off = (read["colors"].float() - true["colors"][index]).abs().sum(2)
        color = off[true["shown"][index]].mean()
        return torch.stack(errors).sum() + 3 * color, {"color": float(color.detach())}

    return loss


def median_width(judges: Judges) -> float:
    """Median distance of two pictures of the same concept, over unseen ones; in features of length
    1. It is the scale at which a set that lost its variety differs from one that has it.
    """
    features = judges.features_by_concept(draw_concepts(16, 10, seed=1))
    unit = F.normalize(features, dim=2)
    return float(torch.stack([torch.pdist(own).median() for own in unit]).median())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the judges; print how good they are.")
    parser.add_argument("folder", type=Path)
    figures = quality(load_judges(parser.parse_args().folder))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
