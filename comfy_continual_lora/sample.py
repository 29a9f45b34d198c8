"""Stage 8: draw pictures with a backbone, its adapter and its words. The solvers are diffusers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from .checkpoint.backbone import Backbone, FrozenText
from .diffusion import BETA_END, BETA_START, TIMESTEPS
from .progress import OnProgress, Progress, ignore
from .settings import DrawSettings

BATCH = 8


def make_solver(name: str, backbone: Backbone) -> DDIMScheduler | DPMSolverMultistepScheduler:
    schedule = {
        "num_train_timesteps": TIMESTEPS, "beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear",
        "prediction_type": backbone.prediction,
    }  # fmt: skip
    if backbone.zero_snr:  # drawing has to begin where nothing is left of a picture
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if name == "ddim":
        return DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return DPMSolverMultistepScheduler(**schedule, steps_offset=1)


@torch.no_grad()
def draw(
    backbone: Backbone,
    words: Mapping[str, Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: DrawSettings,
    on_progress: OnProgress = ignore,
) -> Tensor:
    """One picture for each prompt and its seed, (n, 3, size, size) in -1..1; it does not depend on what is drawn beside it. `settings` are resolved.

    Classifier-free guidance (Ho & Salimans 2022): eps = eps(negative) + g (eps(prompt) - eps(negative)).
    """
    assert settings.guidance is not None
    size = (settings.size or backbone.size) // 8
    noise = torch.stack([torch.randn(4, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    text = FrozenText(backbone, words)
    features, unwanted = text(prompts), text([settings.negative])
    pictures, total = [], settings.steps * -(-len(seeds) // BATCH)
    for start in range(0, len(seeds), BATCH):
        solver = make_solver(settings.solver, backbone)
        solver.set_timesteps(settings.steps)
        latents = noise[start : start + BATCH].to(backbone.device) * solver.init_noise_sigma
        wanted = features[start : start + BATCH]
        for index, timestep in enumerate(solver.timesteps):
            t = timestep.to(backbone.device).expand(len(latents))
            if settings.guidance == 1:
                predicted = backbone.predict(latents, t, wanted)
            else:
                both = torch.cat([unwanted.expand_as(wanted), wanted])
                low, high = backbone.predict(torch.cat([latents] * 2), torch.cat([t] * 2), both).chunk(2)
                predicted = low + settings.guidance * (high - low)
            latents = solver.step(predicted, timestep, latents).prev_sample  # type: ignore[union-attr]
            on_progress(Progress("draw", start // BATCH * settings.steps + index + 1, total))
        pictures.append(backbone.decode_latents(latents))
    return torch.cat(pictures)
