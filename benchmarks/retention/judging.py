"""What the retention benchmark measures on the stack a job has learned: drawn pictures against real
ones, DC scores, and two concepts in one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from eyes import features_of
from jobs import PICTURES, Job, read_rows
from PIL import Image
from subjects import Subject
from torch import Tensor

from comfy_continual_lora import classifier, concepts, report, sample, store
from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import drawing, trainset, weights, world
from comfy_continual_lora.settings import ScoreSettings

# where the world puts the two things of a picture
THING_ROWS = slice(33, 99)
LEFT, RIGHT = slice(0, 66), slice(62, 128)


class PairScene(NamedTuple):
    """Two concepts that a picture is to show, and what they are on."""

    left: world.Concept
    right: world.Concept
    ground: str


def load_run(folder: Path) -> tuple[Backbone, store.ConceptStack, list[world.Concept]]:
    """What a finished run left in its folder: the checkpoint, its stack, the concepts on it."""
    row = read_rows(folder.absolute().parents[1])[folder.name]
    job = Job(row["method"], row["seed"], row["concepts"], PICTURES, folder, steps=0)
    backbone = load_backbone(folder / "mini.safetensors", device="cpu")
    return backbone, store.open_stack(folder / "mini.concepts.safetensors"), job.sequence


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


# --- pictures and their features ------------------------------------------------------------------


def real_pictures(concept: world.Concept, count: int) -> Tensor:
    """Pictures of the concept that were not learned from."""
    return Subject(concept.name, concept.noun, concept).real(count)


def drawn_pictures(
    job: Job, backbone: Backbone, stack: store.ConceptStack, prompts: Sequence[str], key: str
) -> Tensor:
    """One picture for each prompt, (n, 3, size, size); drawn once and kept as PNG under `key`."""
    folder = job.folder / "drawn" / key
    files = [folder / f"{n}.png" for n in range(len(prompts))]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        pictures = pictures_by(job, backbone, stack, prompts, range(len(prompts)))
        for file, picture in zip(files, pictures, strict=True):
            concepts.to_pil(picture).save(file)
    return torch.stack([concepts.to_tensor(Image.open(file)) for file in files])


def pictures_by(
    job: Job,
    backbone: Backbone,
    stack: store.ConceptStack | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Tensor:
    """One picture for each prompt and seed; by the checkpoint alone without a stack."""
    with attached(backbone, stack.adapter if stack else None):
        words = stack.tokens if stack else {}
        settings = job.drawing.resolved(backbone.preset)
        return sample.draw(backbone, words, prompts, seeds, settings)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


# --- DC scores ------------------------------------------------------------------------------------


def dc_accuracy(job: Job, backbone: Backbone, stack: store.ConceptStack) -> float | None:
    """Share of training pictures whose likeliest concept of all learned ones is their own; pictures
    of fifty concepts at most, spread over the sequence.
    """
    if stack.tau is None:
        return None
    subjects, tokens = job.subjects, job.tokens
    prompts = [f"a photo of a {name}" for name in job.names]
    text = FrozenText(backbone, stack.tokens)(prompts)
    features = dict(zip(tokens, text, strict=True))
    per_concept, stride = max(1, 30 // job.concepts), -(-job.concepts // 50)
    right = []
    with attached(backbone, stack.adapter):
        for n in range(0, job.concepts, stride):
            pictures = subjects[n].learned_from()[:per_concept]
            for latent in backbone.encode_images(pictures):
                scores = classifier.classify(
                    backbone, latent, features, stack.tau, ScoreSettings(trials=16)
                )
                right.append(float(scores.best == tokens[n]))
    return mean(right)


# --- two concepts in one picture ------------------------------------------------------------------


def judge_pairs(job: Job, backbone: Backbone, stack: store.ConceptStack) -> tuple[float, float]:
    """Of neighbours of the sequence in one picture: the share of things that have their shape, and
    the share that look more like the other one of the two.
    """
    sequence, names = job.sequence, job.names
    grounds = list(world.BACKGROUNDS)[:4]
    scenes: list[PairScene] = []
    prompts = []
    for n in range(job.concepts - 1):
        for ground in grounds:
            scenes.append(PairScene(sequence[n], sequence[n + 1], ground))
            things = f"a {names[n]} and a {names[n + 1]}"
            prompts.append(f"a photo of {things} {world.BACKGROUNDS[ground]}")
    with attached(backbone, stack.adapter):
        pictures = sample.draw(backbone, stack.tokens, prompts, range(len(prompts)), job.drawing)
    sheet = report.grid([concepts.to_pil(picture) for picture in pictures], len(grounds))
    sheet.save(job.folder / "both.png")
    return right_shapes(pictures, scenes), bleeding(pictures, scenes)


def right_shapes(pictures: Tensor, scenes: Sequence[PairScene]) -> float:
    """Share of things in pictures of two that have their shape, by the attribute reader."""
    left = has_shape(pictures, "shape_a", [scene.left for scene in scenes])
    right = has_shape(pictures, "shape_b", [scene.right for scene in scenes])
    return float(torch.cat([left, right]).mean())


@torch.no_grad()
def has_shape(pictures: Tensor, head: str, concepts: Sequence[world.Concept]) -> Tensor:
    """Whether the attribute reader sees each concept's shape in its picture, (n,) 0 or 1.

    `head`: "shape_a" for the left or only thing, "shape_b" for the right one.
    """
    indices = torch.tensor([list(world.SHAPES).index(concept.noun) for concept in concepts])
    return (weights.load_reader()(pictures)[head].argmax(1) == indices).float()


def bleeding(
    pictures: Tensor,
    scenes: Sequence[PairScene],
    features: Callable[[Tensor], Tensor] = features_of,
) -> float:
    """Share of things in pictures of two, (n, 3, 128, 128), that look more like the other one in
    their place than like themselves: by features of the thing cut out, the mini-CLIP's by default.

    The world's own pictures get .02, with the things exchanged .97, with one thing twice .5
    (29 pairs of reporting concepts, four grounds each).
    """
    in_order = _real_pairs(scenes)
    exchanged = _real_pairs([PairScene(s.right, s.left, s.ground) for s in scenes])
    bled = [
        nearer_to_other(
            features_at(columns, pictures, features),
            features_at(columns, in_order, features),
            features_at(columns, exchanged, features),
        )
        for columns in (LEFT, RIGHT)
    ]
    return float(torch.cat(bled).mean())


def nearness(
    pictures: Tensor, scenes: Sequence[PairScene], features: Callable[[Tensor], Tensor]
) -> float:
    """The mean cosine of things in pictures of two with real pictures of them in their place."""
    real = _real_pairs(scenes)
    both = [
        (features_at(columns, pictures, features) * features_at(columns, real, features)).sum(1)
        for columns in (LEFT, RIGHT)
    ]
    return float(torch.cat(both).mean())


def nearer_to_other(drawn: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Whether each drawn thing is nearer to the other one than to itself, (n,) 0 or 1; all are
    features of length 1, (n, d).
    """
    return ((drawn * other).sum(1) > (drawn * own).sum(1)).float()


def _real_pairs(scenes: Sequence[PairScene]) -> Tensor:
    pictures = []
    for left, right, ground in scenes:
        things = (world.Thing(left.look, (), ""), world.Thing(right.look, (), ""))
        rng = np.random.default_rng(0)
        pictures.append(world.draw_scene(world.Scene(things, ground, ""), rng))
    return trainset.to_tensor(np.stack(pictures))


def features_at(columns: slice, pictures: Tensor, features: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the thing in these columns of each picture, (n, d), of length 1."""
    things = pictures[:, :, THING_ROWS, columns]
    size = (drawing.SIZE, drawing.SIZE)
    return unit(features(F.interpolate(things, size, mode="bilinear")))
