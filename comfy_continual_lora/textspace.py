"""Stage 4: text space - K and V see nothing but text features, so what an adapter does to a prompt
is known without a picture.

    K = (W0 + delta) c            c (d,): the text features of a prompt, one for each of its 77
    positions
    drift = E_c || (delta - delta*) c ||^2 / E_c || W0 c ||^2  =  tr[ (delta - delta*) M (delta -
    delta*)^T ] / tr[ W0 M W0^T ],    M = E_c c c^T

Words and templates of earlier concepts are stored, hence so is M: one (d, d) matrix stands for
every prompt about them, and the drift is exact, not
sampled. Penalising it holds ordinary prompts, the empty one too (delta* = 0: the checkpoint), and
each earlier concept (delta* = its own adapter)
where no closed form follows; if wanted it keeps the look of the concept being learned off the
padding of its own prompts, where it would mix with
that of another. M also gives the coordinates in which a concept is learned that is held so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters.adapter import Adapter, factored, layers_of
from .checkpoint.backbone import Backbone
from .penalty import Step
from .presets import TEMPLATES
from .stack import ConceptRecord

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
    """Prompts that name no concept: the empty one, things in places and looks, and the concepts'
    class noun without their words.
    """
    things = list(dict.fromkeys([*nouns, *THINGS]))
    prompts = ["", *(f"a photo of a {thing}" for thing in things)]
    for number, place in enumerate(PLACES):
        prompts += [
            prompt
            for noun in nouns
            for prompt in (
                f"a photo of a {noun} {place}",
                f"a photo of a {_look(number)} {noun} {place}",
            )
        ]
    for number, thing in enumerate(things):  # every thing with some places, looks and another thing
        for turn in range(3):
            own, others = _look(number + 31 * turn), _look(3 * number + 17 * turn + 5)
            other, place = things[number - 1 - turn], PLACES[(number + 5 * turn) % len(PLACES)]
            prompts += [
                f"a photo of a {own} {thing} {place}",
                f"a {thing} {place}",
                f"a photo of a {own} {thing} and a {others} {other}",
            ]
    prompts += [
        prompt
        for number, thing in enumerate(things)
        for prompt in _long(f"a photo of a {thing} {PLACES[number % len(PLACES)]}", number)
    ]
    return list(dict.fromkeys(prompts))


def single_prompts(record: ConceptRecord) -> list[str]:
    """Prompts about one concept: in every template and place, with the captions it was learned
    with, and some as long as users write them.
    """
    short = [
        *record.prompts,
        *(template.format(record.name) for template in TEMPLATES),
        *(f"a photo of a {record.name} {place}" for place in PLACES),
    ]
    long = [
        prompt
        for number in range(4)
        for prompt in _long(f"a photo of a {record.name} {PLACES[5 * number]}", 3 * number)
    ]
    return list(dict.fromkeys([*short, *long]))


def _look(number: int) -> str:
    """One color or two, on every other thing with a surface."""
    color, other, surface = (
        kind[number * step % len(kind)] for kind, step in ((COLORS, 1), (COLORS, 5), (SURFACES, 1))
    )
    return (color, f"{color} {surface}", f"{color} and {other} {surface}")[number % 3]


def _long(prompt: str, number: int) -> tuple[str, str]:
    """The prompt with details behind it, and with some of them in front: what comes first changes
    the features of all that follows.
    """
    details = [DETAILS[(number + 5 * turn) % len(DETAILS)] for turn in range(3 + number % 10)]
    return ", ".join([prompt, *details]), ", ".join([*details[:2], prompt, *details[2:]])


@torch.no_grad()
def moment(
    backbone: Backbone,
    words: Mapping[str, Tensor],
    prompts: Sequence[str],
    share: float | None = None,
) -> Tensor:
    """M, the mean of c c^T over prompts and positions, (d, d) float32.

    `share`: what the positions up to a prompt's end count together; the padding behind it is the
    rest. None: every position counts alike, which
    leaves a prompt's words a seventh or less.
    """
    sums, counts = (
        torch.zeros(2, backbone.word_width, backbone.word_width, device=backbone.device),
        [0, 0],
    )
    for start in range(0, len(prompts), 16):
        chosen = prompts[start : start + 16]
        features = backbone.context(backbone.encode_prompts(chosen, words)).float()
        behind = (
            backbone.padding(chosen, words)
            if share is not None
            else torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        )
        for kind, rows in enumerate((features[~behind], features[behind])):
            sums[kind] += rows.T @ rows
            counts[kind] += len(rows)
    words_moment, padding = (
        total / max(1, count) for total, count in zip(sums, counts, strict=True)
    )
    return words_moment if share is None else share * words_moment + (1 - share) * padding


def coordinates(moment: Tensor, ridge: float = 0.001) -> Tensor:
    """P = s (M + ridge tr M / d)^(-1/4), (d, d) float32 symmetric; `s` leaves the mean square of P
    c what it is of c, so rates keep their meaning.

    Nearly all of the text features c is what all prompts have in common, and so is nearly all of a
    step of K and V. In the coordinates P c that is
    larger than what tells prompts apart by the root of what it was, so the latter is learned
    sooner. Power -1/2, where all directions are alike, is
    how K-FAC preconditions a layer (Martens & Grosse 2015, section 3); it leaks more into ordinary
    prompts (benchmarks/LOG.md).
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0)
    powers = (values + ridge * values.mean()) ** -0.25
    scale = (values.sum() / (values * powers.square()).sum()).sqrt()
    return (scale * (vectors * powers) @ vectors.T).float()


