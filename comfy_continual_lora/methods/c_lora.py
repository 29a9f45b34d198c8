"""`c_lora`: a new LoRA may not touch the weights that earlier ones changed most.

source      Smith et al. 2023 (C-LoRA, arXiv 2304.06027)
equation    the loss of `lora` + weight * || |sum_{i<n} B_i A_i| (Hadamard) B_n A_n ||^2
remembers   the past LoRAs
cost        the product B A, as large as K or V, per layer and step
variants    "sequential" (as Jha et al. 2025 ran it): one adapter, LoRA_n starts from LoRA_{n-1};
            B_i A_i is all of it after concept i
            "published": every concept has its own LoRA, starting at B = 0, with past ones frozen
            and summed; a random word, prompts without class noun; the stack's adapter grows by the
            rank
deviations  none known. The penalty's degenerate minimum, B_n A_n = 0 (Jha et al. 2025), is
            reproduced (benchmarks/c_lora/curve.png). Figures here are of the mini-SD, so only orders
            can be compared with the paper's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, layers_of
from ..penalty import Penalty, Step
from ..session import Session
from ..settings import LearnSettings, ResolvedSettings
from ..targets import own_adapters
from ..textspace import RetentionPenalty
from .method import Method, Sizes
from .textual_inversion import TextualInversion


def hadamard_penalty(
    factors: Mapping[str, Tensor],
    past: Mapping[str, Tensor],
    within: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """|| past (Hadamard) (B A - within) ||^2 over all layers, a number: `past` is the summed change
    of each layer, (d_out, d_text); `within` what B A holds of it, None for nothing.
    """
    terms = []
    for layer, parts in layers_of(factors).items():
        change = parts["B"] @ parts["A"]
        if within is not None:
            change = change - within[layer]
        terms.append((past[layer] * change).square().sum())
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class Hadamard:
    """The penalty in the training loop.

    `own`: whether every concept has its own LoRA. What is distilled then is their sum, and the
    penalty is on what it has beyond the past ones.
    """

    weight: float
    past: Mapping[str, Tensor]
    own: bool = False

    def __call__(self, step: Step) -> Tensor:
        within = self.past if self.own and step.frozen is None else None
        return self.weight * hadamard_penalty(step.factors, self.past, within)


class CLora(Method):
    id = "c_lora"

    def takes(self, kind: str) -> bool:
        return kind == "lora"  # the penalty is on A and B

    def fresh_adapter(self, settings: LearnSettings) -> bool:
        return settings.c_lora_variant == "published"

    def penalty_bytes(self, settings: ResolvedSettings, sizes: Sizes, earlier: int) -> int:
        """The past changes, and their product with the new one."""
        return 2 * 4 * sizes.dense if earlier else 0

    def penalties(
        self, session: Session, settings: ResolvedSettings, held: RetentionPenalty | None
    ) -> dict[str, Penalty]:
        stack, fresh = session.stack, self.fresh_adapter(settings)
        # the single adapter of a "published" stack is already the sum
        past = [stack.adapter]
        if not fresh:
            pairs = zip(stack.records, own_adapters(stack), strict=True)
            # a word learned alone has the adapter of the concept before it
            past = [one for record, one in pairs if record.method != TextualInversion.id]
        past_adapters = [adapter for adapter in past if adapter is not None]
        own: dict[str, Penalty] = {}
        if past_adapters:
            summed = _summed(past_adapters, session.backbone.device)
            own["c_lora"] = Hadamard(settings.c_lora_weight, summed, fresh)
        return {**own, **super().penalties(session, settings, held)}


def _summed(adapters: Sequence[Adapter], device: torch.device) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for layer, parts in layers_of(adapter).items():
            change = (parts["B"] @ parts["A"]).to(device)
            total[layer] = total[layer] + change if layer in total else change
    return total
