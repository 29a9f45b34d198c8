"""Stage 3: attaching an adapter to a U-Net and detaching it again.

An `Adapter` is plain tensors under "<layer>.<part>", all of one kind. Attach and detach are exact
inverses. For drawing it is folded into the weights instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import PARTS, kind_with
from .full import Full
from .kind import AdapterKind, ChangedLayer, put_module
from .lora import Lora
from .vera import Vera

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

    from ..checkpoint.backbone import Backbone

Adapter = dict[str, Tensor]
KINDS: dict[str, AdapterKind] = {kind.name: kind for kind in (Lora(), Vera(), Full())}


def new_adapter(
    backbone: Backbone,
    rank: int,
    generator: torch.Generator,
    kind: str = "lora",
    preconditioner: Tensor | None = None,
) -> Adapter:
    """An adapter that changes nothing yet.

    `preconditioner`, (d_text, d_text), are the coordinates a LoRA's A is drawn in
    (`textspace.coordinates`).
    """
    adapter = {}
    for name, layer in backbone.kv_layers.items():
        out, width = layer.weight.shape
        parts = KINDS[kind].create(out, width, rank, generator, preconditioner)
        adapter |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return adapter


def kind_of(adapter: Mapping[str, Tensor]) -> AdapterKind:
    """The kind an adapter is of."""
    return kind_of_layer(next(iter(layers_of(adapter).values())))


def rank_of(adapter: Mapping[str, Tensor]) -> int:
    """Its rank r. Errors: StopIteration for a kind without one."""
    sizes = PARTS[kind_of(adapter).name]
    return next(
        tensor.shape[sizes[part].index("rank")]
        for name, tensor in adapter.items()
        if "rank" in sizes[part := name.rpartition(".")[2]]
    )


def layers_of(adapter: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same tensors, by layer and part."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    return layers


def kind_of_layer(parts: Mapping[str, Tensor]) -> AdapterKind:
    """The kind that one layer's tensors are of."""
    return KINDS[kind_with(set(parts)) or ""]


def factored(parts: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """The change of one layer's weight as a product: (d_out, k) and (k, d_text); `width` is d_text."""
    return kind_of_layer(parts).factors(parts, width)


def delta(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The change of one layer's weight, (d_out, d_text); `shape` is that weight's."""
    return kind_of_layer(parts).delta(parts, shape[1])


def delta_weights(backbone: Backbone, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The change of every layer's weight, (d_out, d_text)."""
    return {
        layer: delta(parts, backbone.kv_layers[layer].weight.shape)
        for layer, parts in layers_of(adapter).items()
    }


def adapted_layers(backbone: Backbone) -> dict[str, LoraLinear | ChangedLayer]:
    """The modules that carry an attached adapter, by layer."""
    from peft.tuners.lora import Linear as LoraLinear  # not light

    return {
        name: module
        for name, module in backbone.unet.named_modules()
        if isinstance(module, (LoraLinear, ChangedLayer))
    }


def attach(
    backbone: Backbone, adapter: Adapter, name: str = "current", *, trainable: bool = False
) -> dict[str, nn.Parameter]:
    """Put copies of the adapter's tensors into the U-Net under `name`.

    Returns them as parameters (float32, on the backbone's device). LoRAs of several names add up.
    """
    parameters = {
        key: nn.Parameter(
            tensor.to(backbone.device, torch.float32, copy=True), requires_grad=trainable
        )
        for key, tensor in adapter.items()
    }
    kind_of(adapter).attach(backbone, layers_of(parameters), name)  # type: ignore[arg-type]
    return parameters


def detach(backbone: Backbone) -> None:
    """Remove every adapter; the U-Net is exactly what it was before."""
    for name, module in adapted_layers(backbone).items():
        put_module(backbone, name, module.get_base_layer())
    if hasattr(backbone.unet, "peft_config"):
        del backbone.unet.peft_config


@contextmanager
def attached(
    backbone: Backbone,
    adapter: Adapter | None,
    *,
    trainable: bool = False,
    frozen_adapter: Adapter | None = None,
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside the block the adapter is attached; afterwards it is detached, whatever happens.

    None attaches nothing. `frozen_adapter`: a LoRA that is added, without training.
    """
    try:
        if frozen_adapter:
            attach(backbone, frozen_adapter, "frozen")
        yield attach(backbone, adapter, trainable=trainable) if adapter else {}
    finally:
        detach(backbone)


@contextmanager
def folded(backbone: Backbone, adapter: Adapter | None) -> Iterator[None]:
    """Inside the block the adapter is part of the weights, so that the net is as fast as without it;
    afterwards they are what they were, bit for bit, whatever happens. For what needs no gradient.

    None changes nothing. The sum is taken in float32 and rounded once. Meanwhile the originals are
    in main memory. A layer that is widened inside the block (`checkpoint.overflow`) stays wide.
    """
    originals: dict[str, Tensor] = {}
    try:
        for name, parts in layers_of(adapter or {}).items():
            weight = backbone.kv_layers[name].weight
            originals[name] = weight.data.cpu()
            change = delta(
                {part: one.to(weight.device) for part, one in parts.items()}, weight.shape
            )
            weight.data = (weight.data.float() + change).to(weight.dtype)
        yield
    finally:
        for name, original in originals.items():
            weight = backbone.kv_layers[name].weight
            weight.data = original.to(weight.device, weight.dtype)


@contextmanager
def swapped_in(parameters: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the attached parameters have the adapter's values, so that a teacher can use
    the same net.
    """
    original = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        try:
            for name, parameter in parameters.items():
                parameter.copy_(adapter[name])
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(original[name])
