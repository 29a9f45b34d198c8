"""Stage 8: draw pictures with a backbone, its adapter and its words, with diffusers' solvers.

Two learned things named in one prompt mix their looks, because text features mix, unless each is
drawn in the area where its noun is (`areas`). Prompts side by side have areas that the user gives,
each as large as one image; where they overlap, their predictions are blended at every step, so that
they become one scene.
Source: Bar-Tal et al. 2023 (MultiDiffusion, arXiv 2302.08113).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from .areas import FINE, AreaSettings
from .checkpoint.backbone import Backbone, DrawnText
from .errors import CheckpointError, excerpt
from .mentions import Mentions, mentions, noun_not_found
from .presets import BETA_END, BETA_START, TIMESTEPS
from .progress import OnProgress, Progress, ignore
from .settings import DrawSettings
from .together import drawn_together, out_of_sight

BATCH = 8
OVERLAP = 0.25  # of an area's width


Solver = DDIMScheduler | DPMSolverMultistepScheduler | FlowMatchEulerDiscreteScheduler


def make_solver(settings: DrawSettings, backbone: Backbone) -> Solver:
    """A flow is integrated by Euler's method, whatever the solver of the settings; the makers of
    rectified-flow fine-tunes know of no other that is reliable (bigASP 2.5's model card).
    """
    if backbone.prediction == "flow_prediction":
        assert settings.flow_shift is not None
        return FlowMatchEulerDiscreteScheduler(TIMESTEPS, shift=settings.flow_shift)
    schedule = {
        "num_train_timesteps": TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": backbone.prediction,
    }
    if backbone.zero_snr:
        schedule["rescale_betas_zero_snr"] = True
    # With a zero terminal SNR sampling has to start at the last timestep, in pure noise. With as many
    # steps as timesteps, diffusers' other spacings repeat a timestep or go past the last.
    if backbone.zero_snr or settings.steps == TIMESTEPS:
        schedule["timestep_spacing"] = "trailing"
    if settings.solver == "ddim":
        return DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return DPMSolverMultistepScheduler(**schedule, steps_offset=1)


@torch.no_grad()
def draw(
    backbone: Backbone,
    words: Mapping[str, Tensor],
    prompts: Sequence[str | Sequence[str]],
    seeds: Sequence[int],
    settings: DrawSettings,
    on_progress: OnProgress = ignore,
    nouns: Mapping[str, str] | None = None,
    areas: AreaSettings | None = None,
    on_drawn: Callable[[int, Tensor], object] = lambda *_: None,
) -> Tensor:
    """One picture for each prompt and its seed, (n, 3, height, width) in -1..1; `settings` are resolved.

    A picture does not depend on the others in the batch. Several prompts for a picture (equally many
    for all) are drawn from left to right, each in an area of its own. With
    `nouns`, the class noun of each word, several learned things in one prompt are kept apart, unless
    `settings.mixed`; `areas` says how, if not as usual. `on_drawn` gets each picture and its number
    as soon as it is drawn, not always in order.
    Classifier-free guidance (Ho & Salimans 2022): eps = eps(negative) + g (eps(prompt) -
    eps(negative)).
    Errors: CheckpointError for pictures that are not finite; SettingError for weights of a prompt
    that are too large.
    """
    assert settings.guidance is not None
    parts = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    count = len(parts[0])
    apart = {} if settings.mixed or count > 1 else nouns or {}
    areas = areas or AreaSettings(FINE[backbone.preset])
    drawing = _Drawing(backbone, DrawnText(backbone, words), settings, areas, on_progress, count)
    scene_of = {one: drawing.scene(one, apart) for one in dict.fromkeys(one[0] for one in parts)}
    scenes = [scene_of[one[0]] for one in parts]
    alike: dict[tuple[int, ...], list[int]] = {}  # pictures that can be drawn in one batch
    for number, scene in enumerate(scenes):
        alike.setdefault(drawing.kind(parts[number], scene), []).append(number)
    batch = max(1, BATCH // count)
    batches = [
        numbers[start : start + batch]
        for numbers in alike.values()
        for start in range(0, len(numbers), batch)
    ]
    drawing.total = settings.steps * len(batches)
    pictures: dict[int, Tensor] = {}
    for numbers in batches:
        drawn = drawing.batch(
            [parts[n] for n in numbers],
            [seeds[n] for n in numbers],
            [scene for n in numbers if (scene := scenes[n])],
        )
        for number, picture in zip(numbers, drawn, strict=True):
            pictures[number] = picture
            on_drawn(number, picture)
    return torch.stack([pictures[n] for n in range(len(parts))])


class _Drawing:
    """What all batches of a drawing share."""

    def __init__(
        self,
        backbone: Backbone,
        text: DrawnText,
        settings: DrawSettings,
        areas: AreaSettings,
        on_progress: OnProgress,
        count: int,
    ) -> None:
        """`count`: prompts for each picture."""
        self.backbone, self.text, self.settings, self.areas = backbone, text, settings, areas
        self.on_progress = on_progress
        side = settings.size or backbone.size
        # height and width of the latents, of one area if there are several
        self.size = (settings.height or side) // 8, (settings.width or side) // 8
        shares, self.sides = _areas(self.size[1], count)
        self.shares = shares.to(backbone.device)
        self.negative = text([settings.negative]) if settings.guidance != 1 else None
        self.done, self.total = 0, 0

    def scene(self, prompt: str, nouns: Mapping[str, str]) -> Mentions | None:
        """The things of a prompt that are to be kept apart, if any; a note if they can't be."""
        scene = mentions(prompt, nouns)
        if scene and (unseen := out_of_sight(self.backbone, scene)):
            self.on_progress(Progress("draw", 0, 1, note=noun_not_found(prompt, unseen)))
            return None
        return scene

    def kind(self, prompts: Sequence[str], scene: Mentions | None) -> tuple[int, ...]:
        """How many things of these prompts are kept apart, and the lengths of what is encoded."""
        if scene is None:
            return 0, self.text.length(prompts)
        texts = (scene.neutral, *scene.own)
        return len(scene.tokens), *(self.text.length([text]) for text in texts)

    def batch(self, parts: list[list[str]], seeds: list[int], scenes: Sequence[Mentions]) -> Tensor:
        """Pictures from these prompts; `scenes` are what they mention, if things are kept apart."""
        noise = [
            torch.randn(
                self.backbone.latent_channels,
                self.size[0],
                self.shares.shape[1],
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in seeds
        ]
        solver: Any = make_solver(self.settings, self.backbone)
        solver.set_timesteps(self.settings.steps)
        latents = torch.stack(noise).to(self.backbone.device)
        latents = latents * getattr(solver, "init_noise_sigma", 1.0)
        with self._predictor(parts, scenes) as predict:
            for timestep in solver.timesteps:
                seen = torch.cat([latents[..., side] for side in self.sides])
                predicted = predict(seen, timestep.to(self.backbone.device).expand(len(seen)))
                joined = torch.zeros_like(latents)
                areas = predicted.chunk(len(self.sides))
                for share, side, own in zip(self.shares, self.sides, areas, strict=True):
                    joined[..., side] += share[side] * own
                latents = solver.step(joined, timestep, latents).prev_sample
                self.done += 1
                self.on_progress(Progress("draw", self.done, self.total))
        pictures = self.backbone.decode_latents(latents)
        for prompts, *drawn in zip(parts, latents, pictures, strict=True):
            self._check_finite(prompts, drawn)
        return pictures

    def _check_finite(self, prompts: Sequence[str], drawn: Sequence[Tensor]) -> None:
        """`drawn`: a picture and its latent. Errors: CheckpointError for NaN or infinity."""
        if not all(one.isfinite().all() for one in drawn):
            raise CheckpointError(
                f"{self.backbone.path} can't draw {excerpt(' | '.join(prompts))}: it came out as "
                "infinite or NaN values, which would be a black picture. A lower guidance may help; "
                "if not, get the checkpoint again, or go back to an earlier version of its stack."
            )

    @contextmanager
    def _predictor(
        self, parts: list[list[str]], scenes: Sequence[Mentions]
    ) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """The guided prediction for (noisy, timestep) of all areas, one after the other."""
        guidance = self.settings.guidance
        assert guidance is not None

        def guided(rows: Tensor) -> Tensor:
            if self.negative is None:
                return rows
            low, high = rows.chunk(2)
            return low + guidance * (high - low)

        def unwanted(count: int) -> Tensor | None:
            return None if self.negative is None else self.negative.expand(count, -1, -1)

        if scenes:
            longest = 1 if self.negative is None else self.text.length([self.settings.negative])
            with drawn_together(
                self.backbone, self.text, scenes, self.size, self.areas, unwanted=longest
            ) as together:
                yield lambda noisy, t: guided(together.predict(noisy, t, unwanted(len(noisy))))
            return
        prompts = [one[k] for k in range(len(self.sides)) for one in parts]
        negatives = [] if self.negative is None else [self.settings.negative] * len(prompts)
        batches = self.text.batches([*negatives, *prompts])
        counts = [len(features) for features in batches]
        times = 2 if negatives else 1

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            seen = torch.cat([noisy] * times).split(counts)
            at = torch.cat([timestep] * times).split(counts)
            return guided(torch.cat([*map(self.backbone.predict, seen, at, batches)]))

        yield predict


def _areas(size: int, count: int) -> tuple[Tensor, list[slice]]:
    """Each area's weight at each column of the latents, (count, width), and its columns; `size` is
    an area's width.

    The weights of a column sum to 1.
    """
    overlap = int(size * OVERLAP)
    sides = [slice(k * (size - overlap), k * (size - overlap) + size) for k in range(count)]
    column = torch.arange(size)
    fading = torch.minimum(column + 1, size - column).clamp(max=overlap + 1).float()
    shares = torch.zeros(count, sides[-1].stop)
    for share, side in zip(shares, sides, strict=True):
        share[side] = fading
    return shares / shares.sum(0), sides
