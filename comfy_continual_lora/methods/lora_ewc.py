"""`lora_ewc`: sequential LoRA, held by EWC.

source      row "LoRA + EWC" of Jha et al. 2025; EWC: Kirkpatrick et al. 2017 (arXiv 1612.00796),
            online form Schwarz et al. 2018 (arXiv 1805.06370)
equation    the loss of `lora` + lambda sum F* (theta - theta*)^2;  F from the denoising loss,
            theta = A and B
remembers   one Fisher per concept, as large as the LoRA
cost        `lora` + 256 per-sample gradients per concept; the penalty is a few elementwise
            operations per step
deviations  each Fisher is rescaled to mean 1, and the penalty divided by the root of the number of
            parameters (`ewc`)
"""

from __future__ import annotations

from typing import ClassVar

from ..adapters.adapter import Adapter
from ..errors import SettingError
from ..ewc import ewc
from ..penalty import Penalty
from ..session import Session
from ..settings import LearnSettings, ResolvedSettings
from ..textspace import RetentionPenalty
from .method import LearnedConcept, Method, Sizes, StackSummary
from .stages import fisher_of


class LoraEwc(Method):
    id = "lora_ewc"
    with_scores: ClassVar[bool] = False  # whether the Fisher includes the DC scores
    only_ewc: ClassVar[bool] = True  # whether nothing else protects earlier concepts

    def check(self, settings: LearnSettings, stack: StackSummary) -> None:
        super().check(settings, stack)
        check_one_size(self, stack)
        if self.only_ewc and stack.kind and stack.without_fisher:
            raise SettingError(
                f"{self.id} protects earlier concepts by their Fishers, and this stack has none of "
                f"{', '.join(stack.without_fisher)}: a method without EWC learned them, or the stack "
                "was solved for afterwards. Continue with the `method` retention or closed_form, "
                "which need no Fisher, with a method that distils too (lora_dsc_ewc, "
                "lora_dsc_ewc_dc), or start another `stack`."
            )

    def kept_bytes(self, settings: ResolvedSettings, sizes: Sizes, earlier: int) -> int:
        return super().kept_bytes(settings, sizes, earlier) + 4 * _of_fisher(settings, sizes)

    def penalty_bytes(self, settings: ResolvedSettings, sizes: Sizes, earlier: int) -> int:
        """Of each anchor: itself, its Fisher, and how far the adapter is from it."""
        anchors = earlier if settings.ewc_mode == "separate" else min(earlier, 1)
        return anchors * 3 * 4 * _of_fisher(settings, sizes)

    def penalties(
        self, session: Session, settings: ResolvedSettings, held: RetentionPenalty | None
    ) -> dict[str, Penalty]:
        penalty = ewc(session.stack, settings, session.backbone.device)
        own: dict[str, Penalty] = {} if penalty is None else {"ewc": penalty}
        return {**own, **super().penalties(session, settings, held)}

    def fisher(self, learned: LearnedConcept, adapter: Adapter) -> Adapter | None:
        return fisher_of(learned, adapter, with_scores=self.with_scores)


def _of_fisher(settings: ResolvedSettings, sizes: Sizes) -> int:
    """How many numbers a Fisher has."""
    return sizes.dense if settings.fisher_space == "delta" else sizes.adapter


def check_one_size(method: Method, stack: StackSummary) -> None:
    """Errors: SettingError for a method that compares adapters, on a stack whose adapter grows."""
    if stack.kind == "lora" and (stack.adapter_rank or 0) > (stack.rank or 0):
        raise SettingError(
            f"{method.id} compares adapters of one size, but this stack's LoRA has grown (c_lora, "
            "published). Continue with that method, or start another `stack`."
        )
