"""Stage 3: the denoising objective.

    minimise over LoRA_n and V_n   E || eps - eps_theta(z_t, t, prompt with V_n) ||^2  +  penalties
                                                                              (Jha et al. 2025)

in: a backbone and `TrainingInputs` (latents and prompts of the images, the initial adapter and
word) - out: `Trained`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from .adapters.adapter import Adapter, attached, kind_of
from .adapters.lora import joined
from .checkpoint.backbone import Backbone
from .concepts import to_pil
from .diffusion import (
    generator_for,
    loss_per_example,
    noised,
    one_of,
    random_batch,
    timestep_weight,
)
from .errors import TrainingError
from .lossscale import LossScale
from .parallel import is_first
from .penalty import Penalty, Step
from .progress import OnProgress, Point, Progress
from .sample import draw
from .settings import DrawSettings, ResolvedSettings
from .training import Run, asked_for, compute_dtype, optimizer_for, precondition
from .watch import LOOKS, Names, Watch


@dataclass(frozen=True)
class TrainingInputs:
    """What is learned, and the starting point.

    Latents (c, h, w) and their prompts (latent i has prompts[i % len(prompts)]), the new token;
    `words` are the earlier ones (frozen); `adapter` and `word` are the initial ones.
    """

    latents: Sequence[Tensor]
    prompts: Sequence[Sequence[str]]
    token: str
    words: Mapping[str, Tensor]
    adapter: Adapter | None
    word: Tensor
    trains_adapter: bool = True
    penalties: Mapping[str, Penalty] = field(default_factory=dict)
    frozen_adapter: Adapter | None = None  # a LoRA under the new one
    previewed: Sequence[str] = ()  # prompts
    nouns: Mapping[str, str] = field(default_factory=dict)  # by word, of all concepts
    masks: Sequence[Tensor] | None = None  # (1, h, w): the weight of each latent pixel in the loss
    preconditioner: Tensor | None = None  # (d, d): coordinates of text space that A is trained in
    source: Mapping[str, str] = field(default_factory=dict)  # identifies the data (`source_of`)
    held_out: Sequence[Tensor] = ()  # latents that are looked at and not learned from (`watch`)
    held_out_masks: Sequence[Tensor] | None = None  # as `masks`
    names: Names | None = None  # in prompts, of what is looked at


@dataclass(frozen=True)
class Trained:
    """The result of a run: the adapter (None if there was none and the method trains none), the
    word's vectors, the loss of every step.
    """

    adapter: Adapter | None
    word: Tensor
    losses: list[float]
    steps: int  # that the result has learned; fewer than the losses if the best version is kept
    points: Sequence[Point] = ()  # the looks at it


def learn(
    backbone: Backbone,
    inputs: TrainingInputs,
    settings: ResolvedSettings,
    snapshot: Path,
    on_progress: OnProgress,
) -> Trained:
    """Learn one concept.

    If `on_progress` raises, a snapshot is left and the exception passes through. The net keeps the
    dtype it learned with. Errors: TrainingError if learning diverges, or leaves the word as it was.
    """
    adapter = attached(
        backbone,
        inputs.adapter,
        trainable=inputs.trains_adapter,
        frozen_adapter=inputs.frozen_adapter,
    )
    with compute_dtype(backbone, settings), ExitStack() as contexts:
        watch = _watch(backbone, inputs, settings)
        factors = contexts.enter_context(adapter)
        frozen = None
        if inputs.frozen_adapter:
            frozen = {
                name: one.to(backbone.device, torch.float32)
                for name, one in inputs.frozen_adapter.items()
            }
        word = nn.Parameter(inputs.word.to(backbone.device, torch.float32, copy=True))
        run = _run(backbone, inputs, settings, snapshot, factors, word)
        if watch is not None:
            run.watch = watch
            watch.begin(lambda: {**inputs.words, inputs.token: word}, run.parameters)

        encode = _encoder(backbone, inputs, word)
        contexts.enter_context(backbone.text_aside())

        def terms(step: int, rows: slice) -> dict[str, Tensor]:
            return _terms(backbone, inputs, settings, factors, frozen, word, encode, step, rows)

        def report(progress: Progress) -> None:
            if settings.preview_every and progress.step % settings.preview_every == 0:
                words = {**inputs.words, inputs.token: word}
                image = preview(backbone, words, inputs.previewed, inputs.nouns)
                progress = replace(progress, preview=image)
            on_progress(progress)

        run.train(terms, settings.batch, report)
        steps = _keep_best(run, watch)
        learned = inputs.adapter
        if factors:
            learned = {name: value.detach().cpu().clone() for name, value in factors.items()}
        if inputs.frozen_adapter and learned:
            learned = joined(inputs.frozen_adapter, learned)
        vectors = word.detach().cpu().clone()
        _check_changed(vectors, inputs, settings, snapshot)
        return Trained(learned, vectors, run.losses, steps, watch.points if watch else ())


def _watch(backbone: Backbone, inputs: TrainingInputs, settings: ResolvedSettings) -> Watch | None:
    """Made before anything is attached; None if nothing is held out."""
    if not inputs.held_out or inputs.names is None:
        return None
    every = settings.watch_every or max(1, settings.steps // LOOKS)
    return Watch(
        backbone, inputs.held_out, inputs.names, every, settings.until, inputs.held_out_masks
    )


def _run(
    backbone: Backbone,
    inputs: TrainingInputs,
    settings: ResolvedSettings,
    snapshot: Path,
    factors: Mapping[str, nn.Parameter],
    word: nn.Parameter,
) -> Run:
    """The run with its trained parameters and learning rates."""
    groups = [{"params": [word], "lr": settings.token_rate, "weight_decay": 0.0}]
    trained = {"word": word}
    if inputs.trains_adapter:
        adapter = {"params": list(factors.values()), "lr": settings.rate, "weight_decay": 0.01}
        groups.append(adapter)
        trained |= factors
    optimizer = optimizer_for(groups, settings)
    if inputs.preconditioner is not None and inputs.adapter:
        part = f".{kind_of(inputs.adapter).preconditioned}"
        rows = [value for name, value in factors.items() if name.endswith(part)]
        precondition(inputs.preconditioner.to(backbone.device), optimizer, rows)
    asked = asked_for(backbone, settings, inputs.source, inputs.prompts)
    scale = LossScale(backbone.unet.dtype)
    return Run("learn", trained, optimizer, settings, settings.steps, scale, snapshot, asked)


def _keep_best(run: Run, watch: Watch | None) -> int:
    """Give the run's parameters the values of the best version that was looked at, if any was; returns
    the steps that they have learned.
    """
    if watch is None or not watch.best:
        return run.step
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(watch.best[name])
    return watch.best_step


def _check_changed(
    vectors: Tensor, inputs: TrainingInputs, settings: ResolvedSettings, snapshot: Path
) -> None:
    """Errors: TrainingError for a word that is as it was; the snapshot is removed, because the same
    run would end like this again.
    """
    is_same = torch.equal(vectors, inputs.word.float().cpu())
    if not (len(vectors) and settings.token_rate and is_same):
        return
    if is_first():
        snapshot.unlink(missing_ok=True)
    raise TrainingError(
        f"{inputs.token} was not learned: in {settings.steps} steps its vectors did not change. "
        "Nothing was stored, and the stack is unchanged. Check that the captions name it and "
        "that the pictures show it, or use a higher `token_rate` (it was "
        f"{settings.token_rate:g})."
    )


def _terms(
    backbone: Backbone,
    inputs: TrainingInputs,
    settings: ResolvedSettings,
    factors: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor] | None,
    word: Tensor,
    encode: Callable[[Sequence[str]], Tensor],
    step: int,
    rows: slice,
) -> dict[str, Tensor]:
    """The terms of a step's loss, means over these of its images."""
    generator = generator_for(settings.seed, step)
    drawn = random_batch(inputs.latents, settings.batch, generator)
    prompts = [
        one_of(inputs.prompts[int(picture) % len(inputs.prompts)], generator)
        for picture in drawn[0]
    ][rows]
    pictures, clean, timestep, noise = (part[rows] for part in drawn)
    noisy, target = noised(backbone, clean, noise, timestep)
    words = {**inputs.words, inputs.token: word}
    features = encode(prompts)
    mask = None
    if inputs.masks is not None:
        mask = torch.stack([inputs.masks[int(picture)] for picture in pictures])
    error = loss_per_example(backbone.predict(noisy, timestep, features), target, mask)
    weight = timestep_weight(backbone, timestep, settings.weighting)
    now = Step(factors, words, prompts, features, frozen)
    penalties = {name: penalty(now) for name, penalty in inputs.penalties.items()}
    return {"denoising": (error * weight).mean(), **penalties}


