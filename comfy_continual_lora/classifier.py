"""Stage 4: Diffusion Classifier (DC) scores: which concept an image shows, from the net's own noise
predictions.

    e_i(x; t, eps) = || eps - eps_theta(z_t, t, prompt_i) ||^2     with one z_t for all prompts, so
                                                                   that the comparison is paired
    p(c_i | x)     = softmax_i( - E_{t,eps}[e_i] / tau )

Shapes: n pictures (latents (n, c, h, w)), k prompts, s draws of (t, eps). Errors are means over c,
h, w, of whatever the net predicts (`diffusion`). tau is calibrated: the gaps between mean errors
are 1e-3 to 1e-2, so tau = 1 would make p uniform, and summed errors would saturate it.

Source: Li et al. 2023 (Diffusion Classifier, arXiv 2303.16203) for scores, pairing and staged
elimination; Jha et al. 2025 for their use in learning (`log_posterior`, `subset`,
`soft_cross_entropy`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint.backbone import Backbone, FrozenText
from .diffusion import generator_for, loss_per_example, noised, random_batch, stratified
from .presets import TIMESTEPS
from .progress import OnProgress, Progress, ignore
from .settings import ScoreSettings
from .stack import ConceptRecord

# what tau is calibrated to: the mean probability of the likeliest concept after one trial
CONFIDENCE = 0.7
# a picture that shows none of the concepts or their nouns, and the prompt that stands for it
NONE, NOTHING = "none of these", "a photo"


# --- scores as pure functions --------------------------------------------------------------------


def predictions(backbone: Backbone, noisy: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
    """The net's predictions for every picture and prompt, in one batch.

    noisy (n, c, h, w), timestep (n,), features (k, tokens, d) -> (n, k, c, h, w).
    """
    n, k = len(noisy), len(features)
    rows = backbone.predict(
        noisy.repeat_interleave(k, 0), timestep.repeat_interleave(k), features.repeat(n, 1, 1)
    )
    return rows.unflatten(0, (n, k))


def errors(predicted: Tensor, target: Tensor) -> Tensor:
    """e_i: predicted (n, k, c, h, w), target (n, c, h, w) -> (n, k)."""
    return loss_per_example(
        predicted.flatten(0, 1), target.repeat_interleave(predicted.shape[1], 0)
    ).unflatten(0, predicted.shape[:2])


def trial_errors(
    backbone: Backbone, latents: Tensor, noise: Tensor, timestep: Tensor, features: Tensor
) -> Tensor:
    """e_i of every picture at its own draw, (n, k).

    latents and noise (n, c, h, w), timestep (n,), features (k, tokens, d).
    """
    noisy, target = noised(backbone, latents, noise, timestep)
    return errors(predictions(backbone, noisy, timestep, features), target)


def log_posterior(error: Tensor, tau: float) -> Tensor:
    """log p(c_i | x): error (n, k) -> (n, k)."""
    return torch.log_softmax(-error / tau, -1)


def soft_cross_entropy(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """H(p_T, p_S) - H(p_T): errors (n, k) of both -> (n,).

    It has the gradient of H and is zero if both agree.
    """
    target = log_posterior(teacher.detach(), tau)
    return (target.exp() * (target - log_posterior(student, tau))).sum(-1)


def subset(previous: Sequence[str], k: int, generator: torch.Generator) -> list[str]:
    """At most k - 2 of the previous concepts, in random order; c_0 and c_n make it k."""
    order = torch.randperm(len(previous), generator=generator)[: max(0, k - 2)]
    return [previous[int(i)] for i in order]


def calibrate(error: Tensor) -> float:
    """The tau at which the likeliest concept has probability 0.7 on average over one-trial errors
    (n, k).

    The mean falls from 1 to 1/k, at most a half, as tau grows, so bisection finds it.
    """
    low, high = 1e-8, 1e4
    for _ in range(100):
        tau = (low * high) ** 0.5
        if float(log_posterior(error, tau).exp().amax(-1).mean()) > CONFIDENCE:
            low = tau
        else:
            high = tau
    return (low * high) ** 0.5


@torch.no_grad()
def calibration_errors(
    backbone: Backbone,
    latents: Sequence[Tensor],
    features: Tensor,
    draws: int,
    rows: int,
    on_progress: OnProgress = ignore,
) -> Tensor:
    """One-trial errors (draws, k) of the concept's own pictures, for `calibrate`.

    features: prompts (k, tokens, d); the net sees at most `rows` rows at once.
    """
    trials = []
    done = 0
    for number, start in enumerate(range(0, draws, 8)):  # batches of eight, of one shape each
        drawn = random_batch(latents, min(8, draws - start), generator_for("calibrate", number))[1:]
        for clean, timestep, noise in zip(
            *(part.split(max(1, rows // len(features))) for part in drawn), strict=True
        ):
            trials.append(trial_errors(backbone, clean, noise, timestep, features))
            done += len(clean)
            on_progress(Progress("calibrate", done, draws))
    return torch.cat(trials)


# --- which of my concepts is in this picture? ----------------------------------------------------


def side_of(records: Sequence[ConceptRecord], usual: int) -> int:
    """The side in pixels of the pictures to score: that of the ones tau was calibrated on, the first
    learned concept's, whose errors and adapter are those of another size. `usual`: the checkpoint's.
    """
    sides = [one.settings["size"] for one in records if "size" in one.settings]  # none if imported
    side = (sides[0] if sides else None) or usual
    return side - side % 8


@dataclass(frozen=True)
class Scores:
    """The scores of one picture. All lists are in order of likelihood."""

    names: list[str]
    probabilities: list[float]
    trials: list[int]
    margin: float  # mean paired difference of the error, second likeliest minus likeliest
    margin_low: float | None  # its 95 % interval; one trial has none
    margin_high: float | None

    @property
    def best(self) -> str:
        return self.names[0]

    @property
    def sure(self) -> bool:
        """Whether the margin's interval excludes zero."""
        return self.margin_low is not None and self.margin_low > 0


