"""`closed_form`: sequential LoRA, then the one LoRA closest to what every concept's own adapter
does to its prompts.

source      ours, not in Jha et al. 2025; relatives: see `solve`
equation    the loss of `lora`; then, exactly (`solve`),
            delta = argmin sum_j E_{c of j} || (delta - delta_j) c ||^2
remembers   the pool of past LoRAs, as DSC does; words and templates are on the stack
cost        `lora` + encoding 1,024 prompts per checkpoint and a few dozen per concept, once, and
            one solve per layer: seconds
deviations  not applicable; ordinary prompts, including the empty one, are held at the checkpoint's
            output, which none of the paper's ten systems does
"""

from __future__ import annotations

from ..adapters.adapter import KINDS, Adapter
from ..consolidation import consolidated
from ..session import Session
from ..settings import ResolvedSettings, SolveSettings
from ..stack import ConceptStack
from ..targets import PromptBank
from .method import LearnedConcept, Method


class ClosedForm(Method):
    id = "closed_form"
    previews_earlier = False  # earlier concepts are solved for afterwards

    def takes(self, kind: str) -> bool:
        return KINDS[kind].solvable

    def prompt_bank(self, session: Session, noun: str, settings: ResolvedSettings) -> PromptBank:
        """With no concept yet: earlier ones are solved for at the end and need not be held."""
        return self.bank_of(session, noun, settings, 0)

    def remember(self, learned: LearnedConcept, adapter: Adapter | None) -> ConceptStack:
        stack = super().remember(learned, adapter)
        if len(stack.records) == 1:
            return stack
        session, bank = learned.session, learned.bank
        assert bank  # `prompt_bank` always makes one
        solved, _ = consolidated(
            session.backbone, stack, SolveSettings(), session.on_progress, bank
        )
        bank.moments.drop_unused()
        return solved.as_learned()
