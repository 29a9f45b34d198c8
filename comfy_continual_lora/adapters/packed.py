"""Stage 3: an adapter in eight bits a value, as a stack keeps its concepts' targets.

What a row of A does to a prompt is a sum over the row, what a column of B adds is one direction; each
has a scale of its own, so that none is too coarse for another's sake. Of what a concept's own adapter
did to its prompts a ten-thousandth is lost (benchmarks/LOG.md, 2026-11-30), where the target itself
leaves out five times as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 127  # of int8
_LEAST_SCALE = 1e-30


@dataclass(frozen=True, eq=False)
class Packed:
    """A LoRA, or a full change of K and V: numbers times scales, by "<layer>.<part>"."""

    numbers: dict[str, Tensor]  # int8, shaped as the adapter's tensors
    scales: dict[str, Tensor]  # float32: A and D (rows, 1), B (1, rank)

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The same in float32."""
        return {name: one * self.scales[name] for name, one in self.numbers.items()}


def pack(adapter: Mapping[str, Tensor]) -> Packed:
    """The nearest adapter of this form."""
    numbers, scales = {}, {}
    for name, tensor in adapter.items():
        largest = tensor.abs().amax(_axis(name), keepdim=True).float()
        scales[name] = (largest / _MOST).clamp(min=_LEAST_SCALE)
        numbers[name] = (tensor / scales[name]).round().to(torch.int8)
    return Packed(numbers, scales)


def _axis(name: str) -> int:
    """Along which values share a scale."""
    return 0 if name.endswith(".B") else -1
