"""Stage 3: an adapter in eight bits a value, as a stack keeps its concepts' targets.

What a row of A does to a prompt is a sum over the row, what a column of B adds is one direction; each
has a scale of its own, so that none is too coarse for another's sake. Of what a concept's own adapter
did to its prompts a ten-thousandth is lost (benchmarks/LOG.md, 2026-11-30), where the target itself
leaves out five times as much.

The layers stand one below the other, in order of their names: L layers with the outputs o_1 .. o_L.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter, layers_of

_MOST = 127  # of int8
_LEAST_SCALE = 1e-30


@dataclass(frozen=True, eq=False)
class Packed:
    """A LoRA, or a full change of K and V: numbers times scales, by part."""

    outputs: Mapping[str, int]  # of each layer, in order of the names
    numbers: dict[str, Tensor]  # int8: A (L r, width), B (sum of o, r), D (sum of o, width)
    scales: dict[str, Tensor]  # float32: A (L r, 1), B (L, r), D (sum of o, 1)

    @property
    def adapter(self) -> Adapter:
        """The same by layer, float32."""
        scales = by_layer(self.scales, self.outputs, even="AB")
        return {
            name: numbers * scales[name]
            for name, numbers in by_layer(self.numbers, self.outputs).items()
        }


def pack(adapter: Mapping[str, Tensor]) -> Packed:
    """The nearest adapter of this form."""
    outputs = outputs_of(adapter)
    numbers: dict[str, list[Tensor]] = {}
    scales: dict[str, list[Tensor]] = {}
    layers = layers_of(adapter)
    for layer in outputs:
        for part, tensor in layers[layer].items():
            axis = 0 if part == "B" else 1
            largest = tensor.abs().amax(axis, keepdim=True).float()
            scale = (largest / _MOST).clamp(min=_LEAST_SCALE)
            scales.setdefault(part, []).append(scale)
            numbers.setdefault(part, []).append((tensor / scale).round().to(torch.int8))
    return Packed(outputs, _joined(numbers), _joined(scales))


def outputs_of(adapter: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of outputs of each layer of a LoRA or a full change, in order of their names."""
    return {
        layer: len(parts["B" if "B" in parts else "D"])
        for layer, parts in sorted(layers_of(adapter).items())
    }


def by_layer(parts: Mapping[str, Tensor], outputs: Mapping[str, int], even: str = "A") -> Adapter:
    """The tensors of each layer that stand one below the other in these.

    Every layer has the same number of rows in the parts named in `even`, and its outputs in others.
    """
    adapter = {}
    for part, tensor in parts.items():
        rows = [len(tensor) // len(outputs)] * len(outputs)
        pieces = tensor.split(rows if part in even else list(outputs.values()))
        adapter |= {f"{layer}.{part}": own for layer, own in zip(outputs, pieces, strict=True)}
    return adapter


def _joined(pieces: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {part: torch.cat(tensors) for part, tensors in pieces.items()}
