"""Stage 3: noise schedule, noising, the random draws of a batch, and the loss, one number per example.

SD1.x: T = 1000, betas linear in their square roots from 0.00085 to 0.012 (Rombach et al. 2022, arXiv 2112.10752).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def alphas_cumprod() -> Tensor:
    """Share of the signal's variance left at each timestep, (1000,) float32."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def add_noise(clean: Tensor, noise: Tensor, timestep: Tensor, alphas: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps. clean, noise (n, 4, h, w), timestep (n,)."""
    alpha = alphas[timestep].view(-1, 1, 1, 1)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def loss_per_example(predicted: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """|| eps - eps_theta ||^2 averaged over c, h, w, in float32: (n,). With `weight` (n, 1, h, w) it is the weighted average."""
    error = (predicted.float() - noise.float()).square()
    if weight is None:
        return error.flatten(1).mean(1)
    return (error * weight).flatten(1).mean(1) / weight.flatten(1).mean(1)


def generator_for(*keys: object) -> torch.Generator:
    """A generator that is a function of its keys, such as (seed, step): a run that goes on draws what an undisturbed one would."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def one_of(choices: Sequence[T], generator: torch.Generator) -> T:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def random_batch(latents: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Which latents (n,), at which timesteps (n,), with which noise (n, 4, h, w); all on the latents' device."""
    pick = torch.randint(len(latents), (n,), generator=generator)
    timestep = torch.randint(TIMESTEPS, (n,), generator=generator)
    noise = torch.randn((n, *latents.shape[1:]), generator=generator)
    return pick.to(latents.device), timestep.to(latents.device), noise.to(latents.device)