def preview(
    backbone: Backbone,
    words: Mapping[str, Tensor],
    prompts: Sequence[str],
    nouns: Mapping[str, str],
) -> Image:
    """These prompts as they are drawn now, side by side.

    It uses its own random draws, so a run with previews ends like one without.
    """
    settings = DrawSettings(steps=15).resolved(backbone.preset)
    pictures = draw(backbone, words, prompts, [0] * len(prompts), settings, nouns=nouns)
    return to_pil(torch.cat(list(pictures), dim=2))


def _encoder(
    backbone: Backbone, inputs: TrainingInputs, word: Tensor
) -> Callable[[Sequence[str]], Tensor]:
    """Prompts (n,) -> text features (n, t, d), with gradients into the word's vectors; if it has none,
    all are encoded now, and kept in main memory.
    """
    words = {**inputs.words, inputs.token: word}
    if not len(word):
        every = {prompt for prompts in inputs.prompts for prompt in prompts}
        known = {one: backbone.encode_prompts([one], words).cpu() for one in every}
        return lambda prompts: torch.cat([known[one] for one in prompts]).to(backbone.device)

    def encode(prompts: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))  # each is encoded once
        features = backbone.encode_prompts(distinct, words)
        return features[[distinct.index(p) for p in prompts]]

    return encode
