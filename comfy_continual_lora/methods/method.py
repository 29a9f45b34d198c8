"""What the pipeline asks of a method.

What a method does not say is what plain sequential learning (`lora`) does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..settings import LearnSettings
from ..store import ConceptStack

Penalty = Callable[[Mapping[str, Tensor]], Tensor]  # factors -> a number, added to the loss


class Method:
    id: str
    # the kind of adapter it trains besides the word: "lora" (or "vera", a setting), "full", or ""
    # for the word alone
    adapter = "lora"
    # the loss its Fisher is taken of: "" no Fisher, "denoising", or "scores" for denoising and DC
    # scores
    importance = ""
    retention_weight = 0.0  # weight of the drift in text space, where the settings leave it at 0
    # afterwards: "" none, DSC by "distillation" (b1, b2) or with "scores" (a1, a2 too), or "closed
    # form"
    consolidation = ""

    def penalty(
        self, stack: ConceptStack, settings: LearnSettings, device: torch.device
    ) -> Penalty | None:
        """What is added to the loss for the sake of the stack's concepts; None for nothing."""
        return None

    def starts_anew(self, settings: LearnSettings) -> bool:
        """Whether every concept gets a LoRA of its own on top of the frozen earlier ones, and a
        random word without class noun.
        """
        return False
