"""Stage 4: text space - K and V see nothing but text features, so what an adapter does to a prompt
can be computed without an image.

    K     = (W0 + delta) c        c (d,): the text features of a prompt at one of its positions
    M     = E_c c c^T             (d, d)
    drift = E_c || (delta - delta*) c ||^2              / E_c || W0 c ||^2
          = tr[ (delta - delta*) M (delta - delta*)^T ] / tr[ W0 M W0^T ]

The stack keeps M of ordinary prompts, and nearly all of each concept's M as a few rows (`stack`).
M stands for all of its prompts, so the drift is their mean, not a sample's. Penalising it protects
ordinary prompts, including the empty one (delta* = 0: the checkpoint), and, if no closed form
follows, earlier concepts (delta* = their own adapters). Optionally it also keeps the new concept's
look off the padding of its own prompts, where it would mix with another's. M also gives the
coordinates that a concept is learned in under this penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapters.adapter import Adapter, factored, layers_of
from .penalty import Step
from .presets import TEMPLATES
from .stack import ConceptRecord

if TYPE_CHECKING:
    from .checkpoint.backbone import Backbone

SHRINKAGE = 1.0  # in learning: benchmarks/LOG.md, 2026-11-28
PLACES = (
    "on grass",
    "on wood",
    "on sand",
    "in water",
    "in the sky",
    "on brick",
    "in snow",
    "on gravel",
    "at night",
    "on carpet",
    "in a room",
    "on the street",
    "in the forest",
    "on a table",
    "at the beach",
    "in front of a mountain",
)
THINGS = (
    "ball",
    "box",
    "star",
    "heart",
    "cross",
    "moon",
    "mug",
    "teapot",
    "vase",
    "house",
    "fish",
    "cat",
    "dog",
    "sneaker",
    "backpack",
    "mushroom",
    "person",
    "woman",
    "man",
    "car",
    "bottle",
    "flower",
    "toy",
    "chair",
    "bird",
    "tree",
    "bag",
    "boat",
    "building",
    "food",
)
COLORS = (
    "red",
    "blue",
    "green",
    "yellow",
    "black",
    "white",
    "purple",
    "pink",
    "orange",
    "teal",
    "brown",
    "grey",
    "golden",
)
SURFACES = ("striped", "dotted", "checkered", "plain", "shiny", "wooden", "old", "furry")
DETAILS = (
    "highly detailed",
    "sharp focus",
    "golden hour",
    "dramatic shadows",
    "a crowd of people in the background",
    "vintage film grain",
    "wide angle",
    "pastel colors",
    "an open window behind it",
    "8k uhd",
    "smooth bokeh",
    "cinematic lighting",
    "surrounded by flowers and books",
    "cloudy day",
    "rule of thirds",
    "a small white cup beside it",
    "hdr",
    "long exposure",
    "trees and hills far away",
    "masterpiece, best quality",
    "seen through rain",
    "warm tones",
    "a narrow street with shops",
    "magazine cover",
)


def ordinary_prompts(nouns: Sequence[str]) -> list[str]:
    """Prompts that name no concept: the empty one, things in various places and looks, and the
    concepts' class nouns without their words.
    """
    prompts = ["", *(f"a photo of a {thing}" for thing in THINGS)]
    for number, thing in enumerate(THINGS):
        prompts += _in_places(thing, number)
    for number, thing in enumerate(THINGS):
        prompts += _long(f"a photo of a {thing} {PLACES[number % len(PLACES)]}", number)
    for noun in nouns:
        prompts += noun_prompts(noun)
    return list(dict.fromkeys(prompts))


def noun_prompts(noun: str) -> list[str]:
    """Ordinary prompts about one class noun: in every place, in looks, beside another thing."""
    number = sum(map(ord, noun))  # so that nouns differ in what they come with
    prompts = [f"a photo of a {noun}"]
    for turn, place in enumerate(PLACES):
        prompts.append(f"a photo of a {noun} {place}")
        prompts.append(f"a photo of a {_look(turn)} {noun} {place}")
    prompts += _in_places(noun, number)
    prompts += _long(f"a photo of a {noun} {PLACES[number % len(PLACES)]}", number)
    return list(dict.fromkeys(prompts))


def _in_places(thing: str, number: int) -> list[str]:
    """The thing in three places and looks, and beside another one."""
    prompts = []
    for turn in range(3):
        look = _look(number + 31 * turn)
        place = PLACES[(number + 5 * turn) % len(PLACES)]
        other = THINGS[(number - 1 - turn) % len(THINGS)]
        other_look = _look(3 * number + 17 * turn + 5)
        prompts += [
            f"a photo of a {look} {thing} {place}",
            f"a {thing} {place}",
            f"a photo of a {look} {thing} and a {other_look} {other}",
        ]
    return prompts


def single_prompts(record: ConceptRecord) -> list[str]:
    """Prompts about one concept: its training captions, every template and place, and some as long
    as users write them.
    """
    prompts = [
        *record.prompts,
        *(template.format(record.name) for template in TEMPLATES),
        *(f"a photo of a {record.name} {place}" for place in PLACES),
    ]
    for number in range(4):
        place = PLACES[5 * number % len(PLACES)]
        prompts += _long(f"a photo of a {record.name} {place}", 3 * number)
    return list(dict.fromkeys(prompts))


def _look(number: int) -> str:
    """One color, a color and a surface, or two colors and a surface."""
    color = COLORS[number % len(COLORS)]
    other = COLORS[number * 5 % len(COLORS)]
    surface = SURFACES[number % len(SURFACES)]
    return (color, f"{color} {surface}", f"{color} and {other} {surface}")[number % 3]


def _long(prompt: str, number: int) -> tuple[str, str]:
    """The prompt followed by details, and with some of them in front: what comes first changes the
    features of everything after it.
    """
    details = [DETAILS[(number + 5 * turn) % len(DETAILS)] for turn in range(3 + number % 10)]
    return ", ".join([prompt, *details]), ", ".join([*details[:2], prompt, *details[2:]])


@torch.no_grad()
def moment(
    backbone: Backbone,
    words: Mapping[str, Tensor],
    prompts: Sequence[str],
    share: float | None = None,
    on_batch: Callable[[int], None] = lambda _done: None,
) -> Tensor:
    """M, the mean of c c^T over prompts and positions, (d, d) float32.

    `share`: the total weight of the positions up to a prompt's end; the padding has the rest. None:
    all positions weigh the same, which leaves a short prompt's words a seventh or less. `on_batch`
    is called with the number of prompts that are done, and may raise to stop.
    """
    sums = torch.zeros(2, backbone.word_width, backbone.word_width, device=backbone.device)
    counts = [0, 0]
    for start in range(0, len(prompts), 16):
        on_batch(start)
        chosen = prompts[start : start + 16]
        features = backbone.context(backbone.encode_prompts(chosen, words)).float()
        if share is None:
            is_padding = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        else:
            is_padding = backbone.padding(chosen, words)
        for kind, rows in enumerate((features[~is_padding], features[is_padding])):
            sums[kind] += rows.T @ rows
            counts[kind] += len(rows)
    words_moment, padding = (
        total / max(1, count) for total, count in zip(sums, counts, strict=True)
    )
    return words_moment if share is None else share * words_moment + (1 - share) * padding


def shrunk(moment: Tensor) -> Tensor:
    """M + SHRINKAGE typical(M) I: words that no sample has may lie in any direction, so all are
    protected.
    """
    size = typical(moment).to(moment.dtype)
    return moment + SHRINKAGE * size * torch.eye(len(moment), dtype=moment.dtype)


def coordinates(moment: Tensor, ridge: float = 0.002) -> Tensor:
    """P = s (M + ridge typical(M))^(-1/4), (d, d) float32 symmetric. The scale `s` gives P c the
    same mean square as c, the largest direction aside, so learning rates keep their meaning.

    Text features consist almost entirely of what all prompts have in common, and so does each step
    of K and V. In the coordinates P c that common part exceeds what distinguishes prompts by only
    the square root of the factor it had, so the latter is learned sooner. The power -1/2, which
    makes all directions equal, is how K-FAC preconditions a layer (Martens & Grosse 2015,
    section 3); it leaks more into ordinary prompts (benchmarks/LOG.md).

    Of a moment of 0, where nothing is protected: the identity.
    """
    if not moment.any():
        return torch.eye(len(moment))
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0)
    values = values + ridge * _typical(values)
    scale = (values[:-1].sum() / values[:-1].sqrt().sum()).sqrt()
    return (scale * (vectors * values**-0.25) @ vectors.T).float()


def typical(moment: Tensor) -> Tensor:
    """The mean eigenvalue of a moment (d, d) without the largest: a number, float64.

    The largest belongs to what all prompts share, most of all the start token. Some encoders give
    it a feature tens of times as long as any other, which says nothing about the rest. At least a
    millionth of the mean of all, so that a ridge made from it is never 0.
    """
    return _typical(torch.linalg.eigvalsh(moment.double()).clamp(min=0))


def _typical(values: Tensor) -> Tensor:
    """Of eigenvalues (d,), ascending."""
    return torch.maximum(values[:-1].mean(), 1e-6 * values.mean())


def sizes(backbone: Backbone, moment: Tensor) -> dict[str, Tensor]:
    """tr[W0 M W0^T] of each layer, a number: the size of the checkpoint's own K or V for these
    prompts.
    """
    weights = {layer: module.weight.float() for layer, module in backbone.kv_layers.items()}
    return {layer: ((w @ moment) * w).sum() for layer, w in weights.items()}


def drift(
    factors: Mapping[str, Tensor],
    anchor: Adapter | None,
    moment: Tensor,
    sizes: Mapping[str, Tensor],
) -> Tensor:
    """Mean over the layers of E || (delta - delta*) c ||^2 / sizes[layer], a number.

    No anchor: delta* = 0.
    """
    apart = difference(factors, anchor, moment.shape[0])
    right = torch.stack([right for _, right in apart.values()])
    inner = torch.stack([left.T @ left / sizes[layer] for layer, (left, _) in apart.items()])
    return ((right @ moment @ right.mT) * inner).sum() / len(right)


def difference(
    factors: Mapping[str, Tensor], anchor: Adapter | None, width: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """delta - delta* of each layer as one product, (d_out, k) and (k, d_text); `width` is d_text."""
    fixed, products = layers_of(anchor or {}), {}
    for layer, parts in layers_of(factors).items():
        left, right = factored(parts, width)
        if layer in fixed:
            anchor_left, anchor_right = factored(fixed[layer], width)
            left = torch.cat([left, -anchor_left], 1)
            right = torch.cat([right, anchor_right])
        products[layer] = left, right
    return products


@dataclass(frozen=True)
class RetentionPenalty:
    """The penalty in the training loop: the drift from the anchor over all protected prompts
    (`targets.retention_penalty`).
    """

    weight: float
    moment: Tensor  # of all protected prompts, each with its own weight
    anchor: Adapter  # empty if nothing has been learned yet
    sizes: Mapping[str, Tensor]  # tr[W0 M W0^T] of each layer, over ordinary prompts

    def __call__(self, step: Step) -> Tensor:
        return self.weight * drift(step.whole, self.anchor, self.moment, self.sizes)


@dataclass(frozen=True)
class PaddingPenalty:
    """The penalty that keeps two things in one image apart: the adapter does nothing to the padding
    of the concept's own prompts.

    Most of the attention goes to that padding. Its features mix everything a prompt names, the same
    for the whole image, so a look stored there belongs to nothing in particular. They change with
    the word, so they are computed from each step's prompts, without a gradient.
    """

    backbone: Backbone
    weight: float
    sizes: Mapping[str, Tensor]  # as in `RetentionPenalty`

    def __call__(self, step: Step) -> Tensor:
        assert step.features is not None
        features = self.backbone.context(step.features).detach().float()
        padding = self.backbone.padding(step.prompts, step.words)[..., None].to(features)
        # every prompt weighs the same, however long, so that a step's parts add up to the step
        each = padding / padding.sum(1, keepdim=True).clamp(min=1) / len(features)
        moment = torch.einsum("ntd,nte->de", each * features, features)
        return self.weight * drift(step.whole, None, moment, self.sizes)
