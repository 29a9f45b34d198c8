"""Stage 8: draw pictures with a backbone, its adapter and its words, with diffusers' solvers.

Two learned things named in one prompt mix their looks, because text features mix. Prompts side by
side do not: each has its own area of the image, as large as one image, and where areas overlap,
their predictions are blended at every step, so that they become one scene.
Source: Bar-Tal et al. 2023 (MultiDiffusion, arXiv 2302.08113).
"""

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
OVERLAP = 0.25  # of an area's side


def make_solver(name: str, backbone: Backbone) -> DDIMScheduler | DPMSolverMultistepScheduler:
    schedule = {
        "num_train_timesteps": TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": backbone.prediction,
    }
    if backbone.zero_snr:  # sampling has to start at the last timestep, in pure noise
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if name == "ddim":
        return DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return DPMSolverMultistepScheduler(**schedule, steps_offset=1)


@torch.no_grad()
def draw(
    backbone: Backbone,
    words: Mapping[str, Tensor],
    prompts: Sequence[str | Sequence[str]],
    seeds: Sequence[int],
    settings: DrawSettings,
    on_progress: OnProgress = ignore,
) -> Tensor:
    """One picture for each prompt and its seed, (n, 3, size, size) in -1..1; `settings` are resolved.

    A picture does not depend on the others in the batch. Several prompts for a picture (equally many
    for all) are drawn from left to right, each in an area of its own: (n, 3, size, width).
    Classifier-free guidance (Ho & Salimans 2022): eps = eps(negative) + g (eps(prompt) -
    eps(negative)).
    """
    assert settings.guidance is not None
    areas = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
    size, count = (settings.size or backbone.size) // 8, len(areas[0])
    shares, sides = _areas(size, count)
    noise = torch.stack(
        [
            torch.randn(4, size, shares.shape[1], generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )
    text = FrozenText(backbone, words)
    negative = text([settings.negative])
    shares = shares.to(backbone.device)
    batch = max(1, BATCH // count)
    pictures = []
    total = settings.steps * -(-len(seeds) // batch)
    for start in range(0, len(seeds), batch):
        solver = make_solver(settings.solver, backbone)
        solver.set_timesteps(settings.steps)
        latents = noise[start : start + batch].to(backbone.device) * solver.init_noise_sigma
        positive = text([parts[k] for k in range(count) for parts in areas[start : start + batch]])
        for index, timestep in enumerate(solver.timesteps):
            seen = torch.cat([latents[..., side] for side in sides])
            t = timestep.to(backbone.device).expand(len(seen))
            if settings.guidance == 1:
                predicted = backbone.predict(seen, t, positive)
            else:
                both = torch.cat([negative.expand_as(positive), positive])
                rows = backbone.predict(torch.cat([seen] * 2), torch.cat([t] * 2), both)
                low, high = rows.chunk(2)
                predicted = low + settings.guidance * (high - low)
            joined = torch.zeros_like(latents)
            for share, side, own in zip(shares, sides, predicted.chunk(count), strict=True):
                joined[..., side] += share[side] * own
            latents = solver.step(joined, timestep, latents).prev_sample  # type: ignore[union-attr]
            on_progress(Progress("draw", start // batch * settings.steps + index + 1, total))
        pictures.append(backbone.decode_latents(latents))
    return torch.cat(pictures)


def _areas(size: int, count: int) -> tuple[Tensor, list[slice]]:
    """Each area's weight at each column of the latents, (count, width), and its columns.

    The weights of a column sum to 1.
    """
    overlap = int(size * OVERLAP)
    sides = [slice(k * (size - overlap), k * (size - overlap) + size) for k in range(count)]
    column = torch.arange(size)
    fading = torch.minimum(column + 1, size - column).clamp(max=overlap + 1).float()
    shares = torch.zeros(count, sides[-1].stop)
    for share, side in zip(shares, sides, strict=True):
        share[side] = fading
    return shares / shares.sum(0), sides
