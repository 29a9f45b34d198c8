"""`lora`: a product of two small matrices,  delta = B A,  A (r, d_text), B (d_out, r).

source      Smith et al. 2023 (C-LoRA, arXiv 2304.06027), section 3; Hu et al. 2021 (arXiv 2106.09685)
starts      A ~ N(0, 1/r), B = 0
carried by  peft; LoRAs of several names add up
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .kind import AdapterKind

if TYPE_CHECKING:
    from ..checkpoint.backbone import Backbone


class Lora(AdapterKind):
    name = "lora"
    solvable = True
    preconditioned = "A"

    def create(
        self,
        out: int,
        width: int,
        rank: int,
        generator: torch.Generator,
        preconditioner: Tensor | None = None,
    ) -> dict[str, Tensor]:
        rows = torch.randn(rank, width, generator=generator) * rank**-0.5
        a = rows if preconditioner is None else rows @ preconditioner
        return {"A": a, "B": torch.zeros(out, rank)}

    def factors(self, parts: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
        return parts["B"], parts["A"]

    def attach(
        self, backbone: Backbone, layers: Mapping[str, Mapping[str, nn.Parameter]], name: str
    ) -> None:
        # not light
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear as LoraLinear

        from ..checkpoint.backbone import KV_MODULES

        rank = len(next(iter(layers.values()))["A"])
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=KV_MODULES, init_lora_weights=False
        )
        with warnings.catch_warnings():
            # a second LoRA is intended
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, backbone.unet, adapter_name=name)
        for layer, module in backbone.unet.named_modules():
            if isinstance(module, LoraLinear):
                module.set_adapter(list(module.lora_A))  # all of them act
                module.requires_grad_(False)
                module.lora_A[name].weight = layers[layer]["A"]
                module.lora_B[name].weight = layers[layer]["B"]


def padded_to_rank(adapter: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The same LoRA padded to A (r, d_text) and B (d_out, r): new rows of A are random, so that they
    can be trained, new columns of B are zero.
    """
    generator, padded = torch.Generator().manual_seed(0), {}
    for name, tensor in adapter.items():
        rows = name.endswith(".A")
        missing = rank - tensor.shape[0 if rows else 1]
        if missing <= 0:
            padded[name] = tensor
        elif rows:
            extra = torch.randn(missing, tensor.shape[1], generator=generator) * rank**-0.5
            padded[name] = torch.cat([tensor, extra])
        else:
            padded[name] = torch.cat([tensor, torch.zeros(len(tensor), missing)], 1)
    return padded


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA whose change is the sum of both: A (r1 + r2, d_text), B (d_out, r1 + r2)."""
    return {
        name: torch.cat([first[name], second[name]], 0 if name.endswith(".A") else 1)
        for name in second
    }
