"""Stage 3: attach and detach are exact inverses, and an attached adapter is W0 + B A."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comfy_continual_lora.adapters.adapter import (
    KINDS,
    Adapter,
    attached,
    delta_weights,
    folded,
    kind_of,
    new_adapter,
    swapped_in,
)
from comfy_continual_lora.adapters.lora import joined
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone


def _random_adapter(backbone: Backbone, kind: str = "lora") -> Adapter:
    generator = torch.Generator().manual_seed(3)
    return {
        name: t + torch.randn(t.shape, generator=generator) * 0.05
        for name, t in new_adapter(backbone, 4, generator, kind).items()
    }


def _predict(backbone: Backbone) -> torch.Tensor:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(
            latents, torch.tensor([300]), backbone.encode_prompts(["a red mug"])
        )


def test_only_k_and_v_of_cross_attention(backbone: Backbone) -> None:
    assert len(backbone.kv_layers) == 14
    assert all(".attn2.to_k" in name or ".attn2.to_v" in name for name in backbone.kv_layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(backbone: Backbone, kind: str) -> None:
    before = _predict(backbone)
    with attached(backbone, new_adapter(backbone, 4, torch.Generator().manual_seed(0), kind)):
        assert torch.equal(_predict(backbone), before)


@pytest.mark.parametrize("kind", KINDS)
def test_detach_restores_every_bit_also_after_an_exception(backbone: Backbone, kind: str) -> None:
    before, keys = _predict(backbone), list(backbone.unet.state_dict())
    with (
        pytest.raises(KeyboardInterrupt),
        attached(backbone, _random_adapter(backbone, kind), trainable=True),
    ):
        assert not torch.equal(_predict(backbone), before)
        raise KeyboardInterrupt
    assert list(backbone.unet.state_dict()) == keys
    assert torch.equal(_predict(backbone), before)


@pytest.mark.parametrize("kind", KINDS)
def test_attached_and_folded_are_w0_plus_delta(backbone: Backbone, kind: str) -> None:
    adapter = _random_adapter(backbone, kind)
    assert kind_of(adapter).name == kind
    with attached(backbone, adapter) as parameters:
        assert all(torch.equal(parameters[name], tensor) for name, tensor in adapter.items())
        carried = _predict(backbone)
    before = _weights(backbone)
    with folded(backbone, adapter):
        for name, delta in delta_weights(backbone, adapter).items():
            assert torch.equal(backbone.kv_layers[name].weight, before[name] + delta)
        assert torch.allclose(carried, _predict(backbone), atol=1e-5)


def _weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in backbone.kv_layers.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_unfolding_restores_every_bit_also_after_an_exception(
    thin_file: Path, precision: str
) -> None:
    backbone = load_backbone(thin_file, device="cpu", precision=precision)
    adapter, before, state = _random_adapter(backbone), _weights(backbone), _state(backbone)
    with pytest.raises(KeyboardInterrupt), folded(backbone, adapter):
        for name, delta in delta_weights(backbone, adapter).items():
            weight, original = backbone.kv_layers[name].weight, before[name]
            assert weight.dtype == original.dtype
            assert torch.equal(weight, (original.float() + delta).to(weight.dtype))
        raise KeyboardInterrupt
    assert _state(backbone).keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in _state(backbone).items())


def _state(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in backbone.unet.state_dict().items()}


def test_an_adapter_that_does_not_fit_leaves_the_weights_as_they_were(backbone: Backbone) -> None:
    adapter, before = _random_adapter(backbone), _weights(backbone)
    last = list(backbone.kv_layers)[-1]
    adapter[f"{last}.A"] = adapter[f"{last}.A"][:, 1:]
    with pytest.raises(RuntimeError), folded(backbone, adapter):
        pass
    assert all(torch.equal(value, before[name]) for name, value in _weights(backbone).items())


def test_every_attached_tensor_gets_a_gradient_and_a_frozen_lora_below_gets_none(
    backbone: Backbone,
) -> None:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        frozen = _random_adapter(backbone) if kind == "lora" else None
        with attached(
            backbone, _random_adapter(backbone, kind), trainable=True, frozen_adapter=frozen
        ) as parameters:
            backbone.predict(
                latents, torch.tensor([300]), backbone.encode_prompts(["a red mug"])
            ).sum().backward()
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
            assert sum(p.requires_grad for p in backbone.unet.parameters()) == len(parameters)


def test_loras_add_up(backbone: Backbone) -> None:
    first, second = (
        _random_adapter(backbone),
        {k: -2 * v for k, v in _random_adapter(backbone).items()},
    )
    with attached(backbone, second, frozen_adapter=first):
        both = _predict(backbone)
    with attached(backbone, joined(first, second)):
        assert torch.allclose(_predict(backbone), both, atol=1e-5)


def test_a_teachers_prediction_comes_from_the_same_net(backbone: Backbone) -> None:
    student, teacher = (
        _random_adapter(backbone),
        {k: -v for k, v in _random_adapter(backbone).items() if k.endswith("A")},
    )
    teacher = {**student, **teacher}
    with attached(backbone, teacher):
        expected = _predict(backbone)
    with attached(backbone, student, trainable=True) as parameters:
        with swapped_in(parameters, teacher):
            assert torch.equal(_predict(backbone), expected)
        assert all(torch.equal(parameters[name], tensor) for name, tensor in student.items())
