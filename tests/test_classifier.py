"""Stage 4: DC scores on a net whose posterior is known, and on the mini-SD."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_learn import learn_request
from torch import Tensor

from comfy_continual_lora import classifier, pipeline
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.diffusion import add_noise, alphas_cumprod, generator_for, stratified
from comfy_continual_lora.methods.stages import temperature
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.requests import EvaluateRequest, ScoreRequest
from comfy_continual_lora.results import Scored, ScoreResult
from comfy_continual_lora.settings import EvaluateSettings, LearnSettings, ScoreSettings

ALPHAS = alphas_cumprod()


class Toy:
    """A perfect denoiser of a world in which every concept has one picture, its mean: eps = (z_t -
    sqrt(a) mean) / sqrt(1 - a).

    The "text features" of a concept are its mean; the error of concept i on the picture of concept
    j is a / (1 - a) mean((mu_j - mu_i)^2), whatever the noise.
    """

    device, prediction, zero_snr = torch.device("cpu"), "epsilon", False

    def predict(self, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        alpha = ALPHAS[timestep].view(-1, 1, 1, 1)
        return (noisy - alpha.sqrt() * features.view_as(noisy)) / (1 - alpha).sqrt()


def _means(k: int) -> Tensor:
    return torch.randn(k, 4, 2, 2, generator=torch.Generator().manual_seed(5))


def _prompts(means: Tensor) -> Tensor:
    """(k, 4, 2, 2) -> (k, tokens, d) as text features are."""
    return means.flatten(1)[:, None]


def test_errors_and_posterior_of_a_known_net() -> None:
    means, generator = _means(3), torch.Generator().manual_seed(0)
    picture, timestep = means[[1, 2]], torch.tensor([200, 700])
    noise = torch.randn(picture.shape, generator=generator)
    noisy = add_noise(picture, noise, timestep, ALPHAS)
    error = classifier.errors(
        classifier.predictions(Toy(), noisy, timestep, _prompts(means)), noise
    )  # type: ignore[arg-type]
    ratio = ALPHAS[timestep] / (1 - ALPHAS[timestep])
    exact = ratio[:, None] * (picture[:, None] - means).square().flatten(2).mean(2)
    assert torch.allclose(error, exact, atol=1e-4)
    for tau in (0.02, 1.0):
        assert torch.allclose(
            classifier.log_posterior(error, tau).exp(), torch.softmax(-exact / tau, 1), atol=2e-3
        )


@pytest.mark.parametrize(("scale", "tau"), [("calibrated", 0.02), ("mean", 1), ("sum", 1 / 64)])
def test_the_temperature_is_for_mean_errors(scale: str, tau: float) -> None:
    """Of 64 numbers here, whose sum divided by 1 is their mean divided by 1 / 64."""
    learned: Any = SimpleNamespace(
        session=SimpleNamespace(stack=SimpleNamespace(tau=0.02)),
        concept=SimpleNamespace(latents=[torch.zeros(4, 2, 8)]),
        settings=LearnSettings(dc_scale=scale),
    )
    assert temperature(learned) == tau


def test_the_order_of_concepts_does_not_matter(backbone: Backbone) -> None:
    text, order = FrozenText(backbone, {}), [2, 0, 1]
    features = text(["a red mug", "a blue cat on grass", "a star"])
    latents, timestep = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([100, 600]),
    )
    with torch.no_grad():
        one = classifier.predictions(backbone, latents, timestep, features)
        other = classifier.predictions(backbone, latents, timestep, features[order])
        alone = backbone.predict(latents, timestep, features[[1, 1]])
    assert torch.allclose(one[:, order], other, atol=1e-5)
    assert torch.allclose(one[:, 1], alone, atol=1e-5)


def test_soft_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(5, 3, generator=generator)
    student = teacher.clone().requires_grad_()
    agreeing = classifier.soft_cross_entropy(teacher, student, 0.1)
    agreeing.sum().backward()
    assert torch.allclose(agreeing, torch.zeros(5), atol=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6
    p, q = torch.softmax(-teacher / 0.1, 1), torch.softmax(-(teacher.flip(1)) / 0.1, 1)
    by_hand = (p * (p / q).log()).sum(1)
    assert torch.allclose(
        classifier.soft_cross_entropy(teacher, teacher.flip(1), 0.1), by_hand, atol=1e-5
    )


@pytest.mark.parametrize("k", [2, 5])
def test_calibration_reaches_its_confidence(k: int) -> None:
    error = torch.rand(200, k, generator=torch.Generator().manual_seed(k)) * 0.02
    tau = classifier.calibrate(error)
    assert float(torch.softmax(-error / tau, 1).amax(1).mean()) == pytest.approx(0.7, abs=1e-3)


def test_calibration_is_the_same_whatever_goes_through_at_once() -> None:
    means, seen = _means(3), []
    one, many = (
        classifier.calibration_errors(
            Toy(),
            list(means),
            _prompts(means),
            20,
            rows,
            lambda p: seen.append((p.stage, p.step, p.steps)),
        )  # type: ignore[arg-type]
        for rows in (1, 100)
    )
    assert one.shape == (20, 3)
    assert torch.allclose(one, many, atol=1e-6)
    assert seen == [("calibrate", n, 20) for n in (*range(1, 21), 8, 16, 20)]


def test_the_subset_holds_a_random_few_of_the_previous() -> None:
    previous = [f"V{i}" for i in range(6)]
    drawn = [classifier.subset(previous, 5, generator_for(seed)) for seed in range(50)]
    assert all(len(set(d)) == 3 for d in drawn)
    assert set().union(*drawn) == set(previous)
    assert classifier.subset(previous[:1], 5, generator_for(0)) == ["V0"]
    assert classifier.subset(previous, 2, generator_for(0)) == []


def test_stratified_timesteps_cover_the_range() -> None:
    timesteps = stratified(50, generator_for(1)).sort().values
    assert torch.equal(timesteps // 20, torch.arange(50))


@pytest.mark.parametrize("weighting", ["uniform", "linear"])
def test_a_linear_weight_falls_with_the_noise(weighting: str) -> None:
    means, settings = _means(2), ScoreSettings(trials=16, stages=1, weighting=weighting)
    timestep = stratified(16, torch.Generator().manual_seed(settings.seed))
    weight = 1 - timestep / 1000 if weighting == "linear" else torch.ones(16)
    gap = ALPHAS[timestep] / (1 - ALPHAS[timestep]) * (means[0] - means[1]).square().mean()
    features = dict(zip(("V1", "V2"), _prompts(means), strict=True))
    scores = classifier.classify(Toy(), means[0], features, 0.5, settings)  # type: ignore[arg-type]
    assert scores.margin == pytest.approx(float((weight * gap).sum() / weight.sum()), rel=1e-3)


@pytest.mark.parametrize("weighting", ["uniform", "linear"])
def test_classify_finds_the_concept_and_says_how_sure(weighting: str) -> None:
    means = _means(6)
    features = {f"V{i}": prompt for i, prompt in enumerate(_prompts(means))}
    settings = ScoreSettings(trials=32, stages=3, rows=7, weighting=weighting)
    scores = classifier.classify(Toy(), means[4], features, 0.5, settings)  # type: ignore[arg-type]
    assert scores.best == "V4"
    assert scores.sure
    assert scores.margin_low is not None
    assert scores.margin_high is not None
    assert scores.margin_low < scores.margin < scores.margin_high
    assert sum(scores.probabilities) == pytest.approx(1)
    assert scores.probabilities == sorted(scores.probabilities, reverse=True)
    assert sorted(scores.trials) == [8, 8, 8, 16, 32, 32]
    whole = classifier.classify(Toy(), means[4], features, 0.5, ScoreSettings(trials=32, stages=1))  # type: ignore[arg-type]
    assert whole.best == "V4"
    assert whole.trials == [32] * 6


class Counting(Toy):
    """Notes how many rows go through the net at once."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def predict(self, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        self.rows.append(len(noisy))
        return super().predict(noisy, timestep, features)


