"""Merging LoRAs by `LoraModel.add_weighted_adapter` of peft, on the backbone's own U-Net.

With a single LoRA peft's every combination is that LoRA times the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from comfy_continual_lora.adapters.adapter import (
    Adapter,
    adapted_layers,
    detach,
    rank_of,
)
from comfy_continual_lora.checkpoint.backbone import KV_MODULES, Backbone

from .rival import Pool, Rival, of_one_rank

Combination = Literal["cat", "ties_svd", "dare_linear_svd", "magnitude_prune_svd"]
MERGED = "merged"


class PeftMerge(Rival):
    """A merge that is peft's; its rivals differ in the combination and their options."""

    combination: ClassVar[Combination]

    def merge(self, pool: Pool) -> Adapter:
        return peft_merged(pool.backbone, pool.adapters, self.combination, pool.options)


def peft_merged(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    combination: Combination,
    options: Mapping[str, float],
) -> Adapter:
    """One LoRA of all; afterwards the U-Net is exactly what it was before.

    Options: `weight` of each LoRA, `density` (the share of a change's entries that is kept), `rank`
    (0: the sum of theirs), `seed` of what is dropped at random.
    """
    names = [f"concept_{number}" for number in range(len(adapters))]
    by_name = dict(zip(names, adapters, strict=True))
    with _seeded(backbone, options), _loaded(backbone, by_name) as model:
        model.add_weighted_adapter(
            names,
            [options["weight"]] * len(names),
            MERGED,
            combination_type=combination,
            svd_rank=int(options.get("rank", 0)) or sum(map(rank_of, adapters)),
            svd_full_matrices=False,  # of a narrow layer only as many vectors as it has outputs
            density=options.get("density"),
        )
        found = {}
        for layer, module in _lora_layers(backbone).items():
            for part, factor in (("A", module.lora_A), ("B", module.lora_B)):
                found[f"{layer}.{part}"] = _weight(factor, MERGED).float().cpu().clone()
    return of_one_rank(found)


@contextmanager
def _loaded(backbone: Backbone, adapters: Mapping[str, Adapter]) -> Iterator[LoraModel]:
    """Inside the block the U-Net carries these LoRAs, by name."""
    assert backbone.kv_layers  # looked up before peft wraps them
    try:
        model = None
        for name, adapter in adapters.items():
            rank = rank_of(adapter)
            config = LoraConfig(
                r=rank, lora_alpha=rank, target_modules=KV_MODULES, init_lora_weights=False
            )
            if model is None:
                model = LoraModel(backbone.unet, {name: config}, name)
            else:
                model.peft_config[name] = config
                model.inject_adapter(backbone.unet, name)
            for layer, module in _lora_layers(backbone).items():
                _weight(module.lora_A, name).copy_(adapter[f"{layer}.A"])
                _weight(module.lora_B, name).copy_(adapter[f"{layer}.B"])
        assert model is not None
        yield model
    finally:
        detach(backbone)


def _lora_layers(backbone: Backbone) -> dict[str, LoraLinear]:
    layers = adapted_layers(backbone)
    return {name: module for name, module in layers.items() if isinstance(module, LoraLinear)}


def _weight(factors: nn.ModuleDict, name: str) -> Tensor:
    return factors[name].get_parameter("weight").data


@contextmanager
def _seeded(backbone: Backbone, options: Mapping[str, float]) -> Iterator[None]:
    """peft draws from the global generator: inside the block it is seeded, afterwards as before."""
    devices = [backbone.device] if backbone.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(options.get("seed", 0)))
        yield
