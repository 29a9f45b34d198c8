"""Stage 8: several learned things in one prompt, each drawn in the area where its noun is.

Named in one prompt, learned things mix their looks, because text features mix: every position after
a word holds something of it, and most of the attention goes to the padding, which holds all. So the
picture is laid out by the prompt with class nouns in place of the learned words. The attention of
cross-attention layers to each noun says where its thing is, from the first step on. In every
cross-attention layer the output is then mixed, place by place:

    out = (1 - sum_k m_k) attend(neutral)  +  sum_k m_k attend(own_k)      m_k (h, w) in 0..1

attend(own_k): with K and V of the prompt in which concept k alone has its word (`mentions`). Self-
attention and everything else stay as they are, so that it remains one scene.

in: for each picture and concept, which text positions are its noun, and what the layers attend to -
out: the masks. No model family and no host: `sample` and the hosts' own attention call it.

Relatives: FreeFuse (arXiv 2510.23515) takes masks from cross-attention to route several LoRAs; TARA
(2508.08812) binds a LoRA to its token; Concept Conductor (2408.03632) mixes several models' outputs
by masks of a layout; regional prompting and attention couple mix cross-attention by areas that the
user gives, as Mix-of-Show (2305.18292) does in sampling. Here nothing is trained, no area is given,
and the models of all concepts are one: only K's and V's inputs differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# For each place of the layers whose attention says best where a thing is, latent pixels a side.
# SD1.x: 16 x 16 of 64 x 64 (Hertz et al. 2022, arXiv 2208.01626; Chefer et al. 2023, 2301.13826);
# SDXL: 32 x 32 of 128 x 128, where most of its cross-attention is. The mini-SD's: measured. Anima's
# layers are all of one size.
FINE = {"mini": 1, "sd1": 4, "sd2": 4, "sdxl": 4, "anima": 2}


@dataclass(frozen=True)
class AreaSettings:
    """`fine`: as in `FINE`; `sharpness`: how decidedly a place belongs to the thing it attends to
    most; `presence`: the share of its greatest attention from which a thing counts as being there.
    """

    fine: int = 1
    sharpness: float = 16.0
    presence: float = 0.3


class Areas:
    """The masks of n pictures with k concepts each, while they are drawn.

    nouns (n, k, t): 1 where a text position of the neutral prompt is a noun of the concept, else 0.
    size: height and width of the latents. `given` (n or 1, k, h, w) in 0..1 are masks to use in
    place of those found, of any size.
    """

    def __init__(
        self,
        nouns: Tensor,
        size: tuple[int, int],
        settings: AreaSettings,
        given: Tensor | None = None,
    ) -> None:
        self.nouns, self.size, self.settings = nouns, size, settings
        self.fine = _halved(size, settings.fine)
        self.masks = None if given is None else _at_most_one(given)
        self.given = given is not None
        self.seen: list[Tensor] = []  # attention to each noun in this step's layers, (n, k, h, w)
        self.total: Tensor | float = 0.0  # the same over all steps
        self.resized: dict[int, Tensor] = {}

    def wanted(self, count: int) -> bool:
        """Whether `see` takes the attention of a layer with this many places."""
        return not self.given and count == math.prod(self.fine)

    def see(self, attention: Tensor) -> None:
        """What a layer attends to in the neutral prompt: (n, places, t), the mean over its heads."""
        nouns = self.nouns.to(attention)
        to_nouns = torch.einsum("npt,nkt->nkp", attention, nouns)
        self.seen.append(to_nouns.unflatten(2, self.fine).float())

    def look(self, query: Tensor, key: Tensor, heads: int) -> None:
        """`see` for a layer's query (n, places, d) and its key of the neutral prompt (n, t, d), if it
        is one of those that say where things are.
        """
        if self.wanted(query.shape[1]):
            query, key = _heads(query, heads), _heads(key, heads)
            scores = query @ key.mT * query.shape[3] ** -0.5
            self.see(scores.float().softmax(-1).mean(1))

    def settle(self) -> None:
        """Make masks of what was seen up to the end of this step."""
        if not self.seen:
            return
        now = torch.stack(self.seen).mean(0)
        self.seen = []
        self.total = self.total + F.avg_pool2d(now, 3, 1, 1, count_include_pad=False)
        height = self.total / self.total.amax((2, 3), keepdim=True).clamp(min=1e-12)
        # is one of the things here at all, and which
        there = torch.sigmoid(20 * (height.amax(1, keepdim=True) - self.settings.presence))
        which = torch.softmax(self.settings.sharpness * height, 1)
        self.masks = _at_most_one(F.max_pool2d(which * there, 3, 1, 1))
        self.resized = {}

    def fits(self, count: int) -> bool:
        """Whether the net has layers with this many places; an extension may merge some."""
        return math.prod(_size_of_layer(self.size, count)) == count

    def at(self, count: int) -> Tensor:
        """The masks of a layer with this many places, (n, k, count)."""
        assert self.masks is not None
        if count not in self.resized:
            size = _size_of_layer(self.size, count)
            self.resized[count] = F.interpolate(self.masks, size, mode="area").flatten(2)
        return self.resized[count]

    def mix(self, base: Tensor, own: list[Tensor]) -> Tensor:
        """base (n, places, d): the layer's output for the neutral prompt; own: for each concept's."""
        masks = self.at(base.shape[1]).to(base)
        mixed = base * (1 - masks.sum(1))[..., None]
        for k, output in enumerate(own):
            mixed = mixed + output * masks[:, k, :, None]
        return mixed


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention with several heads: (n, places, d), (n, t, d) twice -> (n, places, d)."""
    q, k, v = (_heads(tensor, heads) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """(n, places, d) -> (n, heads, places, d / heads)"""
    return tensor.unflatten(2, (heads, -1)).transpose(1, 2)


def _at_most_one(masks: Tensor) -> Tensor:
    """Masks (n, k, h, w) whose sum over k is at most 1 at every place."""
    return masks / masks.sum(1, keepdim=True).clamp(min=1)


def _halved(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-size[0] // factor), -(-size[1] // factor)


def _size_of_layer(size: tuple[int, int], count: int) -> tuple[int, int]:
    """Height and width of a layer with this many places: a net halves the latents, rounding up."""
    factor = 1
    while math.prod(_halved(size, factor)) > count and factor < max(size):
        factor *= 2
    return _halved(size, factor)


def mask_of(positions: Sequence[Sequence[int]], count: int) -> Tensor:
    """(k, count): 1 at the positions, else 0."""
    mask = torch.zeros(len(positions), count)
    for row, chosen in zip(mask, positions, strict=True):
        row[list(chosen)] = 1
    return mask
