"""Stage 8: masks from attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from comfy_continual_lora.areas import Areas, AreaSettings

NOUNS = torch.zeros(1, 2, 77).index_put(
    (torch.zeros(2).long(), torch.tensor([0, 1]), torch.tensor([3, 6])), torch.ones(2)
)


def _attention(size: tuple[int, int]) -> Tensor:
    """Left to position 3, right to position 6, the rest to the start: (1, places, 77)."""
    height, width = size
    share = torch.zeros(1, height, width, 77)
    share[..., 0] = 0.8
    share[:, :, : width // 2, 3] = 0.2
    share[:, :, width // 2 :, 6] = 0.2
    return share.flatten(1, 2)


def _settled(size: tuple[int, int], fine: int = 1) -> Areas:
    areas = Areas(NOUNS, size, AreaSettings(fine))
    seen = (-(-size[0] // fine), -(-size[1] // fine))
    areas.see(_attention(seen))
    areas.settle()
    return areas


@pytest.mark.parametrize(
    ("size", "fine"), [((16, 16), 1), ((12, 20), 1), ((64, 96), 4), ((50, 38), 4)]
)
def test_each_thing_is_where_its_noun_is_attended_to(size: tuple[int, int], fine: int) -> None:
    areas = _settled(size, fine)
    for factor in (1, 2, 4, 8):
        count = -(-size[0] // factor) * -(-size[1] // factor)
        masks = areas.at(count)
        assert masks.shape == (1, 2, count)
        assert masks.min() >= 0
        assert masks.sum(1).max() <= 1 + 1e-6
        picture = masks.unflatten(2, (-(-size[0] // factor), -1))
        assert picture[0, 0, :, 0].min() > 0.9
        assert picture[0, 1, :, -1].min() > 0.9
        assert picture[0, 1, :, 0].max() < 0.1


def test_where_nothing_is_attended_to_there_is_no_area() -> None:
    areas = Areas(NOUNS, (16, 16), AreaSettings())
    attention = torch.zeros(1, 16, 16, 77)
    attention[:, :4, :4, 3] = 0.5
    attention[:, -4:, -4:, 6] = 0.1  # as much as it ever gets
    areas.see(attention.flatten(1, 2))
    areas.settle()
    masks = areas.at(256).unflatten(2, (16, 16))
    assert masks[0, 0, 0, 0] > 0.9
    assert masks[0, 1, -1, -1] > 0.9
    assert masks[0, :, 8, 8].max() < 0.02


def test_areas_follow_what_is_seen_over_all_steps() -> None:
    areas = _settled((16, 16))
    areas.see(_attention((16, 16)).flip(1))  # once the other way round
    areas.settle()
    undecided = areas.at(256).unflatten(2, (16, 16))
    assert torch.allclose(undecided[0, 0, :, 2], undecided[0, 1, :, 2], atol=1e-5)


def test_a_mix_is_the_neutral_output_outside_and_each_concept_s_inside() -> None:
    given = torch.zeros(1, 2, 8, 8)
    given[:, 0, :, :4] = 1
    areas = Areas(NOUNS, (16, 16), AreaSettings(), given=given)
    base, left, right = (torch.full((1, 256, 5), value) for value in (1.0, 2.0, 3.0))
    mixed = areas.mix(base, [left, right]).unflatten(1, (16, 16))
    assert mixed[:, :, :8].unique().tolist() == [2.0]
    assert mixed[:, :, 8:].unique().tolist() == [1.0]
    assert not areas.wanted(256)
    whole = areas.mix(base[:, :64], [left[:, :64], right[:, :64]])
    assert whole.unflatten(1, (8, 8))[:, :, :4].unique().tolist() == [2.0]


def test_given_masks_that_overlap_are_shared() -> None:
    areas = Areas(NOUNS, (16, 16), AreaSettings(), given=torch.ones(1, 2, 4, 4))
    assert areas.at(256).unique().tolist() == [0.5]
