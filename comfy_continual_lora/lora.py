"""Stage 3: the adapter, a change of K and V of every cross-attention,  W = W0 + delta.

    lora   delta = B A                      A (r, d_text)  B (d_out, r)       Smith et al. 2023
    (C-LoRA, arXiv 2304.06027), section 3; s = 1
    vera   delta = diag(b) B0 diag(d) A0    d (r,)  b (d_out,)                Kopiczko et al. 2024
    (VeRA, arXiv 2310.11454); A0, B0 random, shared
    full   delta = D                        D (d_out, d_text)                 Custom Diffusion,
    Kumari et al. 2023 (arXiv 2212.04488)

An `Adapter` is plain tensors under "<layer>.<letter>"; peft carries a LoRA while it is attached.
Attach and detach are exact inverses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from .checkpoint.backbone import KV_MODULES, Backbone

Adapter = dict[str, Tensor]
KINDS = {"lora": "AB", "vera": "db", "full": "D"}


def new_adapter(
    backbone: Backbone,
    rank: int,
    generator: torch.Generator,
    kind: str = "lora",
    space: Tensor | None = None,
) -> Adapter:
    """A fresh adapter that changes nothing: LoRA A ~ N(0, 1/r), B = 0; VeRA d = 0.1, b = 0; full D
    = 0.

    `space`, (d_text, d_text), are the coordinates A is drawn in (`textspace.coordinates`).
    """
    adapter = {}
    for name, layer in backbone.kv_layers.items():
        out, width = layer.weight.shape
        if kind == "lora":
            rows = torch.randn(rank, width, generator=generator) * rank**-0.5
            adapter[f"{name}.A"] = rows if space is None else rows @ space
            adapter[f"{name}.B"] = torch.zeros(out, rank)
        elif kind == "vera":
            adapter[f"{name}.d"] = torch.full((rank,), 0.1)
            adapter[f"{name}.b"] = torch.zeros(out)
        else:
            adapter[f"{name}.D"] = torch.zeros(out, width)
    return adapter


def kind_of(adapter: Adapter) -> str:
    letter = next(iter(adapter))[-1]
    return next(kind for kind, letters in KINDS.items() if letter in letters)


def rank_of(adapter: Adapter) -> int:
    return next(tensor.shape[0] for name, tensor in adapter.items() if name[-1] in "Ad")


def layers_of(adapter: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same tensors, by layer and letter."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        layers.setdefault(name[:-2], {})[name[-1]] = tensor
    return layers


def factored(parts: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """The change of one layer's weight as a product: (d_out, k) and (k, d_text); `width` is d_text."""
    if "A" in parts:
        return parts["B"], parts["A"]
    if "d" in parts:
        down, up = (
            t.to(parts["d"].device) for t in projections(len(parts["d"]), len(parts["b"]), width)
        )
        return parts["b"][:, None] * up, parts["d"][:, None] * down
    return parts["D"], torch.eye(width, device=parts["D"].device)


