"""`lora_dsc_ewc_dc`, the paper's proposal: LoRA held by EWC with DC scores, then full Diffusion
Scores Consolidation.

source      row "LoRA + DMC + EWC + DC" of Jha et al. 2025, the paper's proposal
equation    `lora_ewc_dc`; then L_DSC with all its terms (`dsc`)
remembers   the pool of past LoRAs, one Fisher per concept, tau
cost        the sum of both, with three rows each for the student and both teachers
deviations  those of `lora_ewc_dc`; the score terms are multiplied by tau (`dsc`)
"""

from __future__ import annotations

from .lora_dsc import LoraDsc
from .lora_ewc_dc import LoraEwcDc


class LoraDscEwcDc(LoraDsc, LoraEwcDc):
    id = "lora_dsc_ewc_dc"
    only_ewc = False  # concepts without a Fisher are distilled
    with_score_terms = True
