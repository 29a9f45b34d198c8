"""Stage 2: is a checkpoint taught by the objective it was trained by? Its file can't always tell: a
rectified-flow fine-tune of SDXL looks like one that predicts noise.

in: a backbone and the latents of the pictures - out: how well each objective fits, and a note if
another fits far better.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .checkpoint.backbone import Backbone
from .diffusion import alphas_cumprod, generator_for, noised
from .presets import PREDICTION_NAMES, PREDICTIONS, TIMESTEPS

_TRIED = (50, 200, 350, 500, 650, 800, 950)  # timesteps
_MOST = 2  # pictures
# How many times larger than the best an error has to be. On the mini-SD and exact changes of it to v
# and flow, with pictures of its world and photographs: 1.6 to 15 for a wrong objective, but 1.04 to
# 1.6 for a flow that is taken for v; the right one was the best in all 36 cases.
_FAR = 1.4
_FLOW = re.compile(r"rectified|(?<![a-z])(rf|flow)(?![a-z])", re.IGNORECASE)


@torch.no_grad()
def relative_errors(backbone: Backbone, latents: Sequence[Tensor], prompt: str) -> dict[str, float]:
    """By objective, the squared error of the noise that the prediction stands for: the geometric mean
    over a few pictures and timesteps, because one timestep's error is a hundred times another's.

    Errors of the predictions themselves can't be compared: their targets differ. latents (c, h, w).
    """
    timestep = torch.tensor(_TRIED, device=backbone.device)
    features = backbone.encode_prompts([prompt]).expand(len(_TRIED), -1, -1)
    errors: dict[str, list[Tensor]] = {name: [] for name in PREDICTIONS}
    for number, latent in enumerate(latents[:_MOST]):
        clean = latent.expand(len(_TRIED), -1, -1, -1)
        noise = torch.randn(clean.shape, generator=generator_for("objective", number))
        noise = noise.to(backbone.device)
        predicted: dict[tuple[bool, bool], Tensor] = {}  # by what the noisy picture depends on
        for name, prediction in PREDICTIONS.items():
            judged = replace(backbone, prediction=prediction)
            noisy, _ = noised(judged, clean, noise, timestep)
            schedule = name == "flow", judged.zero_snr
            if schedule not in predicted:
                predicted[schedule] = backbone.predict(noisy, timestep, features)
            implied = _noise(judged, noisy, predicted[schedule], timestep)
            errors[name].append((implied - noise).square().flatten(1).mean(1).log())
    return {name: float(torch.cat(own).mean().exp()) for name, own in errors.items()}


def _noise(backbone: Backbone, noisy: Tensor, predicted: Tensor, timestep: Tensor) -> Tensor:
    """The noise that a prediction stands for; all (n, c, h, w), timestep (n,)."""
    if backbone.prediction == "epsilon":
        return predicted
    if backbone.prediction == "flow_prediction":
        return noisy + (1 - timestep / TIMESTEPS).view(-1, 1, 1, 1) * predicted
    alpha = alphas_cumprod(backbone.zero_snr, noisy.device)[timestep].view(-1, 1, 1, 1)
    return alpha.sqrt() * predicted + (1 - alpha).sqrt() * noisy


def doubt(backbone: Backbone, latents: Sequence[Tensor], prompt: str) -> str:
    """The note if another objective fits these pictures far better, or the checkpoint's name says
    that it is a flow and the pictures don't deny it; empty if all is well.
    """
    errors = relative_errors(backbone, latents, prompt)
    chosen = PREDICTION_NAMES[backbone.prediction]
    best = min(errors, key=lambda name: errors[name])
    if errors[best] * _FAR < errors[chosen]:
        return (
            f"The checkpoint is taught with `prediction` set to {chosen}, but your pictures fit {best} "
            f"far better ({errors[chosen] / errors[best]:.1f} times smaller errors). Unless it draws "
            f"well as it is, stop, and start again with `prediction` set to {best}."
        )
    denied = errors[chosen] * _FAR <= errors["flow"]
    if chosen != "flow" and not denied and _FLOW.search(backbone.path.name):
        return (
            f"{backbone.path.name} is called a rectified flow, but is taught with `prediction` set to "
            f"{chosen}. If it is one, start again with `prediction` set to flow."
        )
    return ""
