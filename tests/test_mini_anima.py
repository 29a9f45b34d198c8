"""What a trained Anima learns and keeps: the mini-Anima of `benchmarks/second/small.py`, found at
MINI_ANIMA or ~/mini-anima.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "sweeps"))
import sweep

FOLDER = Path(os.environ.get("MINI_ANIMA", "~/mini-anima")).expanduser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "transformer").is_dir(), reason="no mini-Anima at MINI_ANIMA or ~/mini-anima"
    ),
]


def test_a_concept_is_learned_and_kept() -> None:
    """The error on pictures that were not learned from falls, and the next concept leaves it there."""
    row = sweep.run({"method": "retention", "rate": 1e-3, "steps": 100}, 2, 0, FOLDER)
    print(row)
    assert row["learned_of_earlier"] > 0.01
    assert row["kept_of_earlier"] > 0.7 * row["learned_of_earlier"]
