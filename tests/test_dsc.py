"""Stage 5: DSC's terms, and that consolidating changes the student alone, stops and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from comfy_continual_lora import dsc
from comfy_continual_lora.adapters.adapter import Adapter, new_adapter
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.errors import Cancelled
from comfy_continual_lora.progress import Progress, ignore
from comfy_continual_lora.settings import LearnSettings

SETTINGS = LearnSettings(batch=3, dsc_steps=4, snapshot_every=2).resolved("mini")


def _adapter(backbone: Backbone, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + torch.randn(t.shape, generator=generator) * 0.05
        for name, t in new_adapter(backbone, 4, generator).items()
    }


def _consolidate(
    backbone: Backbone,
    snapshot: Path,
    tau: float | None = 0.01,
    on_progress=ignore,
    past: int = 2,
    penalties=(),
):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    teachers = dsc.Teachers(
        ("red mug", _adapter(backbone, 0)),
        [(f"blue {n}", _adapter(backbone, i + 1)) for i, n in enumerate("ab"[:past])],
        "mug",
    )
    before = [{k: v.clone() for k, v in a.items()} for _, a in (teachers.newest, *teachers.past)]
    student, losses = dsc.consolidate(
        backbone,
        latents,
        teachers,
        FrozenText(backbone, {}),
        tau,
        dict(penalties),
        SETTINGS,
        snapshot,
        on_progress,
    )
    for (_, adapter), kept in zip((teachers.newest, *teachers.past), before, strict=True):
        assert all(torch.equal(adapter[name], t) for name, t in kept.items())
    return student, losses


def _predictions(seed: int) -> Tensor:
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_nothing_pulls_where_student_and_teachers_agree() -> None:
    teacher, noise = (
        _predictions(0),
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9)),
    )
    student = teacher.clone().requires_grad_()
    terms = dsc.dsc_terms(student, teacher, teacher, noise, 0.05)
    assert set(terms) == {"a1", "a2", "b1", "b2"}
    torch.stack(list(terms.values())).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7
    assert all(t.abs().max() < 1e-6 for t in terms.values())


def test_each_teacher_is_used_for_its_own_concept() -> None:
    student, first, second = _predictions(0), _predictions(1), _predictions(2)
    terms = dsc.dsc_terms(student, first, second, torch.zeros(2, 4, 8, 8), 0.05)
    assert torch.allclose(terms["b1"], (first[:, 0] - student[:, 0]).square().mean((1, 2, 3)))
    assert torch.allclose(terms["b2"], (second[:, 1] - student[:, 1]).square().mean((1, 2, 3)))
    errors = [p.square().mean((2, 3, 4)) for p in (student, first, second)]
    for name, teacher in (("a1", errors[1]), ("a2", errors[2])):
        p, q = torch.softmax(-teacher / 0.05, 1), torch.log_softmax(-errors[0] / 0.05, 1)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(1)
        assert torch.allclose(terms[name], 0.05 * (-(p * q).sum(1) - entropy), atol=1e-5)


@pytest.mark.parametrize("tau", [None, 0.01])
def test_only_the_student_changes_and_every_part_is_reported(
    backbone: Backbone, tmp_path: Path, tau: float | None
) -> None:
    events: list[Progress] = []
    student, losses = _consolidate(
        backbone,
        tmp_path / "s",
        tau,
        events.append,
        penalties={"size": lambda step: sum(p.square().sum() for p in step.factors.values())},
    )
    assert len(losses) == 4
    assert any(not torch.equal(t, _adapter(backbone, 0)[name]) for name, t in student.items())
    expected = {"b1", "b2", "size"} | ({"a1", "a2"} if tau else set())
    assert all(
        set(p.parts) == expected and sum(p.parts.values()) == pytest.approx(p.loss, rel=1e-4)
        for p in events
    )
    assert events[-1].stage == "consolidate"


def test_a_student_that_agrees_with_its_past_has_nothing_to_learn(
    backbone: Backbone, tmp_path: Path
) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    adapter = _adapter(backbone, 0)
    teachers = dsc.Teachers(("red mug", adapter), [("blue star", adapter)], "mug")
    _, losses = dsc.consolidate(
        backbone,
        latents,
        teachers,
        FrozenText(backbone, {}),
        0.01,
        {},
        SETTINGS,
        tmp_path / "s",
        ignore,
    )
    # later ones drift: Adam makes full steps of gradients that are rounding errors
    assert losses[0] < 1e-6


def test_stop_and_resume_equals_no_stop(backbone: Backbone, tmp_path: Path) -> None:
    whole, losses = _consolidate(backbone, tmp_path / "a")
    latents, prompt = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        backbone.encode_prompts(["a mug"]),
    )
    with torch.no_grad():
        before = backbone.predict(latents, torch.tensor([300]), prompt)

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        _consolidate(backbone, tmp_path / "b", on_progress=stop)
    with torch.no_grad():
        assert torch.equal(backbone.predict(latents, torch.tensor([300]), prompt), before)
    again, same = _consolidate(backbone, tmp_path / "b")
    assert losses == same
    assert all(torch.equal(whole[name], t) for name, t in again.items())
