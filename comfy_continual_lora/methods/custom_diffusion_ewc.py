"""`custom_diffusion_ewc`: Custom Diffusion, held by EWC.

source      row "CD + EWC" of Jha et al. 2025; EWC: Kirkpatrick et al. 2017 (arXiv 1612.00796),
            online form Schwarz et al. 2018 (arXiv 1805.06370)
equation    the loss of `custom_diffusion` + lambda sum F* (theta - theta*)^2;  F from the denoising
            loss
remembers   one Fisher per concept, as large as K and V
cost        `custom_diffusion` + 256 per-sample gradients per concept; the penalty is a few
            elementwise operations per step
deviations  those of `custom_diffusion` and of `lora_ewc`; figures here are of the mini-SD and other
            pictures, so only orders can be compared with the paper's
"""

from __future__ import annotations

from .custom_diffusion import CustomDiffusion
from .lora_ewc import LoraEwc


class CustomDiffusionEwc(LoraEwc, CustomDiffusion):
    id = "custom_diffusion_ewc"
