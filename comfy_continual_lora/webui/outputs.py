"""The parts of the page that handlers change, by name, and updates of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ..errors import ContinualLoraError
from .environment import NotReady
from .runner import Busy

ADVANCED = (
    "kind",
    "until",
    "watch_every",
    "steps",
    "rank",
    "rate",
    "vectors",
    "token_rate",
    "batch",
    "size",
    "fit",
    "flip",
    "seed",
    "adapter",
    "ewc_strength",
    "retention_weight",
    "dsc_steps",
    "fisher_samples",
    "precision",
    "checkpointing",
    "accumulate",
    "preview_every",
    "preview_prompts",
    "keep_features",
    "clip_skip",
)
# defaults that differ on the page: previews while learning are worth their time
DEFAULTS: dict[str, Any] = {"preview_every": 50}
CARDS = 12  # concepts that are shown at a time
SLOTS = 20  # pictures whose captions can be typed
CHIPS = 4  # prompts that are proposed

_FAST = (
    "status",
    "bar",
    "said",
    "said_bar",
    "learn",
    "stop",
    "halt",
    "losses",
    "preview",
    "environment",
    "lacking",
    "pulse",
    "mark",
)
STACK = (
    *(f"card_{number}" for number in range(CARDS)),
    *(f"face_{number}" for number in range(CARDS)),
    "none",
    "more",
    "exports",
    "tokens",
    *(f"chip_{number}" for number in range(CHIPS)),
    "history",
)
OUTPUTS = (*_FAST, *STACK, "chart", "gallery", "downloads", "queue", "waits", "token", "prompt")
ASKING = ("asking", "question", "yes", "pending")
RENAMING = ("renaming", "renamed", "to")
PICTURES = (
    "beside",
    "inventory",
    *(f"slot_{number}" for number in range(SLOTS)),
    *(f"thumb_{number}" for number in range(SLOTS)),
    *(f"caption_{number}" for number in range(SLOTS)),
)
REFUSED = (ValueError, OSError, ContinualLoraError, Busy, NotReady)  # shown instead of a traceback
Values = dict[str, Any]
HAS_TIMER = hasattr(gr, "Timer")


def in_order(values: Mapping[str, Any], names: Sequence[str] = OUTPUTS) -> list[Any]:
    """A value for each output; those without one stay as they are."""
    return [values[name] if name in values else gr.update() for name in names]


def visible(text: str) -> Any:
    """An update of a part that takes no room while it is empty."""
    return gr.update(value=text, visible=bool(text))


def not_asked() -> list[Any]:
    """Values of `ASKING`: nothing is asked."""
    return [gr.update(visible=False), "", gr.update(), None]
