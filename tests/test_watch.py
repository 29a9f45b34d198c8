"""Stage 3: when is it done? A watched run is exact to stop and resume, and keeps its best version."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_learn import save_concept, stack_of
from PIL import Image

from comfy_continual_lora import cli, pipeline, watch
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import Cancelled
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.requests import LearnRequest
from comfy_continual_lora.results import LearnResult
from comfy_continual_lora.settings import LearnSettings
from comfy_continual_lora.snapshot import DamagedSnapshot

QUICK = LearnSettings(method="lora", steps=6, batch=2, rank=2, size=64, snapshot_every=4)
WATCHED = replace(QUICK, watch_every=2)


def _learn(
    checkpoint: Path, folder: Path, settings: LearnSettings, stop: int = 0, token: str = "V1"
) -> tuple[LearnResult, list[str]]:
    notes: list[str] = []

    def seen(progress: Progress) -> None:
        notes.append(progress.note)
        if stop and progress.stage == "learn" and progress.step == stop:
            raise Cancelled("stopped")

    request = LearnRequest(checkpoint, folder, token, "ball", settings, device="cpu")
    return pipeline.learn_concept(request, seen), [note for note in notes if note]


def _same(one: Path, other: Path) -> bool:
    """Whether both learned the same adapter and the same word, bit for bit."""
    a, b = stack_of(one), stack_of(other)
    pairs = zip(a.words.values(), b.words.values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and all(
        torch.equal(value, (b.adapter or {})[name]) for name, value in (a.adapter or {}).items()
    )


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look costs as many predictions; nothing here depends on their number."""
    monkeypatch.setattr(watch, "DRAWS", 4)


@pytest.fixture
def other(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, which has learned nothing."""
    return Path(shutil.copyfile(checkpoint, tmp_path / "other.safetensors"))


@pytest.fixture
def five(tmp_path: Path) -> Path:
    return save_concept(tmp_path / "five", 0, 5)


def test_one_in_five_is_held_out() -> None:
    assert [len(watch.held_out(n)) for n in (1, 4, 5, 9, 10, 15)] == [0, 0, 1, 1, 2, 3]


def test_a_watched_run_says_what_it_sees_and_keeps_the_curve(checkpoint: Path, five: Path) -> None:
    result, notes = _learn(checkpoint, five, WATCHED)
    assert [look[0] for look in result.record.watched] == [2, 4, 6]
    assert sum("predicts the pictures held out" in note for note in notes) == 3
    assert any("1 of 5 pictures are held out" in note for note in notes)
    assert "better than the bare checkpoint" in result.summary()
    assert result.record.steps == 6
    assert stack_of(checkpoint).records[0].watched == result.record.watched
    later, notes = _learn(checkpoint, save_concept(five.parent / "two", 1, 5), WATCHED, token="V2")
    assert later.record.watched[-1][2] > 0
    assert any("earlier concepts moved by" in note for note in notes)


def test_too_few_pictures_are_told_and_learned_from_as_ever(
    checkpoint: Path, pictures: Path, other: Path
) -> None:
    result, notes = _learn(checkpoint, pictures, replace(WATCHED, until="good"))
    assert any("too few to hold one out" in note for note in notes)
    assert result.record.watched == []
    plain, _ = _learn(other, pictures, QUICK)
    assert plain.losses == result.losses


@pytest.mark.parametrize("stop", [2, 5])
def test_stop_and_resume_equals_no_stop(
    checkpoint: Path, five: Path, other: Path, stop: int
) -> None:
    settings = replace(WATCHED, until="good")
    whole, _ = _learn(checkpoint, five, settings)
    with pytest.raises(Cancelled):
        _learn(other, five, settings, stop)
    resumed, _ = _learn(other, five, settings)
    assert resumed.record.watched == whole.record.watched
    assert resumed.record.steps == whole.record.steps
    assert _same(checkpoint, other)


def test_copies_of_pictures_held_out_are_not_learned_from(
    checkpoint: Path, five: Path, other: Path
) -> None:
    once, _ = _learn(checkpoint, five, WATCHED)
    (five / "6.png").write_bytes((five / "4.png").read_bytes())
    twice, notes = _learn(other, five, WATCHED)
    assert any("1 of 5 different pictures are held out" in note for note in notes)
    assert twice.losses == once.losses
    assert twice.record.watched == once.record.watched


def test_what_a_mask_leaves_out_is_not_looked_at(checkpoint: Path, five: Path, other: Path) -> None:
    whole, _ = _learn(checkpoint, five, WATCHED)
    with Image.open(five / "4.png") as picture:
        mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, mask.width // 2, mask.height // 2))
    mask.save(five / "4.mask.png")  # of the picture held out
    masked, _ = _learn(other, five, WATCHED)
    assert masked.losses == pytest.approx(whole.losses)
    (_, likeness, moved), (_, of_whole, _) = masked.record.watched[-1], whole.record.watched[-1]
    assert likeness != pytest.approx(of_whole, rel=1e-3)
    assert moved == 0


def test_a_look_changes_nothing_of_the_run(checkpoint: Path, five: Path, other: Path) -> None:
    often, _ = _learn(checkpoint, five, replace(WATCHED, watch_every=1))
    once, _ = _learn(other, five, replace(WATCHED, watch_every=6))
    assert often.losses == once.losses
    assert _same(checkpoint, other)


def test_it_stops_when_it_no_longer_rises_and_keeps_the_best(
    checkpoint: Path, five: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors that fall until step 2 and rise from then on."""
    errors = iter([1.0, 0.9, 0.8, 0.85, 0.86, 0.87, 0.1])
    monkeypatch.setattr(watch.Watch, "_error", lambda *_: next(errors))
    settings = replace(QUICK, steps=20, watch_every=1, until="good")
    result, _ = _learn(checkpoint, five, settings)
    assert [look[0] for look in result.record.watched] == [1, 2, 3, 4, 5]
    assert len(result.losses) == 5
    assert result.record.steps == 2
    monkeypatch.undo()
    two, _ = _learn(other, five, replace(WATCHED, steps=2))
    assert two.losses == result.losses[:2]
    assert _same(checkpoint, other)


def test_a_run_that_got_good_is_not_learned_again_once_it_is_stopped_later(
    checkpoint: Path, five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([1.0, 0.9, 0.95, 0.96, 0.97, 1.0])
    monkeypatch.setattr(watch.Watch, "_error", lambda *_: next(errors))
    settings = replace(QUICK, method="lora_ewc", steps=20, watch_every=1, until="good")
    settings = replace(settings, fisher_samples=2, snapshot_every=50)

    def learned(stop: str) -> int:
        """The steps of learning that were reported."""
        steps = []

        def seen(progress: Progress) -> None:
            if progress.stage == stop:
                raise Cancelled("stopped")
            steps.extend([progress.step] if progress.stage == "learn" else [])

        request = LearnRequest(checkpoint, five, "V1", "ball", settings, device="cpu")
        if stop:
            with pytest.raises(Cancelled):
                pipeline.learn_concept(request, seen)
        else:
            assert pipeline.learn_concept(request, seen).record.steps == 1
        return len(steps)

    assert learned(stop="fisher") == 4
    assert learned(stop="") == 0


def test_likeness_is_measured_from_the_bare_checkpoint(backbone: Backbone) -> None:
    latents = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))]
    looked = watch.Watch(backbone, latents, watch.Names(("ball", "ball")), 5, "steps")
    looked.begin(dict, {})
    assert looked.look(4, 10) == ""
    assert looked.look(5, 10)
    assert looked.look(5, 10) == ""  # not twice
    assert [point.step for point in looked.points] == [5]
    assert looked.points[0].likeness == pytest.approx(0.0, abs=1e-6)


