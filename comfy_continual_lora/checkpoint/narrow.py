"""Frozen weights: the number formats they compute in, and layers that store theirs in fewer bits.

    fp32, bf16, fp16    stored and computed in
    fp8                 the U-Net's large matrices: 8 bits a number and a scale a row, W = s Q;
    everything else, and what is computed in, bf16 or fp16
    text encoders       beside a net in 16 or 8 bits: stored as in the file, computed in float32,
    which changes no digit

A narrow layer widens its weight while it works, and once more on the way back: the gradient in its
input needs nothing else, so nothing wide is kept.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # what 8 bits reach
NUMBERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}


def number_for(precision: str, device: torch.device) -> torch.dtype:
    """The format that `precision` (a setting) stands for.

    "auto" is bf16 on a GPU that has it, fp16 on one that has not, fp32 elsewhere.
    """
    if precision == "auto":
        return half_of(device) if device.type == "cuda" else torch.float32
    return NUMBERS[precision]


def half_of(device: torch.device) -> torch.dtype:
    """The format of 16 bits to compute in."""
    lacks = device.type == "mps" or (device.type == "cuda" and not torch.cuda.is_bf16_supported())
    return torch.float16 if lacks else torch.bfloat16


def computed_in(number: torch.dtype, device: torch.device) -> torch.dtype:
    return half_of(device) if number == FP8 else number


def put(
    module: nn.Module,
    name: str,
    weight: Tensor,
    number: torch.dtype,
    stored: torch.dtype | None = None,
) -> None:
    """Make `weight` the frozen parameter `name` of `module`; in `stored`, where that is narrower
    than `number` and its layer can widen it.
    """
    path, _, leaf = name.rpartition(".")
    layer = module.get_submodule(path)
    plain = _PLAIN.get(type(layer), type(layer))
    if leaf == "weight" and plain in _NARROW:
        layer.__class__ = plain
        if stored not in (None, number):
            layer.__class__ = _NARROW[plain]
            layer.register_buffer("scale", None, persistent=False)
            layer.number = number  # type: ignore[assignment]
            if stored == FP8:
                rows = weight.float().flatten(1)
                scale = (rows.abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
                layer.scale = scale.view(-1, *[1] * (weight.ndim - 1)).to(number)
                weight = rows.div(scale[:, None]).view_as(weight)
            number = stored  # type: ignore[assignment]
    setattr(layer, leaf, nn.Parameter(weight.to(number), requires_grad=False))


def is_large(name: str, weight: Tensor) -> bool:
    """Whether 8 bits are for this weight of a U-Net: a matrix of its blocks, but not K and V of
    cross-attention, whose own values are asked for.
    """
    return (
        weight.ndim > 1
        and re.match(r"(down_blocks|mid_block|up_blocks)\.(?!.*attn2\.to_[kv])", name) is not None
    )


def put_unet(unet: nn.Module, name: str, weight: Tensor, number: torch.dtype) -> None:
    """`put` for the U-Net."""
    put(
        unet,
        name,
        weight,
        computed_in(number, weight.device),
        FP8 if number == FP8 and is_large(name, weight) else None,
    )


def recast(unet: nn.Module, number: torch.dtype) -> None:
    """Bring the frozen U-Net into another number format, in place; nothing happens where it is in
    it.
    """
    narrow = any(isinstance(layer, Narrow) for layer in unet.modules())
    if narrow and number == FP8:
        return
    for name, weight in list(unet.named_parameters()):
        layer = unet.get_submodule(name.rpartition(".")[0])
        wide = (
            layer.wide()
            if isinstance(layer, Narrow) and name.endswith(".weight")
            else weight.detach()
        )
        if narrow or number == FP8 or wide.dtype != number:
            put_unet(unet, name, wide, number)


class Narrow(nn.Module):
    """A frozen layer whose weight is stored in fewer bits than `number`, which it computes in."""

    weight: Tensor
    scale: Tensor | None
    number: torch.dtype

    def wide(self) -> Tensor:
        weight = self.weight.to(self.number)
        return weight if self.scale is None else weight * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return _Frozen.apply(input, self)  # type: ignore[return-value]


class NarrowLinear(Narrow, nn.Linear):
    def answer(self, x: Tensor) -> Tensor:
        return F.linear(x, self.wide(), self.bias)

    def back(self, gradient: Tensor, _shape: torch.Size) -> Tensor:
        return gradient @ self.wide()


class NarrowConv(Narrow, nn.Conv2d):
    def answer(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.wide(), self.bias)

    def back(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        shares = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(shape, self.wide(), gradient, *shares)  # type: ignore[arg-type]


class NarrowEmbedding(Narrow, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return nn.Embedding.forward(self, input).to(self.number)


_NARROW: dict[type, type] = {
    nn.Linear: NarrowLinear,
    nn.Conv2d: NarrowConv,
    nn.Embedding: NarrowEmbedding,
}
_PLAIN: dict[type, type] = {narrow: plain for plain, narrow in _NARROW.items()}


class _Frozen(torch.autograd.Function):
    """y = layer(x) with a gradient in x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape, ctx.number = layer, x.shape, x.dtype
        return layer.answer(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.layer.back(gradient, ctx.shape).to(ctx.number), None
