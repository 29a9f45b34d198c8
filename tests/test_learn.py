"""Stage 3: the loop learns, stops, goes on, and ends bit for bit where it would have ended
undisturbed.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers_learn import save_concept
from helpers_store import make_stack
from helpers_thin import TEXT_WIDTH
from PIL import Image
from safetensors.torch import save

from comfy_continual_lora import concepts, pipeline, requests, store, versions
from comfy_continual_lora.adapters.adapter import attached, new_adapter
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.diffusion import add_noise, alphas_cumprod, loss_per_example
from comfy_continual_lora.errors import (
    Cancelled,
    ConceptImagesError,
    SettingError,
    StackError,
    TokenError,
    TrainingError,
)
from comfy_continual_lora.learn import Trained, TrainingInputs, learn, precondition
from comfy_continual_lora.presets import TEMPLATES
from comfy_continual_lora.progress import Progress, ignore
from comfy_continual_lora.settings import LearnSettings, ScoreSettings

QUICK = LearnSettings(method="lora", steps=6, batch=2, rank=4, size=64, snapshot_every=2)


def _stop_at(step: int):
    def on_progress(progress: Progress) -> None:
        if progress.stage == "learn" and progress.step == step:
            raise Cancelled

    return on_progress


def _learn(
    backbone: Backbone,
    folder: Path,
    snapshot: Path,
    settings: LearnSettings = QUICK,
    on_progress=ignore,
    space: torch.Tensor | None = None,
) -> Trained:
    pictures = concepts.load_images(folder, 64)
    generator = torch.Generator().manual_seed(0)
    word, adapter = backbone.word_start("ball", generator), new_adapter(backbone, 4, generator)
    latents = backbone.encode_images(
        [*pictures.images, *(image.flip(-1) for image in pictures.images)]
    )
    prompts = [concepts.prompts_for("V1", "ball", TEMPLATES, None)]
    lesson = TrainingInputs(latents, prompts, "V1", {}, adapter, word, preconditioner=space)
    return learn(backbone, lesson, settings.resolved("mini"), snapshot, on_progress)


def _same(a: Trained, b: Trained) -> bool:
    assert a.adapter
    assert b.adapter
    return (
        torch.equal(a.word, b.word)
        and a.losses == b.losses
        and all(torch.equal(t, b.adapter[k]) for k, t in a.adapter.items())
    )


def test_steps_in_other_coordinates_are_those_of_a_factor_learned_there() -> None:
    """Against autograd through p = p' P, where p' is what AdamW knows of."""
    generator = torch.Generator().manual_seed(0)
    start, inputs, wanted = (
        torch.randn(size, generator=generator) for size in ((3, 5), (5, 40), (3, 40))
    )
    space = torch.diag(torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0])) + 0.05
    there = torch.nn.Parameter(start @ torch.linalg.inv(space))
    here, beside = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(2))
    of_it, optimizer = (
        torch.optim.AdamW([there], lr=0.05, weight_decay=0),
        torch.optim.AdamW([here, beside], lr=0.05, weight_decay=0),
    )
    precondition(space, optimizer, [here])
    for _ in range(5):
        for product, one, others in ((there @ space, of_it, 0.0), (here, optimizer, beside.sum())):
            one.zero_grad()
            ((product @ inputs - wanted).square().mean() + others).backward()
            one.step()
    assert torch.allclose(here, there @ space, atol=1e-4)
    assert (here - start).abs().max() > 0.1
    assert torch.allclose(beside, torch.full((2,), 1 - 5 * 0.05))


@pytest.fixture(scope="module")
def undisturbed(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What `_learn` of `pictures` ends with when nothing comes between."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return _learn(backbone, save_concept(folder / "pictures", 0), folder / "snapshot")


@pytest.mark.parametrize(("stop", "turned"), [(1, False), (3, False), (3, True), (5, False)])
def test_stop_and_resume_equals_no_stop(
    backbone: Backbone,
    pictures: Path,
    tmp_path: Path,
    stop: int,
    turned: bool,
    undisturbed: Trained,
) -> None:
    space = torch.eye(backbone.word_width) + 0.1 if turned else None
    whole = undisturbed
    if turned:
        whole = _learn(backbone, pictures, tmp_path / "a", space=space)
    with pytest.raises(Cancelled):
        _learn(backbone, pictures, tmp_path / "b", on_progress=_stop_at(stop), space=space)
    steps = []
    resumed = _learn(
        backbone,
        pictures,
        tmp_path / "b",
        on_progress=lambda p: steps.append(p.step),
        space=space,
    )
    assert steps[0] == stop + 1
    assert _same(whole, resumed)
    if turned:
        assert not _same(whole, undisturbed)


def test_a_snapshot_of_another_run_is_kept_and_not_used(
    backbone: Backbone, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(Cancelled):
        _learn(backbone, pictures, tmp_path / "s", on_progress=_stop_at(3))
    before, other, notes = (tmp_path / "s").read_bytes(), replace(QUICK, seed=9), _Notes()
    assert _same(
        _learn(backbone, pictures, tmp_path / "new", other),
        _learn(backbone, pictures, tmp_path / "s", other, notes),
    )
    assert "another run's, at step 3" in notes[0]
    (kept,) = (path for path in tmp_path.glob("s.*") if path.read_bytes() == before)
    assert kept.name in notes[0]


class _Notes(list[str]):
    """Collects what a run has to say."""

    def __call__(self, progress: Progress) -> None:
        if progress.note:
            self.append(progress.note)


@pytest.mark.parametrize("how", ["cut", "flip", "empty", "header", "earlier", "longer"])
def test_a_damaged_snapshot_is_set_aside_with_the_reason(
    backbone: Backbone, pictures: Path, tmp_path: Path, how: str, undisturbed: Trained
) -> None:
    path, notes = tmp_path / "s", _Notes()
    with pytest.raises(Cancelled):
        _learn(backbone, pictures, path, on_progress=_stop_at(3))
    data = path.read_bytes()
    changes = {
        "cut": data[: len(data) // 2],
        "flip": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "empty": b"",
        "header": data.replace(b'"step":"3"', b'"step":"5"'),
        "earlier": save(
            {"value.word": torch.zeros(1)}, {"identity": "x", "step": "3", "losses": "[1, 2, 3]"}
        ),
        "longer": data + b"0000",
    }
    assert changes[how] != data
    path.write_bytes(changes[how])
    assert _same(_learn(backbone, pictures, path, on_progress=notes), undisturbed)
    assert "damaged" in notes[0]
    assert "starts from step 1" in notes[0]
    assert (tmp_path / "s.damaged").read_bytes() == changes[how]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="two users, so root")
def test_a_snapshot_that_may_not_be_read_is_not_overwritten(
    backbone: Backbone, pictures: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"another user's")
    path.chmod(0o600)
    for folder in (pictures, tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        with pytest.raises(TrainingError, match=r"can't be read \(Permission denied\)"):
            _learn(backbone, pictures, path)
    finally:
        os.seteuid(0)
    assert path.read_bytes() == b"another user's"


@pytest.mark.slow
def test_a_run_goes_on_whatever_the_number_of_threads(checkpoint: Path, pictures: Path) -> None:
    """Computed numbers differ in their last digits with it; what was asked for does not."""
    before, settings, notes = (
        torch.get_num_threads(),
        replace(QUICK, method="retention", snapshot_every=1),
        _Notes(),
    )
    request = requests.LearnRequest(checkpoint, pictures, "V1", "ball", settings, device="cpu")
    try:
        torch.set_num_threads(2)
        with pytest.raises(Cancelled):
            pipeline.learn_concept(request, _stop_at(3))
        torch.set_num_threads(1)
        pipeline.learn_concept(request, notes)
    finally:
        torch.set_num_threads(before)
    assert notes == ["4 pictures, no captions", "Resuming from step 3 of 6."]
    assert not list(checkpoint.parent.glob("*snapshot*"))


def test_another_runs_snapshot_is_told_of_and_can_be_gone_on_with(
    checkpoint: Path, pictures: Path, folders: dict[str, Path]
) -> None:
    first = requests.LearnRequest(
        checkpoint, pictures, "V1", "ball", replace(QUICK, snapshot_every=1), device="cpu"
    )
    others = {
        "`steps` (6, now 5)": replace(first, settings=replace(first.settings, steps=5)),
        "the class noun": replace(first, noun="box"),
        "the pictures": replace(first, images=folders["V1"]),
    }
    with pytest.raises(Cancelled):
        pipeline.learn_concept(first, _stop_at(4))
    (snapshot,) = checkpoint.parent.glob("*.snapshot")
    kept = snapshot.read_bytes()
    for differs, request in others.items():
        notes = _Notes()

        def stop(progress: Progress, notes: _Notes = notes) -> None:
            notes(progress)
            _stop_at(1)(progress)

        with pytest.raises(Cancelled):
            pipeline.learn_concept(request, stop)
        told = next(note for note in notes if snapshot.name in note)
        assert f"stopped at step 4 and is kept in {snapshot}" in told
        assert differs in told
        assert snapshot.read_bytes() == kept
    notes = _Notes()
    pipeline.learn_concept(first, notes)
    assert "Resuming from step 4 of 6." in notes
    assert not snapshot.exists()
    assert len(list(checkpoint.parent.glob("*.snapshot"))) == len(others)


def _loss(backbone: Backbone, folder: Path, learned: Trained) -> float:
    """Mean loss on the concept over fixed timesteps and noises."""
    pictures, generator = concepts.load_images(folder, 64), torch.Generator().manual_seed(1)
    latents = torch.stack(backbone.encode_images(pictures.images) * 8)
    timestep = torch.linspace(20, 900, len(latents)).long()
    noise = torch.randn(latents.shape, generator=generator)
    with torch.no_grad(), attached(backbone, learned.adapter):
        features = backbone.encode_prompts(["a photo of a V1 ball"], {"V1": learned.word}).expand(
            len(latents), -1, -1
        )
        return float(
            loss_per_example(
                backbone.predict(
                    add_noise(latents, noise, timestep, alphas_cumprod()), timestep, features
                ),
                noise,
            ).mean()
        )


@pytest.mark.parametrize(
    ("method", "share"),
    [
        ("lora", 0.98),
        pytest.param("textual_inversion", 0.995, marks=pytest.mark.slow),
    ],
)
def test_learning_lowers_the_loss_on_the_concept(
    backbone: Backbone, pictures: Path, tmp_path: Path, method: str, share: float
) -> None:
    settings = replace(QUICK, method=method, rate=1.5e-3)
    early, late = (
        _learn(backbone, pictures, tmp_path / "s", replace(settings, steps=n, batch=4))
        for n in (1, 60)
    )
    assert _loss(backbone, pictures, late) < share * _loss(backbone, pictures, early)


def test_weighting_decides_what_is_learned(
    backbone: Backbone, pictures: Path, tmp_path: Path
) -> None:
    uniform, debiased = (
        _learn(backbone, pictures, tmp_path / w, replace(QUICK, steps=2, weighting=w))
        for w in ("uniform", "debiased")
    )
    assert 1.1 * uniform.losses[0] < debiased.losses[0]
    assert not torch.equal(uniform.word, debiased.word)


def test_the_words_gradient_is_the_same_every_time(backbone: Backbone) -> None:
    """With several threads too, whose order must not show: runs are the same to the bit."""
    threads, found = torch.get_num_threads(), set()
    word = backbone.word_start("ball", torch.Generator().manual_seed(0)).requires_grad_()
    torch.set_num_threads(4)
    try:
        for _ in range(8):
            features = backbone.encode_prompts(
                [
                    f"a photo of a V1 ball {place}"
                    for place in ("", "on grass", "on wood", "in snow")
                ],
                {"V1": word},
            )
            found.add(torch.autograd.grad(features.square().sum(), word)[0].numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("means", ["checkpointing", "channels_last"])
def test_how_it_is_computed_changes_no_result(
    backbone: Backbone, pictures: Path, tmp_path: Path, means: str, undisturbed: Trained
) -> None:
    strides = [parameter.stride() for parameter in backbone.unet.parameters()]
    other = _learn(backbone, pictures, tmp_path / "b", replace(QUICK, **{means: True}))
    assert torch.allclose(undisturbed.word, other.word, atol=1e-5)
    assert [parameter.stride() for parameter in backbone.unet.parameters()] == strides


def test_bf16_runs_and_keeps_float32_factors(
    mini_file: Path, pictures: Path, tmp_path: Path
) -> None:
    own = load_backbone(mini_file, device="cpu")  # learning leaves its net in bf16
    learned = _learn(own, pictures, tmp_path / "s", replace(QUICK, precision="bf16"))
    assert own.unet.dtype == torch.bfloat16
    assert learned.adapter
    assert all(t.dtype == torch.float32 for t in learned.adapter.values())
    assert any(t.abs().max() > 0 for name, t in learned.adapter.items() if name.endswith(".B"))


def test_a_loss_that_is_not_a_number_stores_nothing(checkpoint: Path, pictures: Path) -> None:
    request = requests.LearnRequest(
        checkpoint,
        pictures,
        "V1",
        "ball",
        replace(QUICK, rate=1.0, token_rate=1.0, clip=1e30, steps=200),
        device="cpu",
    )
    request = replace(request, settings=replace(request.settings, warmup=0))
    pipeline.learn_concept(replace(request, settings=QUICK))
    stack_file = store.stack_path(checkpoint)
    stack = store.load_stack(stack_file, store.read_header(stack_file)["fingerprint"])
    assert stack.adapter
    for tensor in stack.adapter.values():
        tensor.fill_(1e30)
    store.save_stack(stack, stack_file)
    before = stack_file.read_bytes()
    with pytest.raises(
        TrainingError, match=r"loss became (nan|inf|-inf) at step 1.*nothing was stored"
    ):
        pipeline.learn_concept(replace(request, token="V2"))
    assert stack_file.read_bytes() == before


def test_learning_that_diverges_stores_nothing(checkpoint: Path, pictures: Path) -> None:
    settings = LearnSettings(steps=30, batch=2, size=64, rate=1.0, warmup=0)
    request = requests.LearnRequest(checkpoint, pictures, "V1", "ball", settings, device="cpu")
    with pytest.raises(TrainingError, match=r"Learning diverged.*Nothing was stored.*lower rate"):
        pipeline.learn_concept(request)
    assert not [path for path in checkpoint.parent.iterdir() if path.suffix == ".snapshot"]
    assert not store.stack_path(checkpoint).exists()


@pytest.mark.skipif(os.name != "posix", reason="file size limits of POSIX")
def test_a_full_disk_while_learning_is_told_and_harms_nothing(
    backbone: Backbone, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(Cancelled):
        _learn(backbone, pictures, tmp_path / "s", on_progress=_stop_at(1))
    before, limits = (tmp_path / "s").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"can't be written.*stopped at step 2"):
            _learn(backbone, pictures, tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "s").read_bytes() == before


@pytest.mark.parametrize(
    ("method", "meanwhile", "at_last"),
    [
        ("lora", 256, []),
        pytest.param("retention", 128, [256], marks=pytest.mark.slow),
        pytest.param("lora_dsc", 256, [256], marks=pytest.mark.slow),
    ],
)
def test_previews_show_both_and_change_nothing(
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    method: str,
    meanwhile: int,
    at_last: list[int],
) -> None:
    """Both concepts where the earlier one is drawn as it will be: while learning, or after what
    changes the adapter once more.
    """
    seen, quick = [], replace(QUICK, method=method, dsc_steps=2)
    first = requests.LearnRequest(checkpoint, pictures, "V1", "ball", quick, device="cpu")
    pipeline.learn_concept(first)
    second = replace(
        first, token="V2", stack=Path(shutil.copy(first.stack_file, tmp_path / "other"))
    )
    pipeline.learn_concept(
        replace(second, settings=replace(quick, preview_every=3)), lambda p: seen.append(p.preview)
    )
    pipeline.learn_concept(replace(second, stack=None))
    assert [p.size for p in seen if p] == [
        (width, 128) for width in [meanwhile] * (QUICK.steps // 3) + at_last
    ]
    with_previews, without = (
        store.open_stack(path) for path in (second.stack_file, first.stack_file)
    )
    assert with_previews.adapter
    assert without.adapter
    assert all(torch.equal(with_previews.adapter[k], t) for k, t in without.adapter.items())


def test_previews_show_the_prompts_that_are_asked_for(checkpoint: Path, pictures: Path) -> None:
    told: list[Progress] = []
    prompts = "a V1 ball on grass | a painting of a V1 ball| a V7 ball "
    settings = replace(QUICK, preview_every=QUICK.steps, preview_prompts=prompts)
    request = requests.LearnRequest(checkpoint, pictures, "V1", "ball", settings, device="cpu")
    learned = pipeline.learn_concept(request, told.append)
    drawn = [one.preview for one in told if one.preview]
    assert [one.size for one in drawn] == [(3 * 128, 128)]
    parts = [drawn[0].crop((left, 0, left + 128, 128)).tobytes() for left in (0, 128, 256)]
    assert len(set(parts)) == 3
    assert "V7" in " ".join(one.note for one in told)
    # they change nothing, so that the same is not learned again with others
    other = replace(request, settings=replace(QUICK, preview_every=2, preview_prompts="a V1 ball"))
    assert pipeline.learn_concept(other).record == learned.record


def test_all_of_a_long_preview_is_drawn(checkpoint: Path, pictures: Path) -> None:
    told: list[Progress] = []
    prompts = f"a V1 ball {'and grass ' * 50}| a V1 ball"
    settings = replace(QUICK, preview_every=QUICK.steps, preview_prompts=prompts)
    request = requests.LearnRequest(checkpoint, pictures, "V1", "ball", settings, device="cpu")
    pipeline.learn_concept(request, told.append)
    assert not any("too long" in one.note for one in told)
    assert any(one.preview for one in told)


def test_prompts_of_previews_that_are_never_drawn_are_refused(
    checkpoint: Path, pictures: Path
) -> None:
    settings = replace(QUICK, preview_prompts="a V1 ball")
    request = requests.LearnRequest(checkpoint, pictures, "V1", "ball", settings, device="cpu")
    for operation in (pipeline.learn_concept, pipeline.plan):
        with pytest.raises(SettingError, match="preview_every is 0"):
            operation(request)


def test_masks_weigh_the_loss(
    checkpoint: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A white mask changes nothing; with the right half masked out, the loss is the left half's, in
    the pictures and in their mirror images.
    """
    seen = []

    def spy(
        predicted: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        seen.append(
            (
                loss_per_example(predicted, noise),
                loss_per_example(predicted[..., :8], noise[..., :8]),
                loss_per_example(predicted[..., 8:], noise[..., 8:]),
                loss_per_example(predicted, noise, weight),
            )
        )
        return seen[-1][3]

    monkeypatch.setattr("comfy_continual_lora.learn.loss_per_example", spy)
    request = requests.LearnRequest(
        checkpoint,
        pictures,
        "V1",
        "ball",
        replace(QUICK, batch=8, steps=2, size=128, flip=True),
        device="cpu",
    )
    for path in list(pictures.iterdir()):
        Image.new("L", (128, 128), "white").save(path.with_suffix(".mask.png"))
    pipeline.learn_concept(request)
    assert all(torch.allclose(whole, weighed) for whole, _, _, weighed in seen)
    pipeline.undo(requests.UndoRequest(checkpoint))
    seen.clear()
    for path in pictures.glob("*.mask.png"):
        mask = Image.new("L", (128, 128))
        mask.paste(255, (0, 0, 64, 128))
        mask.save(path)
    pipeline.learn_concept(request)
    for _, left, right, weighed in seen:
        assert (
            ((weighed - left).abs() < 0.02 * left)
            .logical_or((weighed - right).abs() < 0.02 * right)
            .all()
        )
        assert not torch.allclose(weighed, left)  # a mirrored picture's mask is mirrored too


def test_the_same_request_is_known(checkpoint: Path, pictures: Path) -> None:
    request = requests.LearnRequest(checkpoint, pictures, "V1", "ball", QUICK, device="cpu")
    assert pipeline.learned_before(request) is None
    record = pipeline.learn_concept(request).record
    assert pipeline.learned_before(request) == record
    assert (
        pipeline.learned_before(
            replace(request, settings=replace(QUICK, snapshot_every=3, preview_every=1))
        )
        == record
    )
    assert pipeline.learned_before(replace(request, settings=replace(QUICK, seed=3))) is None

    @dataclass(frozen=True)
    class Later(LearnSettings):  # of a version with one setting more
        newer: float = 1.0

    assert pipeline.learned_before(replace(request, settings=Later(**asdict(QUICK)))) == record
    assert (
        pipeline.learned_before(replace(request, settings=Later(**asdict(QUICK), newer=2.0)))
        is None
    )
    (pictures / "0.txt").write_text("a ball")
    assert pipeline.learned_before(request) is None


def test_two_concepts_in_sequence_then_undo(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    first = requests.LearnRequest(checkpoint, pictures, "V1", "ball", QUICK, device="cpu")
    path = pipeline.learn_concept(first).stack_file
    fingerprint = store.read_header(path)["fingerprint"]
    after_one = store.load_stack(path, fingerprint)
    second = replace(first, images=save_concept(tmp_path / "other", 6), token="V2", noun="fish")
    pipeline.learn_concept(second)
    after_two = store.load_stack(path, fingerprint)
    assert list(after_two.tokens) == ["V1", "V2"]
    assert torch.equal(after_two.tokens["V1"], after_one.tokens["V1"])  # earlier words are frozen
    assert after_one.adapter
    assert after_two.adapter
    pool = after_two.pool[after_one.records[0].id]
    assert all(
        torch.equal(pool[k], t) and not torch.equal(after_two.adapter[k], t)
        for k, t in after_one.adapter.items()
        if k.endswith("B")
    )
    assert pipeline.undo(requests.UndoRequest(checkpoint)).token == "V2"
    undone = store.load_stack(path, fingerprint)
    assert undone.adapter
    assert all(torch.equal(undone.adapter[k], t) for k, t in after_one.adapter.items())
    assert (
        pipeline.info(requests.InfoRequest(checkpoint)).trainable_parameters
        == sum(t.numel() for t in after_one.adapter.values()) + 4 * TEXT_WIDTH
    )


def test_textual_inversion_learns_only_the_word(checkpoint: Path, pictures: Path) -> None:
    request = requests.LearnRequest(
        checkpoint, pictures, "V1", "ball", replace(QUICK, method="textual_inversion"), device="cpu"
    )
    path = pipeline.learn_concept(request).stack_file
    stack = store.load_stack(path, store.read_header(path)["fingerprint"])
    assert stack.adapter is None
    assert stack.tokens["V1"].shape == (4, TEXT_WIDTH)


def test_the_curve_is_kept_and_some_pictures_are_scored(checkpoint: Path, pictures: Path) -> None:
    """With the checkpoint that is loaded; neither changes what the request is, and a second one
    gives the same curve.
    """
    stages: list[str] = []
    request = requests.LearnRequest(
        checkpoint, pictures, "V1", "ball", replace(QUICK, method="lora"), device="cpu", score=2
    )
    result = pipeline.learn_concept(request, lambda progress: stages.append(progress.stage))
    assert result.scores is not None
    assert len(result.scores.images) == 2
    assert result.scores.images[0].scores.names[0] in ("V1", "c_0 ball")
    assert "V1 " in result.summary()
    assert len(result.as_json()["scores"]) == 2
    assert result.record.losses == [float(f"{loss:.5g}") for loss in result.losses]
    assert not {"load", "learn"} & set(stages[stages.index("score") :])
    again = pipeline.learn_concept(replace(request, score=0))
    assert again.again
    assert again.losses == result.record.losses


@pytest.mark.parametrize(
    "stop",
    [
        Cancelled("(score, step 1 of 8)"),
        RuntimeError("CUDA out of memory."),
        ConceptImagesError("a.png can't be read."),
    ],
)
def test_what_stops_the_scores_says_that_the_concept_is_stored(
    checkpoint: Path, pictures: Path, stop: Exception
) -> None:
    """Its snapshot is gone by then, so no run can resume."""
    request = requests.LearnRequest(
        checkpoint, pictures, "V1", "ball", replace(QUICK, method="lora"), device="cpu", score=1
    )
    notes = _Notes()

    def fail(progress: Progress) -> None:
        notes(progress)
        if progress.stage == "score":
            raise stop

    if isinstance(stop, Cancelled):
        with pytest.raises(Cancelled, match=r"step 1 of 8\) V1 is learned and stored, but its"):
            pipeline.learn_concept(request, fail)
    else:
        assert pipeline.learn_concept(request, fail).scores is None
        assert notes[-1].startswith("V1 is learned and stored, but its pictures were not scored: ")
        assert "snapshot" not in notes[-1]
    assert [record.token for record in store.read_records(request.stack_file)] == ["V1"]


def test_a_stack_that_was_replaced_while_learning_is_told_of(
    checkpoint: Path, pictures: Path
) -> None:
    """By a program that takes no lock, such as one that keeps folders of two computers the same."""
    settings = replace(QUICK, method="lora")
    request = requests.LearnRequest(checkpoint, pictures, "V1", "ball", settings, device="cpu")
    path = request.stack_file
    notes = _Notes()

    def replace_it(progress: Progress) -> None:
        notes(progress)
        if progress.stage == "learn":
            store.save_stack(make_stack(2), path)

    pipeline.learn_concept(request, replace_it)
    assert [record.token for record in store.read_records(path)] == ["V1"]
    assert "Another program replaced" in notes[-1]
    assert versions.versions(path)[1].tokens == ["V1", "V2"]
    notes.clear()
    pipeline.learn_concept(replace(request, token="V2"), notes)
    assert not any("Another program" in note for note in notes)


def test_mistakes_leave_the_stack_as_it_was(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    request = requests.LearnRequest(checkpoint, pictures, "V1", "ball", QUICK, device="cpu")
    path = pipeline.learn_concept(request).stack_file
    before = path.read_bytes()
    assert pipeline.learn_concept(request).again
    with pytest.raises(TokenError, match="taken"):
        pipeline.learn_concept(replace(request, noun="box"))
    with pytest.raises(TokenError, match="a word the checkpoint already knows"):
        pipeline.learn_concept(replace(request, token="mug"))
    with pytest.raises(SettingError, match="rank is 8, but"):
        pipeline.learn_concept(replace(request, token="V2", settings=replace(QUICK, rank=8)))
    with pytest.raises(SettingError, match="noun is empty"):
        pipeline.learn_concept(replace(request, token="V2", noun=" "))
    with pytest.raises(SettingError, match="steps is 0"):
        pipeline.learn_concept(replace(request, token="V2", settings=replace(QUICK, steps=0)))
    with pytest.raises(Cancelled):
        pipeline.learn_concept(replace(request, token="V2"), _stop_at(2))
    with store.writing(path), pytest.raises(StackError, match="Another program"):
        pipeline.learn_concept(replace(request, token="V2"))
    assert path.read_bytes() == before


def test_a_picture_can_be_given_as_a_list(checkpoint: Path, pictures: Path) -> None:
    request = requests.LearnRequest(
        checkpoint, sorted(pictures.glob("*.png"))[:2], "V1", "ball", QUICK, device="cpu"
    )
    assert pipeline.learn_concept(request).record.images == 2


@pytest.mark.slow
def test_pictures_of_several_shapes_keep_them_in_every_stage(
    checkpoint: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    from comfy_continual_lora import dsc, fisher

    seen: dict[str, set[tuple[int, ...]]] = {"learn": set(), "dsc": set(), "fisher": set()}
    for module in (sys.modules["comfy_continual_lora.learn"], dsc, fisher):
        name, noised = module.__name__.rsplit(".")[-1], module.noised

        def spy(*args, name=name, noised=noised):
            seen[name].add(tuple(args[1].shape[2:]))
            return noised(*args)

        monkeypatch.setattr(module, "noised", spy)
    settings = LearnSettings(
        method="lora_dsc_ewc_dc",
        steps=8,
        batch=3,
        rank=4,
        size=64,
        fit="bucket",
        flip=True,
        dsc_steps=8,
        fisher_samples=16,
    )
    for token in ("V1", "V2"):
        mixed = Path(shutil.copytree(folders[token], tmp_path / token))
        first, second = sorted(mixed.glob("*.png"))[:2]
        Image.open(first).crop((0, 32, 128, 96)).save(first)
        Image.open(second).crop((32, 0, 96, 128)).save(second)
        Image.new("L", (128, 64), "white").save(first.with_suffix(".mask.png"))
        pipeline.learn_concept(
            requests.LearnRequest(checkpoint, mixed, token, "ball", settings, device="cpu")
        )
    assert seen == {name: {(5, 11), (11, 5)} for name in seen}
    scored = pipeline.dc_scores(
        requests.ScoreRequest(
            checkpoint,
            tmp_path / "V1",
            ScoreSettings(trials=4, size=64, fit="bucket"),
            device="cpu",
        )
    ).images
    assert len(scored) == 2


def test_one_picture_is_no_pictures(checkpoint: Path, tmp_path: Path) -> None:
    folder = save_concept(tmp_path / "p", 0, 1)
    settings = LearnSettings(method="textual_inversion", steps=1, batch=1, size=64)
    request = requests.LearnRequest(checkpoint, folder, "V1", "ball", settings, device="cpu")
    assert "Learned V1 ball from 1 picture; stored in" in pipeline.learn_concept(request).summary()
    assert "1 picture, 1 step, tex" in pipeline.info(requests.InfoRequest(checkpoint)).summary()
