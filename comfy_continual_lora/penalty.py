"""Stage 3: penalties added to the loss to protect what was learned before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .adapters.lora import joined


@dataclass(frozen=True)
class Step:
    """What a penalty can use in a training step.

    The factors that are trained; while a concept is learned also the words by token, the step's
    prompts (n,), their features (n, t, d), and the LoRA that is frozen under the factors, if any.
    """

    factors: Mapping[str, Tensor]
    words: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    features: Tensor | None = None
    frozen: Mapping[str, Tensor] | None = None

    @property
    def whole(self) -> Mapping[str, Tensor]:
        """The factors of all that acts: those that are trained, and the frozen ones."""
        return joined(self.frozen, self.factors) if self.frozen else self.factors


Penalty = Callable[[Step], Tensor]  # -> a number, added to the loss