@pytest.mark.parametrize("rows", [1, 5, 8, 100])
def test_no_more_rows_than_asked_for_go_through_the_net_at_once(rows: int) -> None:
    """Also with more candidates than rows, which share timesteps and noise all the same."""
    means, net = _means(13), Counting()
    features = {f"V{i}": prompt for i, prompt in enumerate(_prompts(means))}
    settings = ScoreSettings(trials=8, stages=2, rows=rows)
    scores = classifier.classify(net, means[4], features, 0.5, settings)  # type: ignore[arg-type]
    assert max(net.rows) <= rows
    whole = classifier.classify(Toy(), means[4], features, 0.5, ScoreSettings(trials=8, stages=2))  # type: ignore[arg-type]
    assert (scores.best, scores.names, scores.trials) == ("V4", whole.names, whole.trials)
    assert scores.probabilities == pytest.approx(whole.probabilities, abs=1e-5)


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_one_trial_is_never_sure(trials: int) -> None:
    means = _means(3)
    features = {f"V{i}": prompt for i, prompt in enumerate(_prompts(means))}
    settings = ScoreSettings(trials=trials)
    scores = classifier.classify(Toy(), means[1], features, 0.5, settings)  # type: ignore[arg-type]
    assert (scores.best, scores.margin > 0) == ("V1", True)
    assert scores.sure == (trials > 1)
    assert (scores.margin_low is None, scores.margin_high is None) == (trials == 1, trials == 1)
    result = ScoreResult([Scored(Path("a.png"), "V1", scores)])
    assert ("(not sure)" in result.summary()) == (trials == 1)
    (row,) = json.loads(json.dumps(result.as_json(), allow_nan=False))["images"]
    assert row["margin"] == [scores.margin, scores.margin_low, scores.margin_high]
    assert row["sure"] == scores.sure


