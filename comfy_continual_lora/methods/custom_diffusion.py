"""`custom_diffusion`: the whole K and V matrices and the word, learned in sequence.

source      Kumari et al. 2023 (arXiv 2212.04488)
equation    || eps - eps_theta(z_t, t, "a photo of a V_n <noun>") ||^2  over delta W_K, delta W_V
            and V_n, starting from those of concept n - 1
remembers   only the weights themselves
cost        as `lora`; the stored change is as large as K and V (19 M parameters for SD1.5, for each
            version kept for undo)
deviations  no prior-preservation images (only the concept's own images are used); weight decay
            pulls towards the checkpoint's weights, because delta is trained
"""

from __future__ import annotations

from ..settings import LearnSettings
from .method import Method


class CustomDiffusion(Method):
    id = "custom_diffusion"

    def adapter_kind(self, settings: LearnSettings) -> str:
        return "full"

    def takes(self, kind: str) -> bool:
        return kind == "lora"  # the setting's default, which it does not use
