"""Stage 3: attach and detach are exact inverses, and an attached adapter is W0 + B A."""

from __future__ import annotations

import pytest
import torch

from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.lora import Adapter, attached, delta_weights, new_adapter


def _random_adapter(backbone: Backbone) -> Adapter:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(t.shape, generator=generator) * 0.05 for name, t in new_adapter(backbone, 4, generator).items()}


def _predict(backbone: Backbone) -> torch.Tensor:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(latents, torch.tensor([300]), backbone.encode_prompts(["a red mug"]))


def test_only_k_and_v_of_cross_attention(backbone: Backbone) -> None:
    assert len(backbone.kv_layers) == 8
    assert all(".attn2.to_k" in name or ".attn2.to_v" in name for name in backbone.kv_layers)


def test_a_new_adapter_changes_nothing(backbone: Backbone) -> None:
    before = _predict(backbone)
    with attached(backbone, new_adapter(backbone, 4, torch.Generator().manual_seed(0))):
        assert torch.equal(_predict(backbone), before)


def test_detach_restores_every_bit_also_after_an_exception(backbone: Backbone) -> None:
    before, keys = _predict(backbone), list(backbone.unet.state_dict())
    with pytest.raises(KeyboardInterrupt), attached(backbone, _random_adapter(backbone), trainable=True):
        assert not torch.equal(_predict(backbone), before)
        raise KeyboardInterrupt
    assert list(backbone.unet.state_dict()) == keys
    assert torch.equal(_predict(backbone), before)


def test_attached_is_w0_plus_b_a(backbone: Backbone) -> None:
    adapter = _random_adapter(backbone)
    with attached(backbone, adapter):
        carried = _predict(backbone)
    weights = {name: layer.weight for name, layer in backbone.kv_layers.items()}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    for name, delta in delta_weights(adapter).items():
        weights[name].data += delta
    folded = _predict(backbone)
    for name, weight in kept.items():
        weights[name].data.copy_(weight)
    assert torch.allclose(carried, folded, atol=1e-5)
