"""Stage 8: the checkpoint's own features tell things apart, whatever stands around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from comfy_continual_lora import likeness, metrics
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.mini import trainset, weights, world


def _nearest_is_same(seen: torch.Tensor, each: int) -> float:
    unit = F.normalize(seen, dim=1)
    which = torch.arange(len(seen)) // each
    return float((which[(unit @ unit.T).fill_diagonal_(-2).argmax(1)] == which).float().mean())


def test_the_nearest_picture_shows_the_same_thing(mini: Backbone) -> None:
    things = world.concepts("development")[:8]
    seen, by_clip = [], []
    for thing in things:
        pictures = np.stack(list(world.concept_pictures(thing, 3, seed=1)))
        shown = trainset.to_tensor(pictures)
        seen.append(likeness.features(mini, shown, thing.noun))
        by_clip.append(weights.vision_features(shown))
    found = _nearest_is_same(torch.cat(seen), 3)
    assert found > 0.85
    assert found > _nearest_is_same(torch.cat(by_clip), 3) + 0.3


def test_features_do_not_depend_on_the_batch_and_leave_the_net_alone(backbone: Backbone) -> None:
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hooks = sum(len(module._forward_hooks) for module in backbone.unet.modules())
    seen = likeness.features(backbone, pictures, "mug")
    assert seen.shape == (3, 2 * backbone.unet.config["block_out_channels"][0])
    assert torch.allclose(seen[1], likeness.features(backbone, pictures[1:2], "mug")[0], atol=1e-4)
    wide = [pictures[0], pictures[1, :, :, :32], pictures[2]]
    assert torch.allclose(likeness.features(backbone, wide, "mug")[2], seen[2], atol=1e-4)
    assert sum(len(module._forward_hooks) for module in backbone.unet.modules()) == hooks


def test_what_is_kept_is_small_and_read_with_care() -> None:
    seen = torch.randn(20, 640)
    text = likeness.packed(seen)
    assert len(text) < 30_000
    back = likeness.unpacked(text)
    assert back is not None
    assert torch.allclose(back, seen[: likeness.MOST_KEPT], atol=1e-2)
    for bad in ("", "3:AAAA", "x:AAAA", "1:****", "0:", "1:" + "AH4="):  # the last is infinite
        assert likeness.unpacked(bad) is None


def test_likeness_of_a_set_to_itself() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert metrics.own_similarity(x) == pytest.approx(1 / 3)
    assert np.isnan(metrics.own_similarity(x[:1]))
