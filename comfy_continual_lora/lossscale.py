"""Stage 3: loss scaling, so that gradients in fp16 neither underflow nor overflow.

    the loss is multiplied by a scale, its gradients divided by it
    gradients that overflow: leave the step out, halve the scale
    2,000 steps without any: double it

Source: Micikevicius et al. 2018 (arXiv 1710.03740), section 3.2, with AMP's numbers. torch's own
GradScaler needs torch 2.3, and a later one on Macs; hosts bring 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import TrainingError
from .snapshot import DamagedSnapshot

_FIRST = 1024.0
_MOST = 2.0**60
_GROWS_AFTER = 2000


class LossScale:
    """The scale, 1 for any dtype but fp16, and the number of steps since it last changed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.grows = dtype == torch.float16
        self.value, self.steps = _FIRST if self.grows else 1.0, 0

    @staticmethod
    def checked(stored: Tensor) -> tuple[float, int]:
        """The scale and the number of steps in a snapshot. Errors: DamagedSnapshot."""
        numbers = stored.tolist() if stored.shape == (2,) and stored.is_floating_point() else (0, 0)
        value, steps = numbers
        if not 1 <= value <= _MOST or not 0 <= steps < 2**40:
            raise DamagedSnapshot("its scale of the loss is none")
        return value, int(steps)

    def fits(self, norm: Tensor) -> bool:
        """Whether gradients of this norm did not overflow; adapts the scale.

        Errors: TrainingError if they do at a scale of 1.
        """
        if norm.isfinite():
            self.steps += 1
            if self.grows and self.steps == _GROWS_AFTER:
                self.value, self.steps = 2 * self.value, 0
            return True
        if self.value <= 1:
            precision = "fp16" if self.grows else "this `precision`"
            raise TrainingError(
                f"The gradients became infinite or NaN, in {precision} without any scaling; nothing "
                "was stored, and the stack is unchanged. Use `precision` bf16 or fp32, or a lower "
                "`rate`."
            )
        self.value, self.steps = self.value / 2, 0
        return False
