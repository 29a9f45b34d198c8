"""Stage 3: the noise schedule, noising, the random draws of a batch, and the loss of each example.

T = 1000, betas linear in their square roots from 0.00085 to 0.012 (Rombach et al. 2022, arXiv
2112.10752). A net predicts the noise eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) z_0 (Salimans & Ho
2022, arXiv 2202.00512); some fine-tunes that predict v were trained on a schedule that ends in pure
noise (Lin et al. 2023, arXiv 2305.08891). Rectified-flow fine-tunes have z_t = (1 - t/T) z_0 +
t/T eps and predict eps - z_0 (Liu et al. 2022, arXiv 2209.03003).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from .checkpoint.backbone import Backbone
from .presets import BETA_END, BETA_START, TIMESTEPS

T = TypeVar("T")


@cache
def alphas_cumprod(zero_snr: bool = False, device: torch.device | None = None) -> Tensor:
    """a_t, the share of the signal's variance left at each timestep, (1000,) float32.

    With `zero_snr` none is left at the last. Cached: not to be changed in place.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    if zero_snr:
        # shift sqrt(a_t) to 0 at the end and rescale it to keep its start (Lin et al. 2023,
        # algorithm 1)
        roots = alphas.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return alphas.float().to(device)


def add_noise(clean: Tensor, noise: Tensor, timestep: Tensor, alphas: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps. clean, noise (n, c, h, w), timestep (n,)."""
    alpha = alphas[timestep].view(-1, 1, 1, 1)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def noised(
    backbone: Backbone, clean: Tensor, noise: Tensor, timestep: Tensor
) -> tuple[Tensor, Tensor]:
    """z_t and the target of the prediction; all (n, c, h, w), timestep (n,)."""
    if backbone.prediction == "flow_prediction":
        share = (timestep / TIMESTEPS).view(-1, 1, 1, 1)
        return (1 - share) * clean + share * noise, noise - clean
    alphas = alphas_cumprod(backbone.zero_snr, clean.device)
    noisy = add_noise(clean, noise, timestep, alphas)
    if backbone.prediction == "epsilon":
        return noisy, noise
    alpha = alphas[timestep].view(-1, 1, 1, 1)
    return noisy, alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def loss_per_example(predicted: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The squared error of the prediction averaged over c, h, w, in float32: (n,).

    With `weight` (n, 1, h, w) it is the weighted average.
    """
    error = (predicted.float() - target.float()).square()
    if weight is None:
        return error.flatten(1).mean(1)
    return (error * weight).flatten(1).mean(1) / weight.flatten(1).mean(1)


def timestep_weight(backbone: Backbone, timestep: Tensor, weighting: str | None) -> Tensor:
    """The weight of an error at each timestep, (n,): 1 if "uniform", 1 / sqrt(a_t) if "debiased".

    The latter weighs high noise more, where an image's shapes and colours are decided and the error
    of eps is smallest. After Yu et al. 2023 (arXiv 2310.08442), whose 1 / sqrt(SNR) gives next to
    nothing to the details. Errors of v and of a flow are larger there anyway, and are left alone.
    """
    if weighting != "debiased" or backbone.prediction != "epsilon":
        return torch.ones(len(timestep), device=timestep.device)
    return alphas_cumprod(backbone.zero_snr, timestep.device)[timestep].rsqrt()


def generator_for(*keys: object) -> torch.Generator:
    """A generator that is a function of its keys, such as (seed, step).

    A resumed run therefore draws what an uninterrupted one would.
    """
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def one_of(choices: Sequence[T], generator: torch.Generator) -> T:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `n` equal parts of 0..T-1, in random order, (n,).

    They are uniform, with less variance than independent draws.
    """
    parts = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    timestep = (parts * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)  # float32 may round up to 1
    return timestep[torch.randperm(n, generator=generator)]


def random_batch(
    latents: Sequence[Tensor], n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw n of the latents: their indices (n,), latents (n, c, h, w), timesteps (n,), noise.

    All are on the latents' device. A batch has latents of one shape; every latent is drawn equally
    often.
    """
    first = torch.randint(len(latents), (1,), generator=generator)
    alike = torch.tensor(
        [i for i, latent in enumerate(latents) if latent.shape == latents[int(first)].shape]
    )
    pick = torch.cat([first, alike[torch.randint(len(alike), (n - 1,), generator=generator)]])
    timestep = stratified(n, generator)
    clean = torch.stack([latents[int(i)] for i in pick])
    noise = torch.randn(clean.shape, generator=generator)
    return pick.to(clean.device), clean, timestep.to(clean.device), noise.to(clean.device)
