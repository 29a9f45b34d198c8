"""What a sequence of the benchmark consists of: concepts of the mini-SD's world, or folders of
photographs.

Photographs lie as in CustomConcept101 and DreamBooth's set: a folder of folders, one for each
subject. Its class noun is `class_prompt` of `dataset.json` beside the folders, where there is one
(CustomConcept101), else the folder's name without digits and underscores.
Source: Kumari et al. 2023 (CustomConcept101).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comfy_continual_lora import concepts
from comfy_continual_lora.inventory import inventory
from comfy_continual_lora.mini import trainset, world
from comfy_continual_lora.mini.looks import Look

LEARNED_FROM = 5  # pictures of a concept of the world


@dataclass(frozen=True)
class Subject:
    """Something to learn: pictures to learn from, and others that drawings are compared with."""

    name: str
    noun: str
    concept: world.Concept | None = None  # of the world; else photographs
    files: tuple[Path, ...] = ()
    size: int = 128

    def save(self, folder: Path) -> list[Path]:
        """Write the pictures to learn from."""
        if self.concept:
            return world.save_pictures(self.concept, folder, LEARNED_FROM)
        folder.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(file, folder / file.name)) for file in self._parts()[0]]

    def learned_from(self) -> Tensor:
        """The pictures to learn from, (n, 3, size, size) in -1..1."""
        if self.concept:
            return training_pictures(self.concept)
        return self._opened(self._parts()[0])

    def real(self, count: int) -> Tensor:
        """Pictures that were not learned from; of photographs, as many as there are."""
        if self.concept is None:
            return self._opened(self._parts()[1])
        pictures: list[np.ndarray] = []
        for seed in range(1, 2 + count // 10):
            pictures += world.concept_pictures(self.concept, 10, seed=seed)
        return _stacked(pictures[:count])

    def _parts(self) -> tuple[list[Path], list[Path]]:
        """Every third photograph is not learned from, if at least three others and two such are
        there. Fewer photographs are learned from and compared with, all of them.
        """
        held_out = list(self.files[2::3])
        learned = [file for file in self.files if file not in held_out]
        if len(learned) < 3 or len(held_out) < 2:
            return list(self.files), list(self.files)
        return learned, held_out

    def _opened(self, files: list[Path]) -> Tensor:
        pictures = [concepts.fitted(concepts.read_image(f), self.size, "crop") for f in files]
        return torch.stack([concepts.to_tensor(picture) for picture in pictures])


def training_pictures(concept: world.Concept) -> Tensor:
    """The five pictures a concept of the world is learned from, (5, 3, 128, 128)."""
    return _stacked(list(world.concept_pictures(concept, LEARNED_FROM)))


def _stacked(pictures: list[np.ndarray]) -> Tensor:
    return trainset.to_tensor(np.stack(pictures))


# --- of the world ---------------------------------------------------------------------------------

ORDERS = ("mixed", "one-noun", "near-duplicates", "adversarial")


def of_world(split: str, seed: int, count: int, order: str = "mixed") -> list[Subject]:
    """`count` concepts of a split, by the order and the seed.

    mixed             the first ones of the split, shuffled
    one-noun          the same, all on the shape of the first: nothing but the word tells them apart
    near-duplicates   pairs that differ in one colour
    adversarial       each as like the one before it as the split has
    """
    pool = world.concepts(split, max(world.CONCEPTS_PER_SPLIT, count))
    shuffled = [pool[int(n)] for n in np.random.default_rng(seed).permutation(len(pool))]
    chosen = shuffled[:count]
    if order == "one-noun":
        chosen = [_on_shape(one, chosen[0].noun) for one in chosen]
    elif order == "near-duplicates":
        pairs = zip(chosen, shuffled[count:] + shuffled[:count], strict=False)
        both = [one for first, other in pairs for one in (first, _twin(first, other))]
        chosen = both[:count]
    elif order == "adversarial":
        chosen = _by_likeness(shuffled, count)
    return [Subject(one.name, one.noun, one) for one in chosen]


def _on_shape(concept: world.Concept, noun: str) -> world.Concept:
    name = f"{concept.name.rpartition('-')[0]}-{noun}"
    return world.Concept(name, noun, replace(concept.look, shape=noun))


def _twin(concept: world.Concept, other: world.Concept) -> world.Concept:
    """The same with the first colour of another concept; every pattern shows its first colour."""
    colors = (other.look.colors[0], *concept.look.colors[1:])
    return world.Concept(f"{concept.name}-twin", concept.noun, replace(concept.look, colors=colors))


def _by_likeness(pool: list[world.Concept], count: int) -> list[world.Concept]:
    """From the first of the pool on, the one most like the last."""
    left, chosen = pool[1:], pool[:1]
    while len(chosen) < count:
        last = chosen[-1].look
        nearest = min(left, key=lambda one: _unlikeness(last, one.look))
        left.remove(nearest)
        chosen.append(nearest)
    return chosen


def _unlikeness(look: Look, other: Look) -> tuple[int, float]:
    """Fewer shared attributes first, then the distance of the colours."""
    shared = (look.shape == other.shape) + (look.pattern == other.pattern)
    return -shared, float(np.abs(np.subtract(look.colors, other.colors)).sum())


# --- photographs ----------------------------------------------------------------------------------


def of_folder(folder: Path, seed: int, size: int) -> list[Subject]:
    """The subjects of a folder in the order of this seed.

    Errors: ValueError if a folder has fewer than two pictures, or there is none.
    """
    nouns = _nouns(folder / "dataset.json")
    found = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = tuple(inventory(inner).files)
        if len(files) < 2:
            raise ValueError(f"{inner} has {len(files)} pictures; a subject needs two or more.")
        plain = " ".join("".join(c for c in inner.name if not c.isdigit()).split("_")).strip()
        found.append(Subject(inner.name, nouns.get(inner.name, plain), None, files, size))
    if not found:
        raise ValueError(f"{folder} has no folder of pictures; expected one for each subject.")
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[int(number)] for number in order]


def _nouns(path: Path) -> dict[str, str]:
    """The class noun by folder, from CustomConcept101's list of concepts."""
    if not path.exists():
        return {}
    return {
        Path(one["instance_data_dir"]).name: one["class_prompt"].removeprefix("photo of a ")
        for one in json.loads(path.read_text())
    }