def prompts_of(records: Sequence[ConceptRecord]) -> dict[str, str]:
    """What `classify` compares, by the names that people read: each concept's token, "another mug"
    for its class noun without it, and `NONE` for a picture of something else.
    """
    prompts = {record.token: f"a photo of a {record.name}" for record in records}
    nouns = filter(None, (record.noun for record in records))
    prompts |= {f"another {noun}": f"a photo of a {noun}" for noun in nouns}
    return {**prompts, NONE: NOTHING}


def candidates(records: Sequence[ConceptRecord], text: FrozenText) -> dict[str, Tensor]:
    """The prompts (tokens, d) that `classify` compares, named as in `prompts_of`."""
    prompts = prompts_of(records)
    return dict(zip(prompts, text(list(prompts.values())), strict=True))


@torch.no_grad()
def classify(
    backbone: Backbone,
    latent: Tensor,
    features: Mapping[str, Tensor],
    tau: float,
    settings: ScoreSettings,
    on_progress: OnProgress = ignore,
) -> Scores:
    """Score one picture (c, h, w) against named prompts (tokens, d) with the attached adapter.

    All share timesteps and noise; after each stage the worse half drops out. A candidate that
    dropped out keeps the mean of its trials, relative to the best one's on the same trials.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    names, trials = list(features), settings.trials
    timestep = stratified(trials, generator)
    noise = torch.randn((trials, *latent.shape), generator=generator)
    weight = (1 - timestep / TIMESTEPS) if settings.weighting == "linear" else torch.ones(trials)
    error = torch.full((trials, len(names)), torch.nan)
    alive = list(range(len(names)))
    done = 0
    for stop in _stages(trials, len(names), settings.stages):
        prompts = torch.stack([features[names[i]] for i in alive])
        per_call = max(1, settings.rows // len(alive))
        for start in range(done, stop, per_call):
            part = slice(start, min(stop, start + per_call))
            t, eps = timestep[part].to(backbone.device), noise[part].to(backbone.device)
            clean = latent.to(backbone.device).expand_as(eps)
            for first in range(0, len(alive), settings.rows):
                some = slice(first, first + settings.rows)
                trial = trial_errors(backbone, clean, eps, t, prompts[some])
                error[part, alive[some]] = trial.cpu()
            on_progress(Progress("score", part.stop, trials))
        done = stop
        means = _weighted(error[:done, alive], weight[:done])
        keep = means.argsort()[: max(2, (len(alive) + 1) // 2)]
        alive = sorted(alive[int(i)] for i in keep) if done < trials else alive
    return _scores(names, error, weight, tau)


def _stages(trials: int, candidates: int, stages: int) -> list[int]:
    """The numbers of trials after which candidates drop out: trials / 2^j, at least 4, then all."""
    stops = [trials]
    while len(stops) < stages and candidates > 2 and stops[0] // 2 >= 4:
        stops.insert(0, stops[0] // 2)
    return stops


def _weighted(error: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the draws: (s, k) and (s,) -> (k,)."""
    return (weight[:, None] * error).sum(0) / weight.sum()


def _scores(names: list[str], error: Tensor, weight: Tensor, tau: float) -> Scores:
    """error (s, k), NaN if a candidate was not tried any more; weight (s,)."""
    trials = error.isfinite().sum(0)
    best = int(torch.where(trials == len(error), _weighted(error, weight), torch.inf).argmin())
    gaps = []
    for i, n in enumerate(trials.tolist()):
        gaps.append(_weighted((error[:n, [i]] - error[:n, [best]]), weight[:n])[0])
    gap = torch.stack(gaps)
    probability = torch.softmax(-gap / tau, 0)
    order = sorted(range(len(names)), key=lambda i: float(gap[i]) if i != best else -torch.inf)
    margin: tuple[float, float | None, float | None] = (0.0, None, None)
    if len(names) > 1:
        margin = _margin(error[:, order[1]] - error[:, best], weight)
    return Scores(
        [names[i] for i in order],
        [float(probability[i]) for i in order],
        [int(trials[i]) for i in order],
        *margin,
    )


def _margin(difference: Tensor, weight: Tensor) -> tuple[float, float | None, float | None]:
    """Weighted mean of the paired differences (s,), NaN if not tried, and its 95 % interval: None for
    one difference, which says nothing of how others would differ.

    The interval is a bootstrap's, because the differences are skewed.
    """
    n = int(difference.isfinite().sum())
    mean = float((weight[:n] * difference[:n]).sum() / weight[:n].sum())
    if n < 2:
        return mean, None, None
    pick = torch.randint(n, (2000, n), generator=torch.Generator().manual_seed(0))
    means = (weight[:n] * difference[:n])[pick].sum(1) / weight[:n][pick].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return mean, low, high
