"""`lora_dsc`: sequential LoRA, then distillation from the newest and a past adapter.

source      row "LoRA + DMC" of Jha et al. 2025, after Zhang et al. 2020 (arXiv 1903.07864)
equation    the loss of `lora`; then (`dsc`)
            b1 || eps_T1(c_n) - eps_S(c_n) ||^2 + b2 || eps_T2(c_i) - eps_S(c_i) ||^2
remembers   the pool of past LoRAs
cost        `lora` + `dsc_steps` steps of two student rows and two teacher rows
deviations  the row's name leaves open which of DSC's terms it has: we read it as distillation
            without scores; figures here are of the mini-SD and other pictures, so only orders can
            be compared with the paper's
"""

from __future__ import annotations

from typing import ClassVar

from ..adapters.adapter import Adapter
from ..settings import LearnSettings, ResolvedSettings
from .lora_ewc import check_one_size
from .method import LearnedConcept, Method, Rows, StackSummary
from .stages import distilled, past_adapters


class LoraDsc(Method):
    id = "lora_dsc"
    with_score_terms: ClassVar[bool] = False  # whether DSC has a1 and a2 besides b1 and b2

    def check(self, settings: LearnSettings, stack: StackSummary) -> None:
        super().check(settings, stack)
        check_one_size(self, stack)

    def consolidate(self, learned: LearnedConcept, adapter: Adapter | None) -> Adapter | None:
        if not adapter or not past_adapters(learned):
            return adapter
        student, _ = distilled(
            learned, adapter, learned.penalties, with_scores=self.with_score_terms
        )
        return student

    def rows(self, settings: ResolvedSettings, earlier: int) -> Rows:
        """DSC pairs each image with two or three prompts, and takes a third of the images."""
        step, most = super().rows(settings, earlier)
        prompts = 3 if self.with_score_terms else 2
        pictures = -(-max(1, settings.batch // 3) // settings.accumulate)
        return Rows(step, max(most, prompts * pictures) if earlier else most)
