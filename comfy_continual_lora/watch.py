"""Stage 3: when is it done? How well the newest concept is known on pictures it does not learn from.

    likeness(s) = 1 - E[e | a photo of a V1 mug, after step s] / E[e | a photo of a mug, bare]
    moved(s)    = E || eps_s(V2 cup) - eps_0(V2 cup) ||^2 / E || eps_0(V2 cup) - eps(cup, bare) ||^2

e: the squared error of the predicted noise on the pictures held out, one in five, weighted by their
masks, at the same draws of timestep and noise at every look. The bare checkpoint is the floor, 0.
moved: the mean over the earlier concepts, before what the method does for them after learning; 1 is
as far as from their nouns. A look costs a forward pass for every draw, of the newest concept and of
up to four earlier ones, and uses no generator of the run, so it changes nothing of the run.

in: a backbone and the latents held out - out: `Watch`, which the training loop asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint.backbone import Backbone
from .diffusion import generator_for, loss_per_example, noised, stratified
from .progress import Point
from .snapshot import DamagedSnapshot, is_like

HELD_OUT = 5  # one picture in this many
DRAWS = 24
LOOKS = 20  # in a run, unless the user says otherwise
Words = Callable[[], Mapping[str, Tensor]]  # the words by token, as they are now
PATIENCE = 3  # looks without a new best one
MOST_EARLIER = 4


def held_out(count: int) -> list[int]:
    """The numbers of the pictures to hold out of `count`, none of fewer than five."""
    return list(range(HELD_OUT - 1, count, HELD_OUT))


@dataclass(frozen=True)
class Names:
    """As prompts name it: the newest concept and its noun, and earlier ones with theirs."""

    newest: tuple[str, str]
    earlier: Sequence[tuple[str, str]] = ()


class Watch:
    """Looks at a run. It is made before anything is attached to the U-Net."""

    @torch.no_grad()
    def __init__(
        self,
        backbone: Backbone,
        latents: Sequence[Tensor],
        names: Names,
        every: int,
        until: str,
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        """Latents (c, h, w) of the pictures held out, and masks (1, h, w) if pictures have any."""
        self.backbone, self.names, self.every, self.until = backbone, names, every, until
        self.points: list[Point] = []
        self.best: dict[str, Tensor] = {}
        draws = stratified(DRAWS, generator_for("watch", 0))
        self.batches, self.weights = [], []
        for number, timestep in enumerate(draws):
            clean = latents[number % len(latents)][None]
            self.weights.append(masks and masks[number % len(masks)][None])
            noise = torch.randn(clean.shape, generator=generator_for("watch", number + 1))
            time = timestep[None].to(backbone.device)
            self.batches.append((*noised(backbone, clean, noise.to(clean), time), time))
        self.floor = self._error(names.newest[1], {})
        earlier = names.earlier[:MOST_EARLIER]
        self.nouns = [self._predicted(noun, {}) for _, noun in earlier]
        self.first: list[Tensor] = []

    @torch.no_grad()
    def begin(self, words: Words, trained: Mapping[str, Tensor]) -> None:
        """Before the first step, with the adapter that the run starts from; `trained` are the
        parameters, which change in place.
        """
        self.words, self.trained = words, trained
        earlier = self.names.earlier[:MOST_EARLIER]
        self.first = [self._predicted(name, words()) for name, _ in earlier]

    def _due(self, step: int, steps: int) -> bool:
        """Whether to look after this step; not twice."""
        looked = bool(self.points) and self.points[-1].step >= step
        return step > 0 and not looked and (step % self.every == 0 or step == steps)

    @torch.no_grad()
    def look(self, step: int, steps: int) -> str:
        """Look if it is due, and say what was seen; the best version of what is trained is kept if
        the run ends when it is good.
        """
        if not self._due(step, steps):
            return ""
        words = self.words()
        likeness = 1 - self._error(self.names.newest[0], words) / self.floor
        moved = 0.0
        earlier = self.names.earlier[:MOST_EARLIER]
        for (name, _), noun, first in zip(earlier, self.nouns, self.first, strict=True):
            way = (first - noun).square().mean().clamp(min=1e-9)
            moved += float((self._predicted(name, words) - first).square().mean() / way)
        point = Point(step, likeness, moved / max(1, len(earlier)))
        if self.until == "good" and likeness > max((p.likeness for p in self.points), default=-1e9):
            self.best = {name: value.detach().cpu().clone() for name, value in self.trained.items()}
        self.points.append(point)
        return point.note

    @property
    def best_step(self) -> int:
        """The step of the best look so far."""
        return max(self.points, key=lambda point: point.likeness).step

    @property
    def done(self) -> bool:
        """Whether the run has to end: the likeness no longer rises."""
        if self.until != "good" or not self.points:
            return False
        steps = [point.step for point in self.points]
        return len(steps) - 1 - steps.index(self.best_step) >= PATIENCE

    def _predicted(self, name: str, words: Mapping[str, Tensor]) -> Tensor:
        features = self.backbone.encode_prompts([f"a photo of a {name}"], words)
        parts = [self.backbone.predict(noisy, time, features) for noisy, _, time in self.batches]
        return torch.cat([part.flatten() for part in parts])

    def _error(self, name: str, words: Mapping[str, Tensor]) -> float:
        features = self.backbone.encode_prompts([f"a photo of a {name}"], words)
        errors = [
            loss_per_example(self.backbone.predict(noisy, time, features), target, weight)
            for (noisy, target, time), weight in zip(self.batches, self.weights, strict=True)
        ]
        return float(torch.cat(errors).double().mean())

    # --- in the run's snapshot --------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        if not self.points:
            return {}
        rows = [[p.step, p.likeness, p.moved] for p in self.points]
        points = torch.tensor(rows, dtype=torch.float64)
        return {"watch": points, **{f"best.{name}": value for name, value in self.best.items()}}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on from what was seen up to this step.

        Errors: DamagedSnapshot, with nothing changed, for what `state` would not give.
        """
        seen = tensors.get("watch", torch.zeros(0, 3))
        rows = seen.tolist() if seen.dim() == 2 and seen.is_floating_point() else [[0.0]]
        points = [Point(int(row[0]), *row[1:]) for row in rows if len(row) == 3]
        steps = [0, *(point.step for point in points)]
        if len(points) < len(rows) or steps != sorted(set(steps)) or steps[-1] > step:
            raise DamagedSnapshot("its looks at the run are none")
        best = {name: tensors.get(f"best.{name}") for name in self.trained}
        if points and self.until == "good":
            fits = all(is_like(best[name], value) for name, value in self.trained.items())
        else:
            fits = not any(name.startswith("best.") for name in tensors)
        if not fits:
            raise DamagedSnapshot("its best values do not fit this run")
        self.points = points
        self.best = {name: value for name, value in best.items() if value is not None}
