"""Gradients that overflow in fp16 cost a step, not the run; what can't be mended is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from comfy_continual_lora.errors import TrainingError
from comfy_continual_lora.lossscale import LossScale
from comfy_continual_lora.settings import LearnSettings
from comfy_continual_lora.training import Run, optimizer_for

Loss = Callable[[nn.Parameter, int], Tensor]


def make_run(path: Path, steps: int, dtype: torch.dtype, rate: float = 0.01) -> Run:
    settings = replace(LearnSettings().resolved("mini"), snapshot_every=3, warmup=0, rate=rate)
    value = nn.Parameter(torch.ones(1))
    optimizer = optimizer_for([{"params": [value], "lr": rate}], settings)
    asked = {"token": "V1"}
    return Run("learn", {"v": value}, optimizer, settings, steps, LossScale(dtype), path, asked)


def train(run: Run, loss: Loss, stop: int = 0) -> list[float]:
    values = []

    def report(_: object) -> None:
        values.append(float(run.parameters["v"].detach()))
        if run.step == stop:
            raise KeyboardInterrupt

    run.train(lambda step, _: {"loss": loss(run.parameters["v"], step)}, 1, report)
    return values


def steep(value: nn.Parameter, step: int) -> Tensor:
    """Its gradient in fp16 is 200 at a scale of 1: with 1,024 it overflows."""
    return (value.half() * 200).float().square().sum() / 400


def test_a_step_that_overflows_is_left_out_and_the_scale_halved(tmp_path: Path) -> None:
    run = make_run(tmp_path / "s", 8, torch.float16)
    values = train(run, steep)
    left_out = sum(a == b for a, b in zip([1.0, *values], values, strict=False))
    assert left_out == 2
    assert run.scale.value == 256
    assert values[-1] < 1 - 0.01 * 5
    assert len(run.losses) == 8


def test_the_scale_is_part_of_the_snapshot(tmp_path: Path) -> None:
    whole = train(make_run(tmp_path / "a", 8, torch.float16), steep)
    with pytest.raises(KeyboardInterrupt):
        train(make_run(tmp_path / "b", 8, torch.float16), steep, stop=3)
    resumed = make_run(tmp_path / "b", 8, torch.float16)
    assert train(resumed, steep) == whole[3:]
    assert resumed.scale.value == 256


def test_a_scale_that_fits_grows() -> None:
    scale, small = LossScale(torch.float16), torch.ones(())
    assert all(scale.fits(small) for _ in range(4000))
    assert scale.value == 4096
    assert LossScale(torch.bfloat16).value == 1
    assert all(not scale.fits(small / 0) for _ in range(12))
    assert scale.value == 1
    with pytest.raises(TrainingError, match=r"fp16 without any scaling.*unchanged.*bf16 or fp32"):
        scale.fits(small / 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_that_are_never_finite_stop_the_run(tmp_path: Path, dtype: torch.dtype) -> None:
    run = make_run(tmp_path / "s", 30, dtype)
    with pytest.raises(TrainingError, match="gradients became infinite or NaN"):
        train(run, lambda value, _: (value - value.detach()).abs().sqrt().sum())
    assert float(run.parameters["v"].detach()) == 1
    assert not (run.step and dtype == torch.float32)


def growing(value: nn.Parameter, step: int) -> Tensor:
    return (value.square() * 0 + 2.0**step).sum()


@pytest.mark.parametrize(("steps", "end"), [(100, 10), (8, 8)])
def test_a_run_that_diverges_is_stopped(tmp_path: Path, steps: int, end: int) -> None:
    run = make_run(tmp_path / "s", steps, torch.float32)
    message = rf"diverged: at step {end} .* first step's was 1\. .*unchanged\. Use a lower rate"
    with pytest.raises(TrainingError, match=message):
        train(run, growing)
    assert not (tmp_path / "s").exists()


def test_the_snapshot_of_a_run_that_diverged_is_not_gone_on_with(tmp_path: Path) -> None:
    run = make_run(tmp_path / "s", 20, torch.float32)
    run.step, run.losses = 20, [0.1, *[11.0] * 19]
    run.save()
    with pytest.raises(TrainingError, match="diverged: at step 20"):
        train(make_run(tmp_path / "s", 20, torch.float32), growing)


def test_a_loss_within_its_noise_is_fine(tmp_path: Path) -> None:
    train(make_run(tmp_path / "s", 30, torch.float32), lambda v, step: (v * 0 + (step % 10)).sum())
