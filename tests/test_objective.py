"""Noise, v and flow: each is learned and drawn by its own rule, and a wrong one is noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_objective import predicting

from comfy_continual_lora import objective, pipeline, sample
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.concepts import load_images
from comfy_continual_lora.diffusion import alphas_cumprod, noised
from comfy_continual_lora.errors import StackError
from comfy_continual_lora.mini import world
from comfy_continual_lora.objective import doubt, relative_errors
from comfy_continual_lora.presets import PREDICTIONS
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.requests import DrawRequest, LearnRequest
from comfy_continual_lora.settings import DrawSettings, LearnSettings
from comfy_continual_lora.store import open_stack, stack_path

NAMES = list(PREDICTIONS)


@pytest.fixture
def latents(mini: Backbone, tmp_path: Path) -> list[torch.Tensor]:
    files = world.save_pictures(world.concepts("development")[1], tmp_path / "teapot")
    return mini.encode_images(load_images(files, 128).images)


def test_a_flow_goes_straight_from_the_picture_to_the_noise(backbone: Backbone) -> None:
    flow = replace(backbone, prediction="flow_prediction")
    clean, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    noisy, target = noised(flow, clean, noise, torch.tensor([0, 250, 999]))
    torch.testing.assert_close(noisy[0], clean[0])
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
    torch.testing.assert_close(target, noise - clean)


@pytest.mark.parametrize("name", NAMES)
def test_the_right_objective_fits_far_better_and_another_is_told(
    mini: Backbone, latents: list[torch.Tensor], name: str
) -> None:
    right = predicting(mini, PREDICTIONS[name]) if name != "epsilon" else mini
    errors = relative_errors(right, latents, "a photo of a teapot")
    assert min(errors, key=lambda one: errors[one]) == name
    assert doubt(right, latents, "a photo of a teapot") == ""
    for wrong in set(NAMES) - {name}:
        if (name, wrong) == ("flow", "v"):  # too much alike
            continue
        note = doubt(replace(right, prediction=PREDICTIONS[wrong]), latents, "a photo of a teapot")
        assert f"`prediction` set to {wrong}, but" in note
        assert f"start again with `prediction` set to {name}" in note


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_right_objective_is_judged_by_its_own_noisy_pictures(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, zero_snr: bool
) -> None:
    clean = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    right = replace(backbone, prediction="v_prediction", declares_zero_snr=zero_snr)

    def knowing(noisy: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        alpha = alphas_cumprod(right.zero_snr)[timestep].view(-1, 1, 1, 1)
        return (alpha.sqrt() * noisy - clean) / (1 - alpha).sqrt()

    monkeypatch.setattr(right, "predict", knowing)
    errors = relative_errors(right, [clean], "a photo of a teapot")
    assert errors["v"] < 1e-6
    assert min(errors["epsilon"], errors["flow"]) > 1e-3


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("ChenkinNoob-XL-V0.2-Rectified-Flow.safetensors", True),
        ("noobai_rf_v03.safetensors", True),
        ("sdxl-flow.safetensors", True),
        ("workflow-mix.safetensors", False),
        ("overflow.safetensors", False),
        ("surf.safetensors", False),
    ],
)
def test_a_name_that_says_flow_is_asked_about_if_the_pictures_do_not_decide(
    backbone: Backbone, file: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = replace(backbone, path=Path(file))
    errors = {"epsilon": 0.1, "v": 0.2, "flow": 0.12}
    monkeypatch.setattr(objective, "relative_errors", lambda *_: errors)
    note = doubt(named, [], "a photo of a ball")
    assert ("is called a rectified flow" in note) == told
    errors["flow"] = 0.2  # the pictures decide
    assert doubt(named, [], "a photo of a ball") == ""
    errors["epsilon"] = 0.2
    assert doubt(replace(named, prediction="flow_prediction"), [], "a photo of a ball") == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v", "flow"])
def test_the_same_net_draws_the_same_picture_whatever_it_predicts(
    mini: Backbone, name: str
) -> None:
    settings = DrawSettings(steps=60, solver="ddim", flow_shift=1.0).resolved(mini.preset)
    prompt = ["a photo of a red teapot on grass"]
    plain = sample.draw(mini, {}, prompt, [4], settings)
    other = sample.draw(predicting(mini, PREDICTIONS[name]), {}, prompt, [4], settings)
    unlike = sample.draw(mini, {}, prompt, [5], settings)
    near, far = ((one - plain).abs().mean() for one in (other, unlike))
    assert near < (1e-3 if name == "v" else far / 2)


def test_a_stack_keeps_its_objective(checkpoint: Path, pictures: Path) -> None:
    settings = LearnSettings(method="lora", steps=2)
    request = LearnRequest(checkpoint, pictures, "V1", "ball", settings, prediction="flow")
    pipeline.learn_concept(request)
    assert open_stack(stack_path(checkpoint)).checkpoint.prediction == "flow_prediction"
    with pytest.raises(
        StackError, match=r"learned with prediction flow, not epsilon\. Leave it out"
    ):
        pipeline.draw(DrawRequest(checkpoint, ["a V1 ball"], prediction="epsilon"))
    draw = DrawSettings(steps=2)
    own, asked = (
        pipeline.draw(DrawRequest(checkpoint, ["a V1 ball"], draw, prediction=one)).pictures[0]
        for one in ("auto", "flow")
    )
    assert own.image.tobytes() == asked.image.tobytes()
    assert "Sampler: Euler," in own.texts["parameters"]
    assert "Shift: 6.0," in own.texts["parameters"]
    assert json.loads(own.texts["continual_lora"])["prediction"] == "flow"
    again = LearnRequest(checkpoint, pictures, "V2", "ball", settings)
    pipeline.learn_concept(again)
    assert open_stack(stack_path(checkpoint)).checkpoint.prediction == "flow_prediction"


def test_learning_tells_of_a_wrong_objective_before_it_starts(
    mini_file: Path, tmp_path: Path
) -> None:
    files = world.save_pictures(world.concepts("development")[1], tmp_path / "teapot")
    told: list[Progress] = []
    settings = LearnSettings(method="textual_inversion", steps=1)
    stack = tmp_path / "v.concepts.safetensors"
    request = LearnRequest(mini_file, files, "V1", "teapot", settings, stack=stack, prediction="v")
    pipeline.learn_concept(request, told.append)
    (at,) = (n for n, one in enumerate(told) if "far better" in one.note)
    assert at < next(n for n, one in enumerate(told) if one.stage == "learn")


@pytest.mark.parametrize(
    ("prediction", "weighting", "expected"),
    [("flow", "debiased", 1), ("v", None, 0), ("epsilon", "debiased", 0)],
)
def test_a_weighting_that_a_net_does_not_have_is_told(
    checkpoint: Path, pictures: Path, prediction: str, weighting: str | None, expected: int
) -> None:
    told: list[Progress] = []
    settings = LearnSettings(
        method="textual_inversion", steps=1, batch=1, size=64, weighting=weighting
    )
    request = LearnRequest(checkpoint, pictures, "V1", "ball", settings, prediction=prediction)
    pipeline.learn_concept(request, told.append)
    note = f"predicts {prediction}, so all timesteps weigh the same"
    assert sum(note in one.note for one in told) == expected
