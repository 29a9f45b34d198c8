"""`closed_form`: sequential LoRA, then the one LoRA closest to what every concept's own adapter
does to its prompts.

source      ours, not in Jha et al. 2025; relatives: see `solve`
equation    the loss of `lora`; then, exactly (`solve`),
            delta = argmin sum_j E_{c of j} || (delta - delta_j) c ||^2
                           + w E_{ordinary c} || delta c ||^2
remembers   for each concept, what its own adapter did to its own prompts, as a low-rank LoRA, and
            the second moment of these prompts, as rows
cost        `lora` + encoding some 1,400 prompts per checkpoint, once, and fewer than a hundred per
            concept + one solve per layer: seconds
deviations  not applicable; ordinary prompts, including the empty one, are held at the checkpoint's
            output, which none of the paper's ten systems does
"""

from __future__ import annotations

from ..adapters.adapter import KINDS, Adapter
from ..consolidation import consolidated
from ..progress import Progress
from ..session import Session
from ..settings import ResolvedSettings, SolveSettings
from ..solve import Target
from ..stack import ConceptStack
from ..targets import with_small_target
from .method import LearnedConcept, Method, Sizes


class ClosedForm(Method):
    id = "closed_form"
    previews_earlier = False  # earlier concepts are solved for afterwards

    def takes(self, kind: str) -> bool:
        return KINDS[kind].solvable

    def kept_bytes(self, settings: ResolvedSettings, sizes: Sizes, earlier: int) -> int:
        own = 4 * sizes.word + sizes.prompts(earlier)
        if not earlier:
            return 4 * sizes.adapter + own
        target = 2 * sizes.adapter  # it has the adapter's rank at most
        # the first one's adapter stays, beside the solution
        return (4 * sizes.adapter if earlier == 1 else 0) + target + own

    def encode(self, session: Session, noun: str, settings: ResolvedSettings) -> None:
        """Ordinary prompts alone; those of earlier concepts are not needed before the end."""
        stack = session.stack
        bank = session.bank(stack, settings.retention_words)
        nouns = [*(record.noun for record in stack.records), noun]
        ordinary = bank.ordinary(nouns, stack.ordinary, settings.retention_language)
        session.stack = stack.with_prompts({}, ordinary)

    def held(self, session: Session) -> list[Target]:
        """None: earlier concepts are solved for at the end."""
        return []

    def remember(self, learned: LearnedConcept, adapter: Adapter | None) -> ConceptStack:
        stack = super().remember(learned, adapter)
        if len(stack.records) == 1 or adapter is None:
            return stack
        session, newest = learned.session, len(stack.records) - 1
        stack = with_small_target(session.bank(stack), stack, newest, adapter)
        session.on_progress(Progress("solve", 0, 1))
        settings = SolveSettings(language=learned.settings.retention_language)
        solved, _ = consolidated(stack, settings)
        session.on_progress(Progress("solve", 1, 1))
        return solved.as_learned()
