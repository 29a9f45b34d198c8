"""Layers of a net in fp16 whose numbers are too large for it (above 65,504) are computed in float32,
each found when it first overflows; the rest stays in fp16.

in: a net, and a call of it whose result is not finite - out: the names of the layers found, which from
now on take and give float32. A layer is one whose inputs are finite and whose output is not: the
innermost and first. What follows takes float32 through autocast, so a layer whose input is too large
for fp16 is found next; norms, which autocast leaves alone on some devices, are all computed in float32
then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def widen_overflowing(net: nn.Module, call: Callable[[], object]) -> list[str]:
    """Compute in float32 what overflows in `call`, which calls the net; returns these layers' names.

    All are found in one call, because what follows an overflow sees the layer's new output. The first
    convolution stays as it is: its dtype is the net's. A compiled net is no longer used as such.
    """
    found: list[str] = []

    def mend(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if _is_finite(output) or not _is_finite((args, kwargs)):
            return None
        for one in (module, *(norms if not found else ())):
            _widen(one)
        found.append(name)
        return module.forward(*args, **kwargs)

    norms = [one for one in net.modules() if isinstance(one, (nn.GroupNorm, nn.LayerNorm))]
    hooks = [
        module.register_forward_hook(partial(mend, name), with_kwargs=True)
        for name, module in net.named_modules()
        if name not in ("", "conv_in")
    ]
    compiled, net._compiled_call_impl = net._compiled_call_impl, None
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        net._compiled_call_impl = compiled
    return found


def release(net: nn.Module) -> None:
    """Undo `widen_overflowing`, but for the weights, which are float32 where it had found a layer."""
    for module in net.modules():
        if isinstance(vars(module).get("forward"), partial):
            del module.forward


def _widen(module: nn.Module) -> None:
    for part in module.modules():
        for value in (*part._parameters.values(), *part._buffers.values()):
            if value is not None and value.dtype == torch.float16:
                value.data = value.data.float()
        if hasattr(part, "compute_dtype"):  # `narrow`
            part.compute_dtype = torch.float32  # type: ignore[assignment]
    module.forward = partial(_in_float32, module)


def _in_float32(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    device = next(value for value in _tensors((args, kwargs))).device
    with torch.autocast(device.type, enabled=False):
        return type(module).forward(module, *_widened(args), **_widened(kwargs))


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.float16 else value
    if isinstance(value, (list, tuple)):
        return tuple(map(_widened, value))
    if isinstance(value, dict):
        return {name: _widened(one) for name, one in value.items()}
    return value


def _is_finite(value: Any) -> bool:
    return all(one.isfinite().all() for one in _tensors(value) if one.is_floating_point())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for one in value for tensor in _tensors(one)]
    return []
