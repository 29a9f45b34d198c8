"""The rows of the retention benchmark's tables: methods, rivals and bounds, with what differs."""

from __future__ import annotations

from jobs import BOUNDS
from rivals import RIVALS

from comfy_continual_lora.presets import METHODS

# every EWC row with ordinary prompts held as well: a gain of `retention` may come from that alone
_HELD = ("lora", "lora_ewc", "lora_ewc_dc", "lora_dsc_ewc", "lora_dsc_ewc_dc")
ROWS = (
    *METHODS,
    *(f"{name} retention_weight=1" for name in _HELD),
    *RIVALS,
    "solve base=retention",
    "retention lists=half",
    *BOUNDS,
    *(f"{name} base=retention" for name in BOUNDS),
)
# the six-concept table of 2026-11 on the first splits
EARLIER = (
    *METHODS,
    *(f"{name} adapter=vera" for name in ("lora", "lora_ewc", "lora_ewc_dc")),
    *BOUNDS,
)
