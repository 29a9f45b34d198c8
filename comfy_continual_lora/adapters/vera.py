"""`vera`: two vectors that scale fixed random matrices,  delta = diag(b) B0 diag(d) A0.

source      Kopiczko et al. 2024 (VeRA, arXiv 2310.11454);  d (r,), b (d_out,); A0, B0 random, shared
starts      d = 0.1, b = 0
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .kind import AdapterKind


class Vera(AdapterKind):
    name = "vera"

    def create(
        self,
        out: int,
        width: int,
        rank: int,
        generator: torch.Generator,
        preconditioner: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return {"d": torch.full((rank,), 0.1), "b": torch.zeros(out)}

    def factors(self, parts: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
        down, up = projections(len(parts["d"]), len(parts["b"]), width, parts["d"].device)
        return parts["b"][:, None] * up, parts["d"][:, None] * down

    def forward(self, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
        down, up = projections(len(parts["d"]), len(parts["b"]), x.shape[-1], x.device)
        return F.linear(F.linear(x, down) * parts["d"], up) * parts["b"]


@cache
def projections(
    rank: int, out: int, width: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The frozen random A0 (r, d_text) and B0 (d_out, r), the same for all layers of a shape.

    Uniform with variance 1 / fan-in. peft's init for VeRA has twice that (its bound is
    sqrt(6 / fan), here sqrt(3 / fan)). Stacks do not store the matrices, so the bound must stay.
    Not to be changed in place.
    """
    generator = torch.Generator().manual_seed(0)
    down, up = (
        torch.rand(size, generator=generator) * 2 - 1 for size in ((rank, width), (out, rank))
    )
    return (down * (3 / width) ** 0.5).to(device), (up * (3 / rank) ** 0.5).to(device)
