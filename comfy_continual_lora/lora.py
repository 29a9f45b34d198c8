"""Stage 3: the adapter, a LoRA on K and V of every cross-attention:  W = W0 + s B A,  A (r, d_text), B (d_out, r), s = 1.

An `Adapter` is plain tensors under "<layer>.A" and "<layer>.B"; peft carries it while it is attached. Attach and detach are exact inverses.
Source: Smith et al. 2023 (C-LoRA, arXiv 2304.06027), section 3; Jha et al. 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .checkpoint.backbone import KV_MODULES, Backbone

Adapter = dict[str, Tensor]


def new_adapter(backbone: Backbone, rank: int, generator: torch.Generator) -> Adapter:
    """A fresh adapter that changes nothing: A ~ N(0, 1/r), B = 0."""
    adapter = {}
    for name, layer in backbone.kv_layers.items():
        out, width = layer.weight.shape
        adapter[f"{name}.A"] = torch.randn(rank, width, generator=generator) * rank**-0.5
        adapter[f"{name}.B"] = torch.zeros(out, rank)
    return adapter


def rank_of(adapter: Adapter) -> int:
    return next(tensor.shape[0] for name, tensor in adapter.items() if name.endswith(".A"))


def delta_weights(adapter: Adapter) -> dict[str, Tensor]:
    """B A of every layer, (d_out, d_text)."""
    return {name.removesuffix(".A"): adapter[name.removesuffix("A") + "B"] @ adapter[name] for name in adapter if name.endswith(".A")}


def _layers(unet: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def attach(backbone: Backbone, adapter: Adapter, name: str = "current", *, trainable: bool = False) -> dict[str, nn.Parameter]:
    """Put copies of the factors into the U-Net under `name` and return them as parameters (float32, on the backbone's device)."""
    rank = rank_of(adapter)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=KV_MODULES, init_lora_weights=False)
    inject_adapter_in_model(config, backbone.unet, adapter_name=name)
    parameters = {}
    for layer, module in _layers(backbone.unet).items():
        for letter, part in (("A", module.lora_A), ("B", module.lora_B)):
            value = adapter[f"{layer}.{letter}"].to(backbone.device, torch.float32, copy=True)
            part[name].weight = nn.Parameter(value, requires_grad=trainable)
            parameters[f"{layer}.{letter}"] = part[name].weight
    return parameters


def detach(backbone: Backbone) -> None:
    """Take every adapter out; the U-Net is again exactly what it was."""
    for name, module in _layers(backbone.unet).items():
        parent, _, leaf = name.rpartition(".")
        setattr(backbone.unet.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(backbone.unet, "peft_config"):
        del backbone.unet.peft_config


@contextmanager
def attached(backbone: Backbone, adapter: Adapter | None, *, trainable: bool = False) -> Iterator[dict[str, nn.Parameter]]:
    """The adapter is in the U-Net inside the block and out of it afterwards, whatever happens. None attaches nothing."""
    try:
        yield attach(backbone, adapter, trainable=trainable) if adapter else {}
    finally:
        detach(backbone)
