"""Stage 8: a picture depends on its prompt and seed, not on what is drawn beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from comfy_continual_lora import pipeline, requests, sample
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.stable import StableBackbone
from comfy_continual_lora.errors import Cancelled, CheckpointError, SettingError
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import DrawSettings, LearnSettings

QUICK = DrawSettings(steps=3, size=64).resolved("mini")


@pytest.mark.parametrize("solver", ["dpm++", "ddim"])
def test_a_picture_does_not_depend_on_its_neighbours(backbone: Backbone, solver: str) -> None:
    settings = replace(QUICK, solver=solver)
    prompts = ["a red mug"] * 9 + ["a blue star"]  # more than one batch
    many = sample.draw(backbone, {}, prompts, range(10), settings)
    alone = sample.draw(backbone, {}, ["a blue star"], [9], settings)
    assert many.shape == (10, 3, 64, 64)
    assert torch.allclose(many[9], alone[0], atol=1e-3)
    assert not torch.allclose(many[0], many[1], atol=0.05)


def test_guidance_of_one_is_the_conditional_prediction_alone(backbone: Backbone) -> None:
    plain, nearly = (
        sample.draw(backbone, {}, ["a red mug"], [0], replace(QUICK, guidance=g))
        for g in (1, 1.0001)
    )
    assert torch.allclose(plain, nearly, atol=5e-3)


def test_things_beside_each_other_keep_to_their_areas(mini: Backbone) -> None:
    red, blue = "a photo of a red ball on grass", "a photo of a blue box on grass"
    settings = replace(QUICK, steps=10, size=128)
    drawn = sample.draw(mini, {}, [(red, blue), (blue, red)], [0, 1], settings)
    assert drawn.shape == (2, 3, 128, 224)
    things = drawn[:, :, 40:90].mean(2)  # on grass the middle rows are theirs
    left, right = things[..., :96].mean(-1), things[..., -96:].mean(-1)
    redness_left, redness_right = (side[:, 0] - side[:, 2] for side in (left, right))
    assert redness_left[0] > redness_right[0] + 0.1
    assert redness_right[1] > redness_left[1] + 0.1


def test_pictures_with_unequally_many_areas_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(
        SettingError, match=r"the same number of prompts side by side; these have \[1, 2\]"
    ):
        pipeline.draw(requests.DrawRequest(Path("not there"), ["a mug", ("a mug", "a star")]))


def test_one_area_is_the_whole_picture(backbone: Backbone) -> None:
    one, listed = (
        sample.draw(backbone, {}, prompts, [0], QUICK)
        for prompts in (["a red mug"], [["a red mug"]])
    )
    assert torch.equal(one, listed)


def test_the_areas_of_a_picture_share_it() -> None:
    shares, sides = sample._areas(16, 3)
    assert shares.shape == (3, 16 + 12 + 12)
    assert torch.allclose(shares.sum(0), torch.ones(40))
    for share, side in zip(shares, sides, strict=True):
        outside = torch.ones(40, dtype=torch.bool)
        outside[side] = False
        assert not share[outside].any()
    assert shares[0, :12].eq(1).all()
    assert shares[0, 12:16].diff().lt(0).all()


def test_drawing_can_be_cancelled(backbone: Backbone) -> None:
    def stop(progress: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        sample.draw(backbone, {}, ["a red mug"], [0], QUICK, stop)


@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [
        ("epsilon", False),
        ("v_prediction", False),
        ("v_prediction", True),
        ("flow_prediction", False),
    ],
)
@pytest.mark.parametrize("solver", ["dpm++", "ddim"])
@pytest.mark.parametrize("steps", [2, 25, 999, 1000])
def test_a_net_that_knows_the_picture_draws_it_in_any_number_of_steps(
    backbone: Backbone, prediction: str, zero_snr: bool, solver: str, steps: int
) -> None:
    knowing = replace(backbone, prediction=prediction, declares_zero_snr=zero_snr)
    settings = DrawSettings(steps=steps, solver=solver, flow_shift=6.0)
    sampler: Any = sample.make_solver(settings, knowing)
    sampler.set_timesteps(steps)
    timesteps = sampler.timesteps.tolist()
    assert len({*timesteps}) == steps
    assert 0 <= min(timesteps) <= max(timesteps) <= 1000
    picture = torch.linspace(-1, 1, 64).view(1, 4, 4, 4)
    latents = noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep in sampler.timesteps:
        if prediction == "flow_prediction":
            answer = noise - picture
        else:
            alpha = sampler.alphas_cumprod[int(timestep)]
            answer = eps = (latents - alpha.sqrt() * picture) / (1 - alpha).sqrt()
            if prediction == "v_prediction":
                answer = alpha.sqrt() * eps - (1 - alpha).sqrt() * picture
        latents = sampler.step(answer, timestep, latents).prev_sample
    # DDIM ends at the first timestep, where a little noise is left
    assert torch.allclose(latents, picture, atol=0.2 if solver == "ddim" else 1e-4)


@pytest.mark.parametrize(
    ("part", "value"), [("_answer", math.nan), ("_answer", -math.inf), ("_to_picture", math.nan)]
)
def test_what_is_not_finite_is_an_error_and_no_black_picture(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: float
) -> None:
    intact = getattr(StableBackbone, part)
    monkeypatch.setattr(StableBackbone, part, lambda *given: intact(*given) * value)
    request = requests.DrawRequest(
        checkpoint,
        ["a red mug"],
        DrawSettings(steps=2, size=64),
        out=tmp_path / "out",
        device="cpu",
    )
    with pytest.raises(CheckpointError, match="can't draw 'a red mug': it came out as") as refused:
        pipeline.draw(request)
    assert str(checkpoint) in str(refused.value)
    assert not [*tmp_path.rglob("*.png")]


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(SettingError, match="solver is 'euler'; it has to be one of"):
        DrawSettings(solver="euler").check()
    with pytest.raises(SettingError, match="steps is 0; the range is 1 to 1000"):
        DrawSettings(steps=0).check()
    with pytest.raises(SettingError, match="size is 100; it has to be a multiple of 8 pixels"):
        DrawSettings(size=100).check()
    with pytest.raises(SettingError, match=r"seed is .*; the range is 0 to"):
        DrawSettings(seed=2**63 - 2, count=3).check()


@pytest.mark.parametrize(
    ("settings", "prediction", "expected"),
    [
        (DrawSettings(flow_shift=3.0), "auto", ["The flow shift is for"]),
        (DrawSettings(flow_shift=3.0), "flow", []),
        (DrawSettings(negative="blurry", guidance=1.0), "auto", ["The negative prompt changes"]),
        (DrawSettings(negative="blurry"), "auto", []),
    ],
)
def test_a_setting_that_changes_nothing_is_told(
    checkpoint: Path, settings: DrawSettings, prediction: str, expected: list[str]
) -> None:
    notes: list[str] = []
    settings = replace(settings, steps=1, size=64)
    request = requests.DrawRequest(checkpoint, ["a mug"], settings, prediction=prediction)
    pipeline.draw(request, lambda progress: notes.append(progress.note))
    told = [note for note in notes if "changes nothing" in note]
    assert len(told) == len(expected)
    assert all(note.startswith(begin) for note, begin in zip(told, expected, strict=True))


# --- the picture's size, and what its file says --------------------------------------------------


def test_width_and_height_go_before_the_size(backbone: Backbone) -> None:
    wide = replace(QUICK, width=96, height=72)
    assert sample.draw(backbone, {}, ["a red mug"], [0], wide).shape == (1, 3, 72, 96)
    tall = replace(QUICK, height=96)
    assert sample.draw(backbone, {}, ["a red mug"], [0], tall).shape == (1, 3, 96, 64)
    both = sample.draw(backbone, {}, [("a red mug", "a star")], [0], wide)
    assert both.shape == (1, 3, 72, 96 + 72)
    square = replace(QUICK, width=64, height=64)
    assert torch.equal(*(sample.draw(backbone, {}, ["a mug"], [0], s) for s in (QUICK, square)))


def test_things_are_kept_apart_in_a_wide_picture(learned: Callable[..., Path]) -> None:
    checkpoint = learned(LearnSettings(method="lora", steps=1, batch=1, rank=2), "V1", "V2")
    settings = DrawSettings(steps=2, width=96, height=64)
    request = requests.DrawRequest(checkpoint, ["a V1 ball and a V2 fish"], settings, device="cpu")
    (drawn,) = pipeline.draw(request).pictures
    assert drawn.image.size == (96, 64)


# AUTOMATIC1111's rule for the last line of a PNG's text, and ComfyUI's for where it begins
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def test_a_png_says_how_it_was_drawn(learned: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = learned(LearnSettings(method="lora", steps=1, batch=1, rank=2), "V1", "V2")
    settings = DrawSettings(steps=2, width=72, height=64, seed=7, negative="blur, Steps: 9")
    request = requests.DrawRequest(
        checkpoint, ["a V1 ball,\nat night 夜"], settings, ["V1"], tmp_path / "out", device="cpu"
    )
    (file,) = pipeline.draw(request).files
    assert file.name == "a-V1-ball-at-night-夜-7.png"
    with Image.open(file) as picture:
        texts: dict[str, str] = picture.text  # type: ignore[attr-defined]
    prompt, negative, last = texts["parameters"].split("\n")
    assert prompt == "a V1 ball, at night 夜"
    assert negative == "Negative prompt: blur, Steps: 9"
    pairs = dict(_PAIR.findall(last))
    assert pairs["Steps"] == "2"
    assert (pairs["Sampler"], pairs["CFG scale"]) == ("DPM++ 2M", "4.0")
    assert pairs["Schedule type"] == "SGM Uniform"
    assert (pairs["Seed"], pairs["Size"], pairs["Model"]) == ("7", "72x64", "mini")
    assert (pairs["Concepts"], pairs["Concept stack"]) == ("V1 ball", "mini version 2")
    everything = json.loads(texts["continual_lora"])
    assert everything["prompts"] == ["a V1 ball,\nat night 夜"]
    assert DrawSettings(**everything["settings"]) == settings.resolved("mini")
    assert (everything["only"], everything["version"]) == (["V1"], 2)
    assert pipeline.draw(request).files[0].name == "a-V1-ball-at-night-夜-7-1.png"
    assert not {"prompt", "workflow"} & texts.keys()  # a graph that did not draw it would be a lie


@pytest.mark.parametrize("steps", [2, 25, 50])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_schedule_is_the_one_that_the_png_names(steps: int, zero_snr: bool) -> None:
    """AUTOMATIC1111's SGM Uniform (1.10, modules/sd_schedulers.py): even steps from the last timestep,
    without the last of them.
    """
    net: Any = SimpleNamespace(prediction="epsilon", zero_snr=zero_snr)
    solver = sample.make_solver(DrawSettings(steps=steps), net)
    solver.set_timesteps(steps)
    theirs = torch.linspace(999, 0, steps + 1)[:-1]
    assert torch.allclose(solver.timesteps.float(), theirs, rtol=0, atol=1)


def test_a_png_drawn_without_a_stack_names_none(checkpoint: Path, tmp_path: Path) -> None:
    settings = DrawSettings(steps=1, size=64)
    request = requests.DrawRequest(checkpoint, ["?"], settings, out=tmp_path, device="cpu")
    (file,) = pipeline.draw(request).files
    assert file.name == "picture-0.png"
    with Image.open(file) as picture:
        assert "Concept" not in picture.text["parameters"]  # type: ignore[attr-defined]


def test_a_stopped_drawing_keeps_its_pictures(learned: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = learned(LearnSettings(method="lora", steps=1, batch=1, rank=2), "V1", "V2")
    # the second prompt is of another batch, since its two things are kept apart
    prompts = ["a V1 ball", "a V1 ball and a V2 fish", "a mug"]
    out = tmp_path / "out"
    request = requests.DrawRequest(
        checkpoint, prompts, DrawSettings(steps=1, size=64), out=out, device="cpu"
    )

    def stop(progress: Progress) -> None:
        if progress.stage == "draw" and progress.step == progress.steps:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match=r"^enough; 2 of 3 pictures are in .*out$"):
        pipeline.draw(request, stop)
    assert {file.name for file in out.iterdir()} == {"a-V1-ball-0.png", "a-mug-0.png"}
    result = pipeline.draw(request)
    assert [one.prompt for one in result.pictures] == prompts
    assert [file.name for file in result.files] == [
        "a-V1-ball-0-1.png",
        "a-V1-ball-and-a-V2-fish-0.png",
        "a-mug-0-1.png",
        "grid.png",
    ]


def test_a_png_names_the_version_it_was_drawn_with(
    learned: Callable[..., Path], tmp_path: Path
) -> None:
    """Another program goes back to the first version while it is drawn."""
    checkpoint = learned(LearnSettings(method="lora", steps=1, batch=1, rank=2), "V1", "V2")

    def undo(progress: Progress) -> None:
        if progress.stage == "draw":
            pipeline.undo(requests.UndoRequest(checkpoint, version=2))

    request = requests.DrawRequest(
        checkpoint, ["a V2 fish"], DrawSettings(steps=1, size=64), device="cpu"
    )
    (drawn,) = pipeline.draw(request, undo).pictures
    everything = json.loads(drawn.texts["continual_lora"])
    assert (everything["version"], everything["concepts"]) == (2, ["V1 ball", "V2 fish"])
