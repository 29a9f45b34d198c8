"""Stage 4: elastic weight consolidation (EWC) - each parameter is held at its old value in
proportion to its importance.

    penalty = lambda * sum over anchors of  sum F* (theta - theta*)^2 / sqrt(N)

online     one anchor: theta* is the newest adapter, F* = F_n + gamma F_{n-1} + gamma^2 F_{n-2} ...
           (Schwarz et al. 2018, arXiv 1805.06370)
separate   one anchor per concept: theta*_i is the adapter after concept i, F*_i = F_i
           (Kirkpatrick et al. 2017)

Online, concepts measured in different spaces (`fisher_space`) have one anchor for each space. N is
an anchor's number of parameters. Each F_i has mean 1, because its own size depends on the net; but
then the penalty grows with the net and with the rank. Divided by sqrt(N), and with lambda = 1, its
gradients after 100 steps are 1.1 to 1.7 times those of the denoising loss on the mini-SD with ranks
4 to 64 and on one with four times the parameters (benchmarks/fisher/scale.py), so lambda means
about the same there.

The stack keeps every F_i, so either mode can be used, and undone, at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters.adapter import Adapter, delta, layers_of
from .penalty import Step
from .settings import ResolvedSettings
from .stack import ConceptStack


def ewc_penalty(
    values: Mapping[str, Tensor], anchor: Mapping[str, Tensor], importance: Mapping[str, Tensor]
) -> Tensor:
    """sum F* (theta - theta*)^2, a number; zero at the anchor, with zero gradient."""
    return torch.stack(
        [(f * (values[name] - anchor[name]).square()).sum() for name, f in importance.items()]
    ).sum()


@dataclass(frozen=True)
class Ewc:
    """EWC in the training loop."""

    strength: float  # lambda
    anchors: Sequence[tuple[Adapter, Adapter]]  # (anchor, importance / sqrt(N))

    def __call__(self, step: Step) -> Tensor:
        terms = [
            ewc_penalty(_in_space_of(importance, step.factors), anchor, importance)
            for anchor, importance in self.anchors
        ]
        return self.strength * torch.stack(terms).sum()


def ewc(stack: ConceptStack, settings: ResolvedSettings, device: torch.device) -> Ewc | None:
    """EWC with the stack's Fishers; None if there is none yet."""
    fishers = [
        (record.id, stack.fishers[record.id])
        for record in stack.records
        if record.id in stack.fishers
    ]
    if not fishers or stack.adapter is None:
        return None
    if settings.ewc_mode == "separate":
        anchors = [(stack.adapter_after(concept) or stack.adapter, f) for concept, f in fishers]
    else:
        merged = _merged([f for _, f in fishers], settings.ewc_decay)
        anchors = [(stack.adapter, f) for f in merged]

    def on_device(adapter: Mapping[str, Tensor], scale: float = 1.0) -> Adapter:
        return {name: scale * t.to(device, torch.float32) for name, t in adapter.items()}

    return Ewc(
        settings.ewc_strength,
        [
            (on_device(_in_space_of(f, anchor)), on_device(f, _count(f) ** -0.5))
            for anchor, f in anchors
        ],
    )


def _merged(fishers: Sequence[Adapter], decay: float) -> list[Adapter]:
    """The running Fisher of the factors, that of delta, or both: each has what was measured in it,
    decayed once for every later concept.
    """
    merged: dict[bool, Adapter] = {}
    for fisher in fishers:
        merged = {
            space: {name: decay * t for name, t in one.items()} for space, one in merged.items()
        }
        space = _is_of_delta(fisher)
        earlier = merged.get(space)
        merged[space] = {name: t + earlier[name] if earlier else t for name, t in fisher.items()}
    return list(merged.values())


def _count(importance: Mapping[str, Tensor]) -> int:
    """N, the number of parameters."""
    return sum(t.numel() for t in importance.values())


def _is_of_delta(importance: Mapping[str, Tensor]) -> bool:
    return next(iter(importance)).endswith(".W")


def _in_space_of(
    importance: Mapping[str, Tensor], factors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The factors themselves, or delta of every layer as "<layer>.W" if the Fisher is of delta."""
    if not _is_of_delta(importance):
        return factors
    return {
        f"{layer}.W": delta(parts, importance[f"{layer}.W"].shape)
        for layer, parts in layers_of(factors).items()
    }
