"""Stages after learning that several methods share: calibration, DSC and Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .. import classifier, dsc
from ..adapters.adapter import Adapter, attached, kind_of, rank_of
from ..adapters.lora import padded_to_rank
from ..checkpoint.backbone import FrozenText
from ..fisher import FisherInputs, fisher
from ..penalty import Penalty
from ..settings import ResolvedSettings
from ..targets import own_adapters
from ..training import compute_dtype
from .method import LearnedConcept


def text_of(learned: LearnedConcept) -> FrozenText:
    """Text features with the learned word."""
    words = {**learned.session.stack.tokens, learned.concept.token: learned.word}
    return FrozenText(learned.session.backbone, words)


def past_adapters(learned: LearnedConcept) -> list[tuple[str, Adapter]]:
    """The past teachers of DSC: each concept's name in prompts, and its own adapter."""
    stack = learned.session.stack
    names = [record.name for record in stack.records]
    past = zip(names, own_adapters(stack), strict=True)
    return [(name, adapter) for name, adapter in past if adapter is not None]


def rows_at_once(settings: ResolvedSettings) -> int:
    """How many images go through the net at once in a step."""
    return max(1, settings.batch // settings.accumulate)


def temperature(learned: LearnedConcept) -> float:
    """For mean errors; summed errors at 1 are mean errors at 1 / (c h w)."""
    tau = learned.session.stack.tau
    assert tau is not None
    scales = {"calibrated": tau, "mean": 1.0, "sum": 1 / learned.concept.latents[0].numel()}
    return scales[learned.settings.dc_scale]


def calibrated(learned: LearnedConcept, adapter: Adapter | None) -> float:
    """The temperature for a stack that has none yet, from 128 draws, but no more than learning had.

    Runs twice a step's rows at once, because there is no backward pass.
    """
    backbone, settings, concept = learned.session.backbone, learned.settings, learned.concept
    draws = min(128, settings.steps * settings.batch)
    names = (learned.record.name, learned.record.noun)
    features = text_of(learned)([f"a photo of a {name}" for name in names])
    with attached(backbone, adapter):
        errors = classifier.calibration_errors(
            backbone,
            concept.latents,
            features,
            draws,
            2 * rows_at_once(settings),
            learned.session.on_progress,
        )
    return classifier.calibrate(errors)


def distilled(
    learned: LearnedConcept,
    adapter: Adapter,
    penalties: Mapping[str, Penalty],
    *,
    with_scores: bool,
) -> tuple[Adapter, list[float]]:
    """The student of DSC, and the loss of every step."""
    past = past_adapters(learned)
    if kind_of(adapter).name == "lora":
        past = [(name, padded_to_rank(one, rank_of(adapter))) for name, one in past]
    record, session = learned.record, learned.session
    return dsc.consolidate(
        session.backbone,
        learned.concept.latents,
        dsc.Teachers((record.name, adapter), past, record.noun),
        text_of(learned),
        temperature(learned) if with_scores else None,
        penalties,
        learned.settings,
        learned.snapshots.path("dsc"),
        session.on_progress,
        learned.concept.source,
    )


def fisher_of(learned: LearnedConcept, adapter: Adapter, *, with_scores: bool) -> Adapter:
    """The Fisher of the concept just learned."""
    session, record = learned.session, learned.record
    inputs = FisherInputs(
        learned.concept.latents,
        record.name,
        record.noun,
        [one.name for one in session.stack.records],
        temperature(learned) if with_scores else None,
    )
    # its hooks on layers do not work in a compiled net
    settings = replace(learned.settings, compile=False)
    backbone = session.backbone
    with (
        compute_dtype(backbone, settings),
        attached(backbone, adapter, trainable=True) as factors,
    ):
        return fisher(backbone, factors, inputs, text_of(learned), settings, session.on_progress)
