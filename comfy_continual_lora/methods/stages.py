"""What several methods do with a concept after learning it: compare it with the earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import classifier, dsc
from ..adapters.adapter import Adapter, attached, kind_of, rank_of
from ..adapters.lora import padded_to_rank
from ..checkpoint.backbone import FrozenText
from ..fisher import FisherInputs, fisher
from ..penalty import Penalty
from ..settings import ResolvedSettings
from ..training import compute_dtype
from .method import Lesson


def text_of(lesson: Lesson) -> FrozenText:
    """Text features with the learned word."""
    words = {**lesson.session.stack.tokens, lesson.concept.token: lesson.word}
    return FrozenText(lesson.session.backbone, words)


def past_adapters(lesson: Lesson) -> list[tuple[str, Adapter]]:
    """The teachers of DSC: how prompts name each concept so far, and the adapter as it was then."""
    stack = lesson.session.stack
    past = [(record.name, stack.adapter_after(record.id)) for record in stack.records]
    return [(name, adapter) for name, adapter in past if adapter is not None]


def rows_at_once(settings: ResolvedSettings) -> int:
    """How many pictures go through the net at once in a step."""
    return max(1, settings.batch // settings.accumulate)


def temperature(lesson: Lesson) -> float:
    """For mean errors; summed errors at 1 are mean errors at 1 / (4 h w)."""
    tau = lesson.session.stack.tau
    assert tau is not None
    scales = {"calibrated": tau, "mean": 1.0, "sum": 1 / lesson.concept.latents[0].numel()}
    return scales[lesson.settings.dc_scale]


def calibrated(lesson: Lesson, adapter: Adapter | None) -> float:
    """The temperature of a stack that has none yet, from 128 draws, or as many as learning had.

    Twice a step's rows at once, as nothing is kept for a way back.
    """
    backbone, settings, concept = lesson.session.backbone, lesson.settings, lesson.concept
    draws = min(128, settings.steps * settings.batch)
    names = (lesson.record.name, lesson.record.noun)
    features = text_of(lesson)([f"a photo of a {name}" for name in names])
    with attached(backbone, adapter):
        errors = classifier.calibration_errors(
            backbone,
            concept.latents,
            features,
            draws,
            2 * rows_at_once(settings),
            lesson.session.on_progress,
        )
    return classifier.calibrate(errors)


def distilled(
    lesson: Lesson, adapter: Adapter, penalties: Mapping[str, Penalty], *, with_scores: bool
) -> tuple[Adapter, list[float]]:
    """The student of DSC, and the loss of every step."""
    past = past_adapters(lesson)
    if kind_of(adapter).name == "lora":
        past = [(name, padded_to_rank(one, rank_of(adapter))) for name, one in past]
    record, session = lesson.record, lesson.session
    return dsc.consolidate(
        session.backbone,
        lesson.concept.latents,
        dsc.Teachers((record.name, adapter), past, record.noun),
        text_of(lesson),
        temperature(lesson) if with_scores else None,
        penalties,
        lesson.settings,
        lesson.snapshots.path("dsc"),
        session.on_progress,
        lesson.concept.source,
    )


def fisher_of(lesson: Lesson, adapter: Adapter, *, with_scores: bool) -> Adapter:
    """What of the adapter the concept needs."""
    session, record = lesson.session, lesson.record
    inputs = FisherInputs(
        lesson.concept.latents,
        record.name,
        record.noun,
        [one.name for one in session.stack.records],
        temperature(lesson) if with_scores else None,
    )
    # its samples are single ones, so it takes fewer at a time; it watches layers, which a compiled
    # net has not
    changes: dict[str, Any] = {"batch": rows_at_once(lesson.settings), "compile": False}
    settings = replace(lesson.settings, **changes)
    backbone = session.backbone
    with (
        compute_dtype(backbone, settings),
        attached(backbone, adapter, trainable=True) as factors,
    ):
        return fisher(backbone, factors, inputs, text_of(lesson), settings, session.on_progress)
