"""`lora_ewc_dc`: sequential LoRA, held by EWC whose Fisher also covers what distinguishes concepts.

source      row "LoRA + EWC + DC" of Jha et al. 2025
equation    as `lora_ewc`, with F from  L_denoise(x, c_n) + CE(p(. | x) over c_k, one-hot c_n),
            p the Diffusion Classifier's scores
remembers   one Fisher per concept, as large as the LoRA; tau, one number per stack
cost        as `lora_ewc`, with k rows instead of one for each of the 256 samples
deviations  the paper does not give its tau; ours is calibrated (`classifier`), because tau = 1 on
            mean errors makes the term vanish; c_0 is the class noun
"""

from __future__ import annotations

from ..settings import ResolvedSettings
from .lora_ewc import LoraEwc
from .method import Rows


class LoraEwcDc(LoraEwc):
    id = "lora_ewc_dc"
    with_scores = True

    def rows(self, settings: ResolvedSettings, earlier: int) -> Rows:
        """The Fisher compares several concepts for each image."""
        step, most = super().rows(settings, earlier)
        return Rows(step, max(most, 2 + min(earlier, settings.subset - 2)))
