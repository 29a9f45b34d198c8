"""`o_lora`: a new LoRA for each concept, held orthogonal to the earlier ones, which are frozen.

source      Wang et al. 2023 (O-LoRA, arXiv 2310.14152), section 3
equation    the loss of `lora`, with W0 + sum_{i<n} B_i A_i + B_n A_n
            + weight * sum_{i<n} sum_jk | (A_i A_n^T)_jk |^power,   over all layers
            delta = sum_i B_i A_i
remembers   each concept's LoRA and word
cost        `lora` + one product of (r, d_text) and (d_text, n r) per layer and step
deviations  the paper writes the squares of the entries (power 2), its authors' code takes their
            absolute values (power 1, the default here). `weight` is the paper's lambda_1, 0.5, of a
            language model whose A starts smaller: here the penalty starts 3 d_text / rank times
            larger (48 on the mini-SD), so the weight is to be tuned. Their L2 penalty (lambda_2) is
            left out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from comfy_continual_lora.adapters.adapter import Adapter
from comfy_continual_lora.penalty import Penalty, Step

from .rival import Rival


@dataclass(frozen=True)
class Overlap:
    """The penalty in the training loop; `past`: the rows of all earlier A's, by tensor name."""

    weight: float
    power: float
    past: Mapping[str, Tensor]

    def __call__(self, step: Step) -> Tensor:
        overlaps = [
            (rows @ step.factors[name].T).abs().pow(self.power).sum()
            for name, rows in self.past.items()
        ]
        return self.weight * torch.stack(overlaps).sum()


class OLora(Rival):
    id = "o_lora"
    own_learning = True
    sequential = True
    options = MappingProxyType({"weight": 0.5, "power": 1.0})

    def penalties(
        self, past: Sequence[Adapter], options: Mapping[str, float], device: torch.device
    ) -> dict[str, Penalty]:
        chosen = self.chosen(options)
        if not past:
            return {}
        rows = {
            name: torch.cat([earlier[name] for earlier in past]).to(device)
            for name in past[0]
            if name.endswith(".A")
        }
        return {self.id: Overlap(chosen["weight"], chosen["power"], rows)}
