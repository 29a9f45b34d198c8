"""`lora_dsc`: sequential LoRA, then distillation from the newest and a past adapter.

source      row "LoRA + DMC" of Jha et al. 2025, after Zhang et al. 2020 (arXiv 1903.07864)
equation    the loss of `lora`; then  b1 || eps_T1(c_n) - eps_S(c_n) ||^2 + b2 || eps_T2(c_i) -
eps_S(c_i) ||^2  (`dsc`)
remembers   the pool of past LoRAs
cost        `lora` + a few hundred steps of two student rows and two teacher rows
deviations  the row's name leaves open which of DSC's terms it has: we read it as distillation
without scores; the published numbers are not
            reproduced yet
"""

from __future__ import annotations

from .method import Method


class LoraDsc(Method):
    id = "lora_dsc"
    consolidation = "distillation"
