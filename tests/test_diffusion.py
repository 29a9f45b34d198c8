"""Stage 3: the schedule is SD's, the loss is one number per example."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.diffusion import (
    BETA_END,
    BETA_START,
    TIMESTEPS,
    add_noise,
    alphas_cumprod,
    generator_for,
    loss_per_example,
    random_batch,
    stratified,
    timestep_weight,
)


def test_schedule_and_noising_agree_with_diffusers() -> None:
    theirs = DDPMScheduler(beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear")
    assert torch.allclose(alphas_cumprod(), theirs.alphas_cumprod, rtol=1e-4)
    clean, noise, timestep = (
        torch.randn(3, 4, 8, 8),
        torch.randn(3, 4, 8, 8),
        torch.tensor([0, 500, 999]),
    )
    assert torch.allclose(
        add_noise(clean, noise, timestep, alphas_cumprod()),
        theirs.add_noise(clean, noise, timestep),
        atol=1e-4,
    )


def test_loss_is_the_mean_square_of_each_example() -> None:
    predicted, noise = (
        torch.zeros(2, 4, 2, 2),
        torch.stack([torch.ones(4, 2, 2), 3 * torch.ones(4, 2, 2)]),
    )
    assert loss_per_example(predicted, noise).tolist() == [1.0, 9.0]


def test_a_weight_leaves_out_what_it_is_zero_for() -> None:
    predicted, noise, weight = (
        torch.zeros(1, 4, 2, 2),
        torch.ones(1, 4, 2, 2),
        torch.zeros(1, 1, 2, 2),
    )
    noise[..., 0] = 5
    weight[..., 0] = 0.5
    assert loss_per_example(predicted, noise, weight).item() == 25
    assert (
        loss_per_example(predicted, noise, torch.ones(1, 1, 2, 2)).item()
        == loss_per_example(predicted, noise).item()
    )


def test_a_batch_takes_one_timestep_from_each_part_in_any_order() -> None:
    batches = [random_batch(torch.zeros(3, 4, 2, 2), 8, generator_for(n)) for n in range(400)]
    timesteps = torch.stack([timestep for _, _, timestep, _ in batches])
    assert torch.equal(timesteps.sort(1).values * 8 // TIMESTEPS, torch.arange(8).expand(400, 8))
    mean_by_place = timesteps.float().mean(0)
    assert mean_by_place.sub(TIMESTEPS / 2).abs().max() < 60
    assert {int(n) for pick, *_ in batches for n in pick} == {0, 1, 2}


def test_a_timestep_is_never_past_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest number below 1, as part of eight, is 1 in float32."""
    below = torch.nextafter(torch.ones(8), torch.zeros(8))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: below)
    assert int(stratified(8, torch.Generator()).max()) == 999


def test_a_batch_has_one_shape_and_every_picture_its_share() -> None:
    latents = [
        torch.full((4, *shape), float(n))
        for n, shape in enumerate([(2, 4), (2, 2), (2, 4), (4, 2), (2, 4)])
    ]
    seen = torch.zeros(5)
    for n in range(2000):
        pick, clean, _, noise = random_batch(latents, 3, generator_for(n))
        assert clean.shape == noise.shape
        assert clean[:, 0, 0, 0].tolist() == pick.tolist()
        seen += pick.bincount(minlength=5)
    assert (seen / seen.sum() - 1 / 5).abs().max() < 0.02


def test_debiased_errors_count_more_where_the_noise_hides_the_picture(backbone: Backbone) -> None:
    timestep = torch.tensor([0, 500, 999])
    assert timestep_weight(backbone, timestep, "uniform").tolist() == [1, 1, 1]
    expected = 1 / alphas_cumprod()[timestep].sqrt()
    assert torch.allclose(timestep_weight(backbone, timestep, "debiased"), expected)
    assert expected[2] > 10 * expected[0]
    assert timestep_weight(
        replace(backbone, prediction="v_prediction"), timestep, "debiased"
    ).tolist() == [1, 1, 1]