def test_an_earlier_concept_that_became_its_noun_has_moved_by_1(backbone: Backbone) -> None:
    latents = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))]
    words = {"V1": backbone.word_of_vocabulary("fish")}
    looked = watch.Watch(backbone, latents, watch.Names(("mug", "mug"), [("V1", "ball")]), 5, "")
    looked.begin(lambda: words, {})  # type: ignore[arg-type,return-value]
    looked.look(5, 15)
    words["V1"] = backbone.word_of_vocabulary("ball")
    looked.look(10, 15)
    assert [point.moved for point in looked.points] == pytest.approx([0.0, 1.0], abs=1e-3)


def _watch(backbone: Backbone, until: str) -> watch.Watch:
    latents = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))]
    made = watch.Watch(backbone, latents, watch.Names(("ball", "ball")), 2, until)
    made.begin(dict, {"word": torch.ones(1, 4)})
    return made


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("watch", torch.zeros(1, 3)),
        ("watch", torch.tensor([[4.0, 0.1, 0.0], [2.0, 0.1, 0.0]])),
        ("watch", torch.tensor([[9.0, 0.1, 0.0]])),
        ("watch", torch.ones(2, 2)),
        ("watch", torch.ones(3)),
        ("watch", torch.ones(1, 3, dtype=torch.complex64)),
        ("best.word", torch.ones(4)),
        ("best.word", torch.ones(1, 4, dtype=torch.int64)),
        ("best.word", None),
    ],
)
def test_looks_that_no_run_wrote_are_refused(
    backbone: Backbone, name: str, tensor: torch.Tensor | None
) -> None:
    looked = _watch(backbone, "good")
    looked.look(2, 10)
    looked.look(4, 10)
    state = looked.state()
    other = _watch(backbone, "good")
    with pytest.raises(DamagedSnapshot):
        other.restore({key: v for key, v in {**state, name: tensor}.items() if v is not None}, 4)
    assert not other.points
    with pytest.raises(DamagedSnapshot):
        _watch(backbone, "steps").restore(state, 4)
    other.restore(state, 4)
    assert other.points == looked.points
    assert torch.equal(other.best["word"], torch.ones(1, 4))


def test_the_curve_is_drawn_beside_the_stack(
    checkpoint: Path, five: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learn", "--checkpoint", checkpoint, "--images", five, "--token", "V1"]
    words += ["--noun", "ball", "--method", "lora", "--steps", 2, "--batch", 1, "--rank", 2]
    words += ["--size", 64, "--device", "cpu", "--watch-every", 1]
    assert cli.main([str(word) for word in words]) == 0
    file = checkpoint.with_name("mini.V1.likeness.png")
    assert f"The curve: {file}" in capsys.readouterr().out
    colors = Image.open(file).convert("RGB").getcolors(100_000)
    assert any(color == (0x25, 0x63, 0xEB) for _, color in colors or [])
