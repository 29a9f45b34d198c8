"""Stage 3: the adapters, a change of K and V of every cross-attention,  W = W0 + delta. Light.

PARTS names each kind's tensors and their sizes: `rank` r is chosen, `out` and `width` are the layer's
outputs and inputs (d_out, d_text). Stack files, plans and checks read it. Each kind is defined in
its own module; `adapter.KINDS` is their table.
"""

from __future__ import annotations

import math

PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "lora": {"A": ("rank", "width"), "B": ("out", "rank")},
    "vera": {"d": ("rank",), "b": ("out",)},
    "full": {"D": ("out", "width")},
}
# A Fisher may be of the change itself, "<layer>.W", for any kind (`ewc`).
DENSE = {"W": ("out", "width")}


def count(kind: str, out: int, width: int, rank: int) -> int:
    """How many numbers an adapter of this kind has for one layer."""
    sizes = {"out": out, "width": width, "rank": rank}
    return sum(math.prod(sizes[one] for one in dimensions) for dimensions in PARTS[kind].values())


def kind_with(parts: set[str]) -> str | None:
    """The kind whose tensors of a layer have these names, such as {"A", "B"}."""
    return next((kind for kind, names in PARTS.items() if names.keys() == parts), None)
