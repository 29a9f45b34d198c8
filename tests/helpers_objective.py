"""The mini-SD as a net of another objective: an exact change of variables around its prediction of
the noise, so that it is trained and yet predicts v or a flow.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.diffusion import alphas_cumprod


class _Changed(nn.Module):
    """A U-Net that answers in another objective; its layers have their own names."""

    def __init__(self, unet: nn.Module, prediction: str) -> None:
        super().__init__()
        self._modules = unet._modules
        self.config, self._unet, self._prediction = unet.config, [unet], prediction
        self.dtype = torch.float32

    def forward(self, noisy: Tensor, timestep: Tensor, features: Tensor, **rest: Any) -> Any:
        unet, rows = self._unet[0], timestep.reshape(-1).expand(len(noisy))
        alphas = alphas_cumprod(False, noisy.device)
        if self._prediction == "v_prediction":
            alpha = alphas[rows.long()].view(-1, 1, 1, 1)
            noise = unet(noisy, rows, features, **rest).sample
            changed = (noise - (1 - alpha).sqrt() * noisy) / alpha.sqrt()
        else:
            # the timestep whose ratio of noise to signal is the flow's, between two of the schedule
            share = (rows.float() / 1000).clamp(1e-3, 1 - 1e-3)
            ratios = ((1 - alphas) / alphas).sqrt()
            wanted = (share / (1 - share)).clamp(ratios[0], ratios[-1])
            above = torch.searchsorted(ratios, wanted).clamp(1, 999)
            low, high = ratios[above - 1], ratios[above]
            exact = above - 1 + (wanted - low) / (high - low)
            share = (wanted / (1 + wanted)).view(-1, 1, 1, 1)
            scaled = noisy / ((1 - share).square() + share.square()).sqrt()
            noise = unet(scaled, exact, features, **rest).sample
            changed = (noise - noisy) / (1 - share)
        return SimpleNamespace(sample=changed)


def predicting(backbone: Backbone, prediction: str) -> Backbone:
    """The same checkpoint, whose net now predicts this in place of the noise."""
    return replace(
        backbone,
        unet=_Changed(backbone.unet, prediction),  # type: ignore[arg-type]
        prediction=prediction,
    )
