"""The interface of a rival: a method that, like `retention`, keeps a LoRA and a word for each concept
and no pictures, and makes one adapter for all of them.

    merging       the LoRAs were each learned alone; `merge` makes one adapter of them
    own learning  `start`, `penalties`, `freezes_a` say how a LoRA is learned; `merge` adds them up
    sequential    own learning, on top of the summed earlier LoRAs
    by concept    the adapter is another one for each concept that is drawn

Notation, for one layer: W0 (d_out, d_text) is the checkpoint's K or V, delta_i = B_i A_i the change
that concept i's LoRA makes, A_i (r, d_text), B_i (d_out, r), c (d_text,) the text features of a prompt
at one position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from comfy_continual_lora.adapters.adapter import Adapter, layers_of, new_adapter
from comfy_continual_lora.adapters.lora import joined, padded_to_rank
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.penalty import Penalty


@dataclass(frozen=True)
class Own:
    """All that is kept of a learned concept."""

    token: str
    name: str  # how prompts name it: "V1 mug"
    noun: str
    word: Tensor  # (k, d_text)
    adapter: Adapter  # its own LoRA, without those of earlier concepts
    prompts: Sequence[str]  # training captions


@dataclass(frozen=True)
class Pool:
    """What one adapter is made of."""

    backbone: Backbone
    concepts: Sequence[Own]
    options: Mapping[str, float]  # all that the rival has
    cache: Path | None = None  # a folder of moments
    drawn: Own | None = None  # the concept that the adapter is to draw, of a rival by concept

    @property
    def adapters(self) -> list[Adapter]:
        return [concept.adapter for concept in self.concepts]


class Rival:
    """The defaults are plain LoRAs, each learned alone, whose changes are added up."""

    id: ClassVar[str] = "alone"
    # its LoRAs are not plain ones learned alone, so other rivals can't share them
    own_learning: ClassVar[bool] = False
    # learns on top of the summed earlier LoRAs
    sequential: ClassVar[bool] = False
    # merges separately for each concept that is drawn
    by_concept: ClassVar[bool] = False
    # trains B alone
    freezes_a: ClassVar[bool] = False
    # by name, with their defaults
    options: ClassVar[Mapping[str, float]] = MappingProxyType({})

    def chosen(self, options: Mapping[str, float]) -> dict[str, float]:
        """The options with defaults for those that are not given.

        Errors: ValueError for one that this rival does not have.
        """
        if unknown := options.keys() - self.options.keys():
            known = ", ".join(self.options) or "none"
            raise ValueError(f"{self.id} has no option {', '.join(unknown)}; it has: {known}")
        return {**self.options, **options}

    def merged(
        self,
        backbone: Backbone,
        concepts: Sequence[Own],
        options: Mapping[str, float],
        cache: Path | None = None,
        drawn: Own | None = None,
    ) -> Adapter:
        """One adapter for all concepts; `cache` is a folder of moments."""
        return self.merge(Pool(backbone, concepts, self.chosen(options), cache, drawn))

    def merge(self, pool: Pool) -> Adapter:
        return summed(pool.adapters)

    def start(
        self, backbone: Backbone, past: Sequence[Adapter], rank: int, generator: torch.Generator
    ) -> Adapter:
        """The LoRA that a new concept starts from; `past`: those of earlier concepts, in order."""
        return new_adapter(backbone, rank, generator)

    def penalties(
        self, past: Sequence[Adapter], options: Mapping[str, float], device: torch.device
    ) -> dict[str, Penalty]:
        """What is added to the loss of a new concept."""
        return {}


def summed(adapters: Sequence[Adapter]) -> Adapter:
    """The LoRA whose change is the sum of all; its rank is the sum of theirs."""
    total = adapters[0]
    for adapter in adapters[1:]:
        total = joined(total, adapter)
    return total


def of_one_rank(adapter: Adapter) -> Adapter:
    """The same LoRA with the largest rank of its layers in all of them."""
    return padded_to_rank(adapter, max(len(parts["A"]) for parts in layers_of(adapter).values()))
