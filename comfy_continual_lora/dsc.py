"""Stage 5: Diffusion Scores Consolidation (DSC): the net distils itself, to keep the newest concept
and one of the earlier ones at a time.

    L_DSC =  tau (a1 H(p_T1, p_S) + a2 H(p_T2, p_S))                       cross-entropy of DC scores
                                                                           over C = {c_n, c_i, c_0}
           + b1 || eps_T1(z_t, c_n) - eps_S(z_t, c_n) ||^2                 keep the new concept
           + b2 || eps_T2(z_t, c_i) - eps_S(z_t, c_i) ||^2                 keep the old one
           + the method's own penalty (EWC)

Teacher 1 is LoRA_n as it was learned; teacher 2 is LoRA_i, i < n, from the pool; the student starts
from teacher 1. Only pictures of the newest concept are used. All three predict with one net: the
adapter's values are swapped, and each network's prompts are one batch. The factor tau undoes the
1 / tau that the temperature puts on the gradient of H, as in distillation (Hinton et al. 2015, arXiv
1503.02531, section 2): without it the first two terms are far larger than the others
(benchmarks/LOG.md).

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
    """LoRAs, each with how prompts name its concept."""

    newest: tuple[str, Adapter]  # c_n and LoRA_n
    past: Sequence[tuple[str, Adapter]]  # the pool: c_i and LoRA_i
    noun: str  # c_0, the newest concept's class noun


def dsc_terms(
    student: Tensor, teacher1: Tensor, teacher2: Tensor, target: Tensor, tau: float
) -> dict[str, Tensor]:
    """The four terms, (n,) each: predictions (n, 3, 4, h, w) for c_n, c_i, c_0, target (n, 4, h, w)."""
    own, first, second = (errors(p, target) for p in (student, teacher1, teacher2))
    return {
        "a1": tau * soft_cross_entropy(first, own, tau),
        "a2": tau * soft_cross_entropy(second, own, tau),
        **distillation_terms(student, teacher1[:, 0], teacher2[:, 1]),
    }


def distillation_terms(student: Tensor, teacher1: Tensor, teacher2: Tensor) -> dict[str, Tensor]:
    """b1 and b2, (n,) each.

    Predictions: the student's (n, 2 or more, 4, h, w) for c_n, c_i, ...; teacher 1's for c_n and
    teacher 2's for c_i, each (n, 4, h, w).
    """
    return {
        "b1": loss_per_example(student[:, 0], teacher1),
        "b2": loss_per_example(student[:, 1], teacher2),
    }


@dataclass(frozen=True)
class _Loss:
    """The terms of a step as a function of the student's factors."""

    backbone: Backbone
    factors: Mapping[str, Tensor]
    latents: Sequence[Tensor]
    teachers: Teachers
    text: FrozenText
    tau: float | None
    penalty: Penalty | None
    settings: LearnSettings
    n: int  # pictures a step

    def terms(self, step: int, rows: slice) -> dict[str, Tensor]:
        """The weighted terms, scalars, over these `rows` of the step's n pictures."""
        settings = self.settings
        generator = generator_for(settings.seed, "dsc", step)
        each_step = settings.dsc_redraw == "step"
        old, past = one_of(
            self.teachers.past, generator if each_step else generator_for(settings.seed, "dsc")
        )
        _, clean, timestep, noise = (
            drawn[rows] for drawn in random_batch(self.latents, self.n, generator)
        )
        template = one_of(TEMPLATES, generator)
        newest, adapter = self.teachers.newest
        names = [newest, old, self.teachers.noun] if self.tau else [newest, old]
        features = self.text([template.format(name) for name in names])
        noisy, target = noised(self.backbone, clean, noise, timestep)

        def predict_as(values: Mapping[str, Tensor], prompts: slice) -> Tensor:
            with holding(self.factors, values):
                return predictions(self.backbone, noisy, timestep, features[prompts])

        if self.tau:
            teacher1 = predict_as(adapter, slice(None))
            teacher2 = predict_as(past, slice(None))
            student = predictions(self.backbone, noisy, timestep, features)
            terms = dsc_terms(student, teacher1, teacher2, target, self.tau)
        else:
            teacher1 = predict_as(adapter, slice(0, 1))[:, 0]
            teacher2 = predict_as(past, slice(1, 2))[:, 0]
            student = predictions(self.backbone, noisy, timestep, features)
            terms = distillation_terms(student, teacher1, teacher2)
        weights = {
            "a1": settings.dsc_a1,
            "a2": settings.dsc_a2,
            "b1": settings.dsc_b1,
            "b2": settings.dsc_b2,
        }
        terms = {name: weights[name] * term.mean() for name, term in terms.items()}
        return {**terms, "penalty": self.penalty(self.factors)} if self.penalty else terms


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
    """Run DSC; returns the student and the loss of every step. The teachers are not changed.

    Without `tau` the two score terms are left out. A cancelled run leaves a snapshot and resumes
    from it, as learning does.
    """
    assert settings.rate is not None
    assert settings.dsc_steps is not None
    _, adapter = teachers.newest
    n = max(1, (settings.batch or 1) // 3)
    with number_format(backbone, settings), attached(backbone, adapter, trainable=True) as factors:
        group = {
            "params": list(factors.values()),
            "lr": settings.rate * settings.dsc_rate,
            "weight_decay": 0.0,
        }
        run = Run(
            "consolidate",
            factors,
            optimizer_for([group], settings),
            settings,
            settings.dsc_steps,
            backbone.gradient_scale,
            snapshot,
            asked_for(backbone, settings, source or {}),
        )
        loss = _Loss(backbone, factors, latents, teachers, text, tau, penalty, settings, n)
        run.train(loss.terms, n, on_progress)
        return {name: p.detach().cpu().clone() for name, p in factors.items()}, run.losses
