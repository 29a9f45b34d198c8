"""`full`: the whole matrix,  delta = D,  D (d_out, d_text).

source      Custom Diffusion, Kumari et al. 2023 (arXiv 2212.04488)
starts      D = 0
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .kind import AdapterKind


class Full(AdapterKind):
    name = "full"
    solvable = True

    def create(
        self,
        out: int,
        width: int,
        rank: int,
        generator: torch.Generator,
        preconditioner: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return {"D": torch.zeros(out, width)}

    def factors(self, parts: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
        return parts["D"], torch.eye(width, device=parts["D"].device)

    def delta(self, parts: Mapping[str, Tensor], width: int) -> Tensor:
        return parts["D"]

    def forward(self, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, parts["D"])