def delta(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The change of one layer's weight, (d_out, d_text); `shape` is that weight's."""
    if "D" in parts:
        return parts["D"]
    left, right = factored(parts, shape[1])
    return left @ right


def delta_weights(backbone: Backbone, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The change of every layer's weight, (d_out, d_text)."""
    return {
        layer: delta(parts, backbone.kv_layers[layer].weight.shape)
        for layer, parts in layers_of(adapter).items()
    }


@cache
def projections(rank: int, out: int, width: int) -> tuple[Tensor, Tensor]:
    """VeRA's frozen random A0 (r, d_text) and B0 (d_out, r), the same for all layers of a shape;
    Kaiming uniform. Not to be changed in place.
    """
    generator = torch.Generator().manual_seed(0)
    down, up = (
        torch.rand(size, generator=generator) * 2 - 1 for size in ((rank, width), (out, rank))
    )
    return down * (3 / width) ** 0.5, up * (3 / rank) ** 0.5


class ChangedLayer(nn.Module):
    """A linear layer with a VeRA or a full-size change beside its weight: what peft can't put into
    a model that is not its own.
    """

    def __init__(self, base: nn.Linear, parts: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.base_layer, self.parts = base, nn.ParameterDict(parts)
        if "d" in parts:
            self.down, self.up = (
                t.to(base.weight.device) for t in projections(len(parts["d"]), *base.weight.shape)
            )

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if "D" in self.parts:
            change = F.linear(wide, self.parts["D"])
        else:
            change = (
                F.linear(F.linear(wide, self.down) * self.parts["d"], self.up) * self.parts["b"]
            )
        return self.base_layer(x) + change.to(x.dtype)

    def get_base_layer(self) -> nn.Linear:
        return self.base_layer


def adapted_layers(backbone: Backbone) -> dict[str, LoraLinear | ChangedLayer]:
    """The modules that carry an attached adapter, by layer."""
    return {
        name: module
        for name, module in backbone.unet.named_modules()
        if isinstance(module, (LoraLinear, ChangedLayer))
    }


def attach(
    backbone: Backbone, adapter: Adapter, name: str = "current", *, trainable: bool = False
) -> dict[str, nn.Parameter]:
    """Put copies of the adapter's tensors into the U-Net under `name`; returns them as parameters
    (float32, on the backbone's device).

    LoRAs of several names add up.
    """
    parameters = {
        key: nn.Parameter(t.to(backbone.device, torch.float32, copy=True), requires_grad=trainable)
        for key, t in adapter.items()
    }
    if kind_of(adapter) != "lora":
        for layer, parts in layers_of(parameters).items():
            _put(backbone, layer, ChangedLayer(backbone.kv_layers[layer], parts))  # type: ignore[arg-type]
        return parameters
    rank = rank_of(adapter)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=KV_MODULES, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config`"
        )  # a second LoRA is meant
        inject_adapter_in_model(config, backbone.unet, adapter_name=name)
    for layer, module in adapted_layers(backbone).items():
        assert isinstance(module, LoraLinear)
        module.set_adapter(list(module.lora_A))  # all of them act
        module.requires_grad_(False)
        module.lora_A[name].weight, module.lora_B[name].weight = (
            parameters[f"{layer}.A"],
            parameters[f"{layer}.B"],
        )
    return parameters


def detach(backbone: Backbone) -> None:
    """Take every adapter out; the U-Net is again exactly what it was."""
    for name, module in adapted_layers(backbone).items():
        _put(backbone, name, module.get_base_layer())
    if hasattr(backbone.unet, "peft_config"):
        del backbone.unet.peft_config


def _put(backbone: Backbone, layer: str, module: nn.Module) -> None:
    parent, _, leaf = layer.rpartition(".")
    setattr(backbone.unet.get_submodule(parent), leaf, module)


@contextmanager
def attached(
    backbone: Backbone,
    adapter: Adapter | None,
    *,
    trainable: bool = False,
    beneath: Adapter | None = None,
) -> Iterator[dict[str, nn.Parameter]]:
    """The adapter is in the U-Net inside the block and out of it afterwards, whatever happens. None
    attaches nothing.

    `beneath` is a frozen LoRA that acts too.
    """
    try:
        if beneath:
            attach(backbone, beneath, "beneath")
        yield attach(backbone, adapter, trainable=trainable) if adapter else {}
    finally:
        detach(backbone)


@contextmanager
def holding(parameters: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the attached parameters have the adapter's values: how a teacher speaks
    through the same net, without gradients.
    """
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        try:
            for name, parameter in parameters.items():
                parameter.copy_(adapter[name])
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def grown(adapter: Adapter, rank: int) -> Adapter:
    """The same change with rows to spare: the new ones of A are random, so that learning can use
    them, those of B are zero.
    """
    generator, grown = torch.Generator().manual_seed(0), {}
    for name, tensor in adapter.items():
        more = rank - tensor.shape[0 if name.endswith("A") else 1]
        if more <= 0:
            grown[name] = tensor
        elif name.endswith("A"):
            grown[name] = torch.cat(
                [tensor, torch.randn(more, tensor.shape[1], generator=generator) * rank**-0.5]
            )
        else:
            grown[name] = torch.cat([tensor, torch.zeros(len(tensor), more)], 1)
    return grown


def joined(first: Adapter, second: Adapter) -> Adapter:
    """The LoRA whose change is the sum of both: A (r1 + r2, d_text), B (d_out, r1 + r2)."""
    return {
        name: torch.cat([first[name], second[name]], 0 if name.endswith("A") else 1)
        for name in second
    }
