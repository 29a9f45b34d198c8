"""`lora_ewc`: sequential LoRA, held by EWC.

source      row "LoRA + EWC" of Jha et al. 2025; EWC: Kirkpatrick et al. 2017 (arXiv 1612.00796),
online form Schwarz et al. 2018 (arXiv 1805.06370)
equation    the loss of `lora` + lambda sum F* (theta - theta*)^2;  F from the denoising loss, theta
= A and B
remembers   one Fisher a concept, as large as the LoRA
cost        `lora` + 256 gradients of single samples a concept; the penalty is a few elementwise
operations a step
deviations  each Fisher is rescaled to mean 1; the published numbers are not reproduced yet
"""

from __future__ import annotations

import torch

from ..ewc import Ewc, ewc
from ..settings import LearnSettings
from ..store import ConceptStack
from .method import Method


class LoraEwc(Method):
    id = "lora_ewc"
    importance = "denoising"

    def penalty(
        self, stack: ConceptStack, settings: LearnSettings, device: torch.device
    ) -> Ewc | None:
        return ewc(stack, settings, device)