def test_pictures_of_several_folders_are_told_apart() -> None:
    """Folders named after words, whose pictures have the same names."""
    scores = classifier.Scores(["V1", "V2"], [0.75, 0.25], [8, 8], 1.0, 0.5, 1.5)
    files = [Path("mine/V1/0.png"), Path("mine/V2/0.png")]
    lines = ScoreResult([Scored(file, None, scores) for file in files]).summary().splitlines()
    assert [line.split()[0] for line in lines] == ["V1/0.png", "V2/0.png"]
    (line,) = ScoreResult([Scored(files[0], None, scores)]).summary().splitlines()
    assert line.split()[0] == "0.png"
    here = [Path("0.png"), Path("V2/0.png")]
    lines = ScoreResult([Scored(file, None, scores) for file in here]).summary().splitlines()
    assert [line.split()[0] for line in lines] == [f"{Path.cwd().name}/0.png", "V2/0.png"]


def test_equal_prompts_are_equally_likely() -> None:
    means = _means(1)
    scores = classifier.classify(
        Toy(), means[0], {"a": _prompts(means)[0], "b": _prompts(means)[0]}, 0.5, ScoreSettings()
    )  # type: ignore[arg-type]
    assert not scores.sure
    assert scores.probabilities == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("plotted", [False, True])
def test_a_picture_that_is_gone_costs_the_chart_alone(
    plotted: bool, learned: Callable[..., Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    """It is scored, and then another program removes it."""
    checkpoint = learned(LearnSettings(method="lora", steps=1, batch=1, rank=2), "V1")
    picture = tmp_path / "gone.png"
    shutil.copy(min(folders["V1"].glob("*.png")), picture)
    plot, notes = tmp_path / "scores.png" if plotted else None, []

    def report(progress: Progress) -> None:
        notes.append(progress.note)
        if progress.stage == "score":
            picture.unlink(missing_ok=True)

    settings = ScoreSettings(trials=1, size=64)
    request = ScoreRequest(checkpoint, [picture], settings, plot=plot, device="cpu")
    result = pipeline.dc_scores(request, report)
    assert [one.file.name for one in result.images] == ["gone.png"]
    assert result.chart is None
    assert any(note.startswith("gone.png can't be read") for note in notes) == plotted


def test_pictures_are_scored_at_the_side_of_the_first_concept(
    learned: Callable[..., Path], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temperature of the scores is calibrated on its pictures, and the net errs differently at
    another size.
    """
    checkpoint = learned(LearnSettings(method="lora", steps=1, batch=1, rank=2, size=64), "V1")
    sides: list[int] = []
    original = classifier.classify

    def classify(backbone: Any, latent: Tensor, *rest: Any) -> Any:
        sides.append(8 * latent.shape[-1])
        return original(backbone, latent, *rest)

    monkeypatch.setattr(classifier, "classify", classify)
    score = ScoreRequest(checkpoint, folders["V1"], ScoreSettings(trials=1), device="cpu")
    pipeline.dc_scores(score)
    larger = EvaluateSettings(pictures=1, steps=1, trials=1, size=128)
    evaluation = EvaluateRequest(checkpoint, settings=larger, device="cpu")
    pipeline.evaluate(evaluation)
    second = LearnSettings(method="lora", steps=1, batch=1, rank=2, size=72)
    pipeline.learn_concept(replace(learn_request(checkpoint, folders, "V2", second), score=1))
    assert set(sides) == {64}
    pipeline.dc_scores(replace(score, settings=ScoreSettings(trials=1, size=96)))
    assert sides[-1] == 96
