"""One line and one bar for a job with several stages."""

from __future__ import annotations

import pytest

from comfy_continual_lora.curves import thinned
from comfy_continual_lora.progress import OneBar, Progress, duration


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (
            Progress("learn", 120, 300, 0.1234, 1e-3, 125.0),
            "learning 120/300, loss .12, 2 min left",
        ),
        (Progress("learn", 300, 300, 1.5, 1e-3, 0.0), "learning 300/300, loss 1.5"),
        (Progress("load", 0, 1), "loading"),
        (Progress("score", 8, 32), "scoring pictures 8/32"),
        (Progress("something new", 1, 2), "something new 1/2"),
    ],
)
def test_a_report_in_one_line(progress: Progress, line: str) -> None:
    assert progress.in_words() == line


def test_durations() -> None:
    assert [duration(s) for s in (0.2, 89, 100, 3600, 7200)] == [
        "1 s",
        "89 s",
        "2 min",
        "60 min",
        "2.0 h",
    ]


def test_one_bar_never_goes_back_and_most_of_it_is_learning() -> None:
    """Also where a stage begins again, or its number of steps changes."""
    bar, reached = OneBar(), []
    for stage, steps in (("load", 1), ("language", 64), ("learn", 300), ("calibrate", 24)):
        reached += [bar(Progress(stage, step, steps)) for step in range(steps + 1)]
        if stage == "learn":
            assert reached[-1] - reached[-301] > 0.6
    for _ in range(3):
        reached += [bar(Progress("score", step, 8)) for step in (0, 4, 8)]
    assert reached == sorted(reached)
    assert 0 < reached[0] + reached[-1] <= 1


def test_a_curve_is_kept_in_few_numbers() -> None:
    assert thinned([]) == []
    assert thinned([0.123456789, 2.0]) == [0.12346, 2.0]
    assert thinned([float(i) for i in range(1000)], most=4) == [124.5, 374.5, 624.5, 874.5]
    assert len(thinned([0.5] * 301)) == 200
