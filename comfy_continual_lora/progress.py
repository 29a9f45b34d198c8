"""What a long job reports while it runs.

`on_progress` may raise `Cancelled` (or anything else) to stop the job.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Point:
    """A look at a run (`watch`): likeness to the pictures held out, 0 at the floor, and how far
    earlier concepts moved.
    """

    step: int
    likeness: float
    moved: float

    @property
    def note(self) -> str:
        """For people."""
        moved = f"; earlier concepts moved by {self.moved:.0%}" if self.moved else ""
        return f"Step {self.step}: likeness to the pictures held out {self.likeness:.1%}{moved}."


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


OnProgress = Callable[[Progress], None]


def ignore(_progress: Progress) -> None:
    """An `on_progress` that does nothing."""


def counted(number: int, noun: str) -> str:
    """ "1 picture", "2 pictures" """
    return f"{number} {noun}{'' if number == 1 else 's'}"
