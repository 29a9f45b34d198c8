"""What a long job reports while it runs.

`on_progress` may raise `Cancelled` (or anything else) to stop the job.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

RESUMED = ("learn", "calibrate", "consolidate", "fisher")  # stages a stopped run resumes from


@dataclass(frozen=True)
class Point:
    """A look at a run (`watch`).

    `likeness` to the pictures held out is the share of the bare checkpoint's error that is gone,
    0 at the floor; `moved` is how far earlier concepts moved.
    """

    step: int
    likeness: float
    moved: float

    @property
    def note(self) -> str:
        """For people."""
        moved = f"; earlier concepts moved by {self.moved:.0%}" if self.moved else ""
        return (
            f"Step {self.step}: predicts the pictures held out {self.likeness:.1%} better than the bare "
            f"checkpoint{moved}."
        )


@dataclass(frozen=True)
class Progress:
    """One report of a job."""

    stage: str
    step: int
    steps: int
    loss: float | None = None  # while learning, as are rate and parts
    rate: float | None = None  # learning rate
    seconds_left: float | None = None  # an estimate, if there is one
    parts: dict[str, float] = field(default_factory=dict)  # of the loss
    preview: Image | None = None
    note: str = ""  # a sentence for the user, such as where a stopped run resumes

    def in_words(self) -> str:
        """One line: learning 120/300, loss .12, 2 min left."""
        parts = [_STAGES.get(self.stage, self.stage)]
        if self.steps > 1:
            parts[0] += f" {self.step}/{self.steps}"
        if self.loss is not None:
            parts.append(f"loss {self.loss:.2g}".replace(" 0.", " ."))
        if self.seconds_left is not None and self.step < self.steps:
            parts.append(duration(self.seconds_left) + " left")
        return ", ".join(parts)


_STAGES = {
    "load": "loading",
    "language": "reading ordinary prompts",
    "learn": "learning",
    "calibrate": "calibrating scores",
    "fisher": "measuring what matters",
    "consolidate": "consolidating",
    "solve": "solving for all concepts",
    "preview": "drawing a preview",
    "score": "scoring pictures",
    "evaluate": "drawing and comparing",
    "draw": "drawing",
}
# How much of what is left a stage takes of a job's one bar
_SHARES = {"load": 0.02, "language": 0.1, "learn": 0.8, "score": 0.9, "evaluate": 0.9}


def duration(seconds: float) -> str:
    """About how long, in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def unit_for(seconds: float) -> tuple[str, int]:
    """The unit that a time is best told in, and how many seconds it has."""
    units = (("hours", 3600), ("minutes", 60), ("seconds", 1))
    return next(one for one in units if seconds >= 2 * one[1] or one[1] == 1)


class OneBar:
    """How much of a job with several stages is done, from 0 to 1; it never goes back.

    Which stages follow is not known, so each takes a share of what is left.
    """

    def __init__(self) -> None:
        self.done = 0.0
        self._stage, self._start, self._end = "", 0.0, 0.0

    def __call__(self, progress: Progress) -> float:
        if progress.stage != self._stage:
            self._stage, self._start = progress.stage, self.done
            self._end = self.done + _SHARES.get(progress.stage, 0.5) * (1 - self.done)
        share = progress.step / max(1, progress.steps)
        self.done = max(self.done, self._start + share * (self._end - self._start))
        return self.done


OnProgress = Callable[[Progress], None]


def ignore(_progress: Progress) -> None:
    """An `on_progress` that does nothing."""


def counted(number: int, noun: str) -> str:
    """ "1 picture", "2 pictures" """
    return f"{number} {noun}{'' if number == 1 else 's'}"
