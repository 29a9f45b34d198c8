"""The benchmark's judgement of three things in one picture means what its name says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import judging
import numpy as np
import pytest
import three
import torch

from comfy_continual_lora.mini import world

JUDGES: Any = SimpleNamespace(features=judging.features_of)
CONCEPTS = world.concepts("development", 6)
SCENES = [
    three.Triple(tuple(CONCEPTS[first : first + 3]), ground)
    for first in range(0, 4)
    for ground in ("grass", "snow")
]


@pytest.mark.parametrize("wide", [True, False])
def test_real_pictures_are_right_and_exchanged_ones_wrong(wide: bool) -> None:
    real, turned = (
        three.judged(three.real_pictures(SCENES, wide, turn), SCENES, JUDGES) for turn in (0, 1)
    )
    assert real["near"] == pytest.approx(1, abs=1e-5)
    assert real["bled"] == real["bled_2"] == 0
    assert real["shapes"] > 0.8  # the reader has never seen such patterns
    assert turned["bled"] == 1
    assert turned["shapes"] < 0.2
    assert turned["near"] < 0.9


def test_pictures_of_three_have_them_side_by_side() -> None:
    looks = [concept.look for concept in CONCEPTS[:3]]
    drawn = three.draw_three(looks, "snow", np.random.default_rng(0))
    assert drawn.shape == (128, 192, 3)
    assert drawn.dtype == np.uint8
    pictures = torch.from_numpy(drawn).permute(2, 0, 1)[None].float()
    for columns in three.PLACES:
        assert pictures[:, :, judging.THING_ROWS, columns].shape == (1, 3, 66, 66)
        assert pictures[0, :, 66, columns].std() > 20  # not the ground
