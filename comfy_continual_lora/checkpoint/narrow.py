"""Frozen weights: the dtypes they compute in, and layers that store theirs in fewer bits.

    fp32, bf16, fp16    stored and computed in this dtype
    fp8                 the U-Net's large matrices are stored in 8 bits with a scale per row,
                        W = s Q; everything else is stored, and all is computed, in bf16 or fp16
    text encoders       beside a U-Net in 16 or 8 bits: stored as in the file, computed in float32,
                        which gives exactly the same features
    overflow.py         layers whose numbers are too large for fp16

A narrow layer widens its weight in the forward pass, and once more in the backward pass: the
gradient with respect to its input needs nothing else, so nothing wide is kept.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from .overflow import release

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}


def dtype_for(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that `precision` (a setting) stands for.

    "auto" is bf16 on an NVIDIA, AMD or Intel GPU that has it, fp16 on another one, fp32 elsewhere.
    """
    if precision == "auto":
        return half_dtype(device) if device.type in ("cuda", "xpu") else torch.float32
    return DTYPES[precision]


def half_dtype(device: torch.device) -> torch.dtype:
    """The dtype of 16 bits to compute in: bf16 where the device has it.

    NVIDIA's has it from compute capability 8 (Ampere); before, torch emulates it slowly, and says
    that it is supported.
    """
    lacks_bf16 = device.type == "mps" or (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] < 8
    )
    return torch.float16 if lacks_bf16 else torch.bfloat16


def compute_dtype_of(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a net whose weights are stored in `dtype` computes in."""
    return half_dtype(device) if dtype == FP8 else dtype


def put(
    module: nn.Module,
    name: str,
    weight: Tensor,
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
) -> None:
    """Make `weight` the frozen parameter `name` of `module`, which computes in `dtype`.

    It is stored in `stored` if its layer can widen it, else in `dtype` too.
    """
    path, _, leaf = name.rpartition(".")
    layer = module.get_submodule(path)
    plain = _PLAIN.get(type(layer), type(layer))
    if leaf == "weight" and plain in _NARROW:
        layer.__class__ = plain
        if stored not in (None, dtype):
            layer.__class__ = _NARROW[plain]
            layer.register_buffer("scale", None, persistent=False)
            layer.compute_dtype = dtype  # type: ignore[assignment]
            if stored == FP8 and weight.dtype != FP8:  # what a file has in 8 bits stays as it is
                rows = weight.float().flatten(1)
                scale = (rows.abs().amax(1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
                layer.scale = scale.view(-1, *[1] * (weight.ndim - 1)).to(dtype)
                weight = rows.div(scale[:, None]).view_as(weight)
            dtype = stored  # type: ignore[assignment]
    setattr(layer, leaf, nn.Parameter(weight.to(dtype), requires_grad=False))


def is_large(name: str, weight: Tensor) -> bool:
    """Whether fp8 stores this weight of the net in 8 bits.

    It does with the matrices of its blocks, but not with K and V of cross-attention, whose exact
    values learning needs.
    """
    blocks = "down_blocks|mid_block|up_blocks|transformer_blocks"
    return weight.ndim > 1 and re.match(rf"({blocks})\.(?!.*attn2\.to_[kv])", name) is not None


def put_unet(unet: nn.Module, name: str, weight: Tensor, dtype: torch.dtype) -> None:
    """`put` for a U-Net whose precision is `dtype`."""
    stored = FP8 if dtype == FP8 and is_large(name, weight) else None
    put(unet, name, weight, compute_dtype_of(dtype, weight.device), stored)


def recast(unet: nn.Module, dtype: torch.dtype) -> None:
    """Bring the frozen U-Net into another dtype in place, if it is not in it already."""
    narrow = any(isinstance(layer, Narrow) for layer in unet.modules())
    if dtype == (FP8 if narrow else unet.dtype):
        return
    release(unet)
    for name, parameter in list(unet.named_parameters()):
        weight = parameter.detach()
        layer = unet.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Narrow) and name.endswith(".weight"):
            weight = layer.wide()
        if narrow or dtype == FP8 or weight.dtype != dtype:
            put_unet(unet, name, weight, dtype)


class Narrow(nn.Module):
    """A frozen layer whose weight is stored in fewer bits than it computes in."""

    weight: Tensor
    scale: Tensor | None
    compute_dtype: torch.dtype

    def wide(self) -> Tensor:
        weight = self.weight.to(self.compute_dtype)
        return weight if self.scale is None else weight * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return _Frozen.apply(input, self)  # type: ignore[return-value]


class NarrowLinear(Narrow, nn.Linear):
    def compute(self, x: Tensor) -> Tensor:
        return F.linear(x, self.wide(), self.bias)

    def input_gradient(self, gradient: Tensor, _shape: torch.Size) -> Tensor:
        return gradient @ self.wide()


class NarrowConv(Narrow, nn.Conv2d):
    def compute(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.wide(), self.bias)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(shape, self.wide(), gradient, *geometry)  # type: ignore[arg-type]


class NarrowEmbedding(Narrow, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return nn.Embedding.forward(self, input).to(self.compute_dtype)


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
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.layer.input_gradient(gradient, ctx.shape).to(ctx.dtype), None
