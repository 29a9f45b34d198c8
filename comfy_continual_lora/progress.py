"""What a long job tells while it runs.

`on_progress` may raise `Cancelled` (or anything else) to stop the job.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Progress:
    """One report: step of steps; what is done; loss, its parts and rate while learning; seconds
    still to go, as far as can be told; a preview.
    """

    stage: str
    step: int
    steps: int
    loss: float | None = None
    rate: float | None = None
    seconds_left: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    preview: Image | None = None
    note: str = ""  # a sentence for the user, such as where a stopped run goes on


OnProgress = Callable[[Progress], None]


def ignore(_progress: Progress) -> None:
    """An `on_progress` that says nothing."""
