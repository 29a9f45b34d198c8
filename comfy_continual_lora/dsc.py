"""Stage 5: Diffusion Scores Consolidation (DSC) - the net teaches itself: keep the newest concept,
and one of the earlier ones at a time.

    L_DSC =  tau (a1 H(p_T1, p_S) + a2 H(p_T2, p_S))                       cross-entropy of DC
    scores over C = {c_n, c_i, c_0}
           + b1 || eps_T1(z_t, c_n) - eps_S(z_t, c_n) ||^2                 keep the new concept
           + b2 || eps_T2(z_t, c_i) - eps_S(z_t, c_i) ||^2                 keep the old one
           + the method's own penalty (EWC)

teacher 1 = LoRA_n as it was learned; teacher 2 = LoRA_i, i < n, from the pool; the student starts
from teacher 1. Only pictures of the newest concept
are used. All three speak through one net: the adapter's values are swapped, and each network's
prompts are one batch.
tau undoes the 1 / tau that the temperature puts on the gradient of H, as in distillation (Hinton et
al. 2015, arXiv 1503.02531, section 2): without
it the first two terms drown the others (benchmarks/LOG.md).
Source: Jha et al. 2025 (the slides' "DMC"), after Zhang et al. 2020 (Deep Model Consolidation,
arXiv 1903.07864).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .checkpoint.backbone import Backbone, FrozenText
from .classifier import errors, predictions, soft_cross_entropy
from .diffusion import generator_for, loss_per_example, noised, one_of, random_batch
from .learn import Run, asked_for, number_format, optimizer_for
from .lora import Adapter, attached, holding
from .methods.method import Penalty
from .progress import OnProgress
from .settings import TEMPLATES, LearnSettings


@dataclass(frozen=True)
class Teachers:
    """`newest` is LoRA_n and how prompts name its concept; `past` the pool, likewise; `noun` is
    c_0, the newest one's class noun.
    """

    newest: tuple[str, Adapter]
    past: Sequence[tuple[str, Adapter]]
    noun: str


def dsc_terms(
    student: Tensor, teacher1: Tensor, teacher2: Tensor, target: Tensor, tau: float
) -> dict[str, Tensor]:
    """The four terms, (n,) each: predictions (n, 3, 4, h, w) for c_n, c_i, c_0, target (n, 4, h,
    w).
    """
    own, first, second = (errors(p, target) for p in (student, teacher1, teacher2))
    return {
        "a1": tau * soft_cross_entropy(first, own, tau),
        "a2": tau * soft_cross_entropy(second, own, tau),
        **distillation_terms(student, teacher1[:, 0], teacher2[:, 1]),
    }


def distillation_terms(student: Tensor, teacher1: Tensor, teacher2: Tensor) -> dict[str, Tensor]:
    """b1 and b2, (n,) each: student (n, 2 or more, 4, h, w); teacher 1 for c_n, teacher 2 for c_i,
    (n, 4, h, w).
    """
    return {
        "b1": loss_per_example(student[:, 0], teacher1),
        "b2": loss_per_example(student[:, 1], teacher2),
    }


def consolidate(
    backbone: Backbone,
    latents: Sequence[Tensor],
    teachers: Teachers,
    text: FrozenText,
    tau: float | None,
    penalty: Penalty | None,
    settings: LearnSettings,
    snapshot: Path,
    on_progress: OnProgress,
    source: Mapping[str, str] | None = None,
) -> tuple[Adapter, list[float]]:
    """Run DSC; returns the student and the loss of every step. Without `tau` the two score terms
    are left out. The teachers are not changed.

    Stopped, it leaves a snapshot and goes on from it like learning does.
    """
    assert settings.rate is not None
    assert settings.dsc_steps is not None
    newest, adapter = teachers.newest
    n = max(1, (settings.batch or 1) // 3)
    weights = {
        "a1": settings.dsc_a1,
        "a2": settings.dsc_a2,
        "b1": settings.dsc_b1,
        "b2": settings.dsc_b2,
    }
    with number_format(backbone, settings), attached(backbone, adapter, trainable=True) as factors:
        optimizer = optimizer_for(
            [
                {
                    "params": list(factors.values()),
                    "lr": settings.rate * settings.dsc_rate,
                    "weight_decay": 0.0,
                }
            ],
            settings,
        )
        asked = asked_for(backbone, settings, source or {})
        run = Run(
            "consolidate",
            factors,
            optimizer,
            settings,
            settings.dsc_steps,
            backbone.gradient_scale,
            snapshot,
            asked,
        )

        def terms(step: int, rows: slice) -> dict[str, Tensor]:
            generator = generator_for(settings.seed, "dsc", step)
            chosen = (
                generator if settings.dsc_redraw == "step" else generator_for(settings.seed, "dsc")
            )
            old, past = one_of(teachers.past, chosen)
            _, clean, timestep, noise = (
                drawn[rows] for drawn in random_batch(latents, n, generator)
            )
            template = one_of(TEMPLATES, generator)
            features = text(
                [template.format(name) for name in (newest, old, *([teachers.noun] if tau else []))]
            )
            noisy, target = noised(backbone, clean, noise, timestep)

            def spoken(values: Mapping[str, Tensor], prompts: slice) -> Tensor:
                with holding(factors, values):
                    return predictions(backbone, noisy, timestep, features[prompts])

            if tau:
                first, second = spoken(adapter, slice(None)), spoken(past, slice(None))
                found = dsc_terms(
                    predictions(backbone, noisy, timestep, features), first, second, target, tau
                )
            else:
                first, second = spoken(adapter, slice(0, 1))[:, 0], spoken(past, slice(1, 2))[:, 0]
                found = distillation_terms(
                    predictions(backbone, noisy, timestep, features), first, second
                )
            found = {name: weights[name] * value.mean() for name, value in found.items()}
            return {**found, "penalty": penalty(factors)} if penalty else found

        run.train(terms, n, on_progress)
        return {name: p.detach().cpu().clone() for name, p in factors.items()}, run.losses
