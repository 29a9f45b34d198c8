"""Stage 5: Diffusion Scores Consolidation (DSC) - self-distillation that keeps the newest concept
and, at each step, one of the earlier ones.

    L_DSC =  tau (a1 H(p_T1, p_S) + a2 H(p_T2, p_S))        cross-entropy of DC scores over
                                                            C = {c_n, c_i, c_0}
           + b1 || eps_T1(z_t, c_n) - eps_S(z_t, c_n) ||^2  keep the new concept
           + b2 || eps_T2(z_t, c_i) - eps_S(z_t, c_i) ||^2  keep the old one
           + the method's own penalty (EWC)

Teacher 1 is LoRA_n as learned, teacher 2 is LoRA_i, i < n, from the pool; the student starts from
teacher 1. Only images of the newest concept are used. All three share one net: the adapter's values
are swapped in, and the prompts of each form one batch.

The factor tau undoes the 1 / tau that the temperature puts on the gradient of H, as in distillation
(Hinton et al. 2015, arXiv 1503.02531, section 2): without it the first two terms drown out the
others (benchmarks/LOG.md).

Source: Jha et al. 2025 (the slides' "DMC"), after Zhang et al. 2020 (Deep Model Consolidation,
arXiv 1903.07864).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .adapters.adapter import Adapter, attached, swapped_in
from .checkpoint.backbone import Backbone, FrozenText
from .classifier import errors, predictions, soft_cross_entropy
from .diffusion import generator_for, loss_per_example, noised, one_of, random_batch
from .lossscale import LossScale
from .penalty import Penalty, Step
from .presets import TEMPLATES
from .progress import OnProgress
from .settings import ResolvedSettings
from .training import Run, asked_for, compute_dtype, optimizer_for


@dataclass(frozen=True)
class Teachers:
    """`newest`: the name of c_n in prompts, and LoRA_n; `past`: the same for the pool; `noun`: c_0,
    the newest concept's class noun.
    """

    newest: tuple[str, Adapter]
    past: Sequence[tuple[str, Adapter]]
    noun: str


def dsc_terms(
    student: Tensor, teacher1: Tensor, teacher2: Tensor, target: Tensor, tau: float
) -> dict[str, Tensor]:
    """The four terms, (n,) each: predictions (n, 3, c, h, w) for c_n, c_i, c_0; target
    (n, c, h, w).
    """
    own, first, second = (errors(p, target) for p in (student, teacher1, teacher2))
    return {
        "a1": tau * soft_cross_entropy(first, own, tau),
        "a2": tau * soft_cross_entropy(second, own, tau),
        **distillation_terms(student, teacher1[:, 0], teacher2[:, 1]),
    }


def distillation_terms(student: Tensor, teacher1: Tensor, teacher2: Tensor) -> dict[str, Tensor]:
    """b1 and b2, (n,) each: student (n, 2 or more, c, h, w); teacher 1 for c_n and teacher 2 for
    c_i, (n, c, h, w).
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
    penalties: Mapping[str, Penalty],
    settings: ResolvedSettings,
    snapshot: Path,
    on_progress: OnProgress,
    source: Mapping[str, str] | None = None,
) -> tuple[Adapter, list[float]]:
    """Run DSC; returns the student and the loss of every step.

    Without `tau` the two score terms are left out. The teachers are not changed. A stopped run
    leaves a snapshot and resumes from it, as learning does.
    """
    pictures = max(1, settings.batch // 3)
    adapter = teachers.newest[1]
    with compute_dtype(backbone, settings), attached(backbone, adapter, trainable=True) as factors:
        rate = settings.rate * settings.dsc_rate
        group = {"params": list(factors.values()), "lr": rate, "weight_decay": 0.0}
        run = Run(
            "consolidate",
            factors,
            optimizer_for([group], settings),
            settings,
            settings.dsc_steps,
            LossScale(backbone.unet.dtype),
            snapshot,
            asked_for(backbone, settings, source or {}),
        )
        step_terms = _Terms(backbone, latents, teachers, text, tau, settings, factors, pictures)

        def terms(step: int, rows: slice) -> dict[str, Tensor]:
            own = step_terms(step, rows)
            return {**own, **{name: one(Step(factors)) for name, one in penalties.items()}}

        run.train(terms, pictures, on_progress)
        return {name: p.detach().cpu().clone() for name, p in factors.items()}, run.losses


@dataclass(frozen=True)
class _Terms:
    """The weighted terms of L_DSC, a number each."""

    backbone: Backbone
    latents: Sequence[Tensor]
    teachers: Teachers
    text: FrozenText
    tau: float | None
    settings: ResolvedSettings
    factors: Mapping[str, Tensor]
    pictures: int  # a step

    def __call__(self, step: int, rows: slice) -> dict[str, Tensor]:
        settings = self.settings
        generator = generator_for(settings.seed, "dsc", step)
        of_past = generator
        if settings.dsc_redraw == "once":
            of_past = generator_for(settings.seed, "dsc")
        old, past = one_of(self.teachers.past, of_past)
        drawn = random_batch(self.latents, self.pictures, generator)
        _, clean, timestep, noise = (part[rows] for part in drawn)
        template = one_of(TEMPLATES, generator)
        newest, adapter = self.teachers.newest
        names = [newest, old, *([self.teachers.noun] if self.tau else [])]
        features = self.text([template.format(name) for name in names])
        noisy, target = noised(self.backbone, clean, noise, timestep)

        def predict_as(values: Mapping[str, Tensor], prompts: slice) -> Tensor:
            with swapped_in(self.factors, values):
                return predictions(self.backbone, noisy, timestep, features[prompts])

        if self.tau:
            first, second = predict_as(adapter, slice(None)), predict_as(past, slice(None))
            student = predictions(self.backbone, noisy, timestep, features)
            terms = dsc_terms(student, first, second, target, self.tau)
        else:
            first = predict_as(adapter, slice(0, 1))[:, 0]
            second = predict_as(past, slice(1, 2))[:, 0]
            student = predictions(self.backbone, noisy, timestep, features)
            terms = distillation_terms(student, first, second)
        weights = {name: getattr(settings, f"dsc_{name}") for name in ("a1", "a2", "b1", "b2")}
        return {name: weights[name] * value.mean() for name, value in terms.items()}
