"""The cross-attention layers of a net of diffusers, and how to have them do something else.

in: a U-Net or a transformer - out: processors in its layers, for the length of a block.

Shapes: n pictures, hidden states (n, places, d), text features (n, t, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def query(attention: Any, hidden: Tensor) -> Tensor:
    """(n, places, d), as it meets the key."""
    return _normed(attention.norm_q, attention.to_q(hidden), attention.heads)


def key(attention: Any, features: Tensor) -> Tensor:
    """(n, t, d)"""
    return _normed(attention.norm_k, attention.to_k(features), attention.heads)


def _normed(norm: Any, projected: Tensor, heads: int) -> Tensor:
    """Anima's queries and keys are normalised in every head, a U-Net's are not."""
    return projected if norm is None else norm(projected.unflatten(2, (heads, -1))).flatten(2)


@contextmanager
def processors(net: Any, of: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the block every cross-attention has another processor; `of` makes it of its own."""
    layers = [one for name, one in net.named_modules() if name.endswith(".attn2")]
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(of(layer.processor))
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)