def sizes(backbone: Backbone, moment: Tensor) -> dict[str, Tensor]:
    """tr[W0 M W0^T] of each layer, a number: how large what the checkpoint does to these prompts
    is.
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
    rights, inner = [], []
    fixed = layers_of(anchor or {})
    for layer, parts in layers_of(factors).items():
        left, right = factored(parts, moment.shape[0])
        if layer in fixed:  # the difference of two products is one product of twice the rank
            other, same = factored(fixed[layer], moment.shape[0])
            left, right = torch.cat([left, -other], 1), torch.cat([right, same])
        rights.append(right)
        inner.append(left.T @ left / sizes[layer])
    right = torch.stack(rights)
    return ((right @ moment @ right.mT) * torch.stack(inner)).sum() / len(rights)


@dataclass(frozen=True)
class RetentionPenalty:
    """The penalty in the training loop: how far the factors are, over all protected prompts, from
    what was there (`targets.retention_penalty`).
    """

    weight: float
    moment: Tensor  # of all protected prompts, each with its own weight
    anchor: Adapter  # empty where nothing was learned yet
    sizes: Mapping[str, Tensor]  # tr[W0 M W0^T] of each layer, over ordinary prompts

    def __call__(self, step: Step) -> Tensor:
        return self.weight * drift(step.factors, self.anchor, self.moment, self.sizes)


@dataclass(frozen=True)
class PaddingPenalty:
    """The penalty that keeps two things in one picture apart: behind the end of the concept's own
    prompts the adapter does nothing.

    Most of the attention goes to that padding. Its features are one mixture of all that a prompt
    names, alike everywhere in the picture, so a look
    that is put there belongs to nothing in particular. They change with the word, hence those of
    each step's prompts are taken, without a gradient.
    """

    backbone: Backbone
    weight: float
    sizes: Mapping[str, Tensor]  # as in `RetentionPenalty`

    def __call__(self, step: Step) -> Tensor:
        assert step.features is not None
        features = self.backbone.context(step.features).detach().float()
        rows = features[self.backbone.padding(step.prompts, step.words)]
        moment = rows.T @ rows / max(1, len(rows))
        return self.weight * drift(step.factors, None, moment, self.sizes)
