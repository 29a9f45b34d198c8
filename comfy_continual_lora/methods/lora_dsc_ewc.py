"""`lora_dsc_ewc`: LoRA held by EWC, then distillation with the same penalty.

source      row "LoRA + DMC + EWC" of Jha et al. 2025
equation    `lora_ewc`; then the distillation of `lora_dsc` + lambda sum F* (theta_S - theta*)^2
remembers   the pool of past LoRAs, one Fisher per concept
cost        the sum of both
deviations  those of both
"""

from __future__ import annotations

from .lora_dsc import LoraDsc
from .lora_ewc import LoraEwc


class LoraDscEwc(LoraDsc, LoraEwc):
    id = "lora_dsc_ewc"
    only_ewc = False  # concepts without a Fisher are distilled
