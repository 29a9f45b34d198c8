"""How good the judges of judges.py are, on unseen pictures.

in: the judges - out: what they read right, how often the nearest picture shows the same concept, and
whether their distance notices that pictures of a concept have lost their variety.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from judgepictures import (
    CLASSES,
    SEED,
    color_errors,
    draw_concepts,
    draw_scene,
    half_size,
    labels,
    random_look,
)
from torch import Tensor

from comfy_continual_lora import metrics
from comfy_continual_lora.mini import trainset, weights, world

if TYPE_CHECKING:
    from judges import Judges


def retrieval(features: Tensor) -> float:
    """Share of pictures whose nearest other one shows the same concept. features (concepts, n, d)."""
    flat = F.normalize(features.flatten(0, 1), dim=1)
    concept = torch.arange(len(features)).repeat_interleave(features.shape[1])
    likeness = (flat @ flat.T).fill_diagonal_(-2)
    return float((concept[likeness.argmax(1)] == concept).float().mean())


def collapse(features: Tensor, kernel: metrics.Kernel) -> dict[str, float]:
    """Mean MMD^2 of real pictures of a concept from: other `real` ones, those `shrunk` tenfold onto
    their mean, the `one` nearest to it over and over. features (concepts, 2n, d).
    """
    sums = {"real": 0.0, "shrunk": 0.0, "one": 0.0}
    for own in F.normalize(features, dim=2):
        here, there = own.chunk(2)
        mean = there.mean(0)
        nearest = there[(there - mean).norm(dim=1).argmin()]
        sums["real"] += metrics.mmd2(here, there, kernel)
        sums["shrunk"] += metrics.mmd2(here, mean + 0.1 * (there - mean), kernel)
        sums["one"] += metrics.mmd2(here, nearest.expand_as(there), kernel)
    return {key: value / len(features) for key, value in sums.items()}


def accuracy(judges: Judges, count: int = 1000) -> dict[str, float]:
    """Of unseen pictures of one thing: the share read right, by attribute, and the mean and median
    error of the colours shown.
    """
    rng = np.random.default_rng((SEED, 3))
    looks = [random_look(rng) for _ in range(count)]
    drawn = trainset.to_tensor(np.stack([draw_scene([look], rng) for look in looks]))
    true = labels(looks)
    with torch.no_grad():
        read = judges.attributes(half_size(drawn))
    errors = color_errors(read, true)[true["shown"]]
    right = {key: float((read[key].argmax(1) == true[key]).float().mean()) for key in CLASSES}
    return {**right, "colors": float(errors.mean()), "median": float(errors.median())}


def quality(judges: Judges) -> dict[str, Any]:
    """What `main` prints."""
    drawn = draw_concepts(60, 8, seed=2)
    chunks = drawn.flatten(0, 1).split(32)
    clip = torch.cat([weights.vision_features(chunk) for chunk in chunks]).unflatten(0, (60, 8))
    many = judges.features_by_concept(draw_concepts(16, 40, seed=4))
    agreed: dict[str, list[float]] = {}
    for concept in world.concepts("development"):
        real = trainset.to_tensor(np.stack(list(world.concept_pictures(concept, 10, seed=1))))
        for key, values in judges.agreement(real, concept).items():
            agreed.setdefault(key, []).append(float(values.mean()))
    return {
        "read": accuracy(judges),
        "read, development concepts": {key: float(np.mean(v)) for key, v in agreed.items()},
        "retrieval": {
            "encoder": retrieval(judges.features_by_concept(drawn)),
            "mini-CLIP": retrieval(clip),
        },
        "width": float(judges.width),
        "collapse, Gaussian kernel": collapse(many, judges.kernel),
        "collapse, quadratic kernel": collapse(many, metrics.quadratic),
    }
