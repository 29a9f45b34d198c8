"""`orthogonal_adaptation`: every LoRA reads its own directions of text space, orthogonal to those of
the others, so that their sum disturbs none of them much.

source      Po et al. 2024 (Orthogonal Adaptation, arXiv 2312.02432), section 4
equation    delta_i = B_i A_i with A_i frozen, A_i A_j^T = 0 for i != j; only B_i is learned
            delta = sum_i B_i A_i
remembers   each concept's LoRA and word
cost        less than a plain LoRA: half of the factors
deviations  what the paper calls B^T and A are A and B here. Its concepts do not know of each other and
            take random columns of one orthogonal matrix, so that two may share some. Here a new A
            is random in the space that earlier ones leave free, in the rival's favour. Once that has
            no room left (after d_text / rank concepts), it is random in the whole space, which the
            paper does too, and only nearly orthogonal. Rows of A have the length that a plain LoRA's
            have on average, not 1, so that learning rates keep their meaning. The paper starts from
            Mix-of-Show's words and also adapts the text encoder and the rest of the U-Net
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comfy_continual_lora.adapters.adapter import Adapter, new_adapter
from comfy_continual_lora.checkpoint.backbone import Backbone

from .rival import Rival


class OrthogonalAdaptation(Rival):
    id = "orthogonal_adaptation"
    own_learning = True
    freezes_a = True

    def start(
        self, backbone: Backbone, past: Sequence[Adapter], rank: int, generator: torch.Generator
    ) -> Adapter:
        adapter = new_adapter(backbone, rank, generator)
        for name, tensor in adapter.items():
            if name.endswith(".A"):
                taken = torch.cat([tensor[:0], *(earlier[name] for earlier in past)])
                adapter[name] = free_rows(taken, tensor, generator)
        return adapter


def free_rows(taken: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random orthogonal rows, as many and as long as those of `like` (r, d_text) are on average, and
    orthogonal to the `taken` ones (n, d_text) if there is room.
    """
    rank, width = like.shape
    options: dict[str, Any] = {"dtype": torch.float64}
    rows = torch.randn(rank, width, generator=generator, **options)
    if len(taken) + rank <= width:
        basis, _ = torch.linalg.qr(taken.double().T)
        rows = rows - (rows @ basis) @ basis.T
    orthonormal, _ = torch.linalg.qr(rows.T)
    return (orthonormal.T * (width / rank) ** 0.5).float()
