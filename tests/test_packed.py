"""Adapters in eight bits: near, exact where they can be, and independent of other rows."""

from __future__ import annotations

import torch

from comfy_continual_lora.adapters.packed import pack


def test_every_value_is_within_half_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    adapter = {
        "layer.A": torch.randn(3, 40, generator=generator) * torch.tensor([[1e-6], [1.0], [1e5]]),
        "layer.B": torch.randn(20, 3, generator=generator) * torch.tensor([1e-3, 1.0, 50.0]),
        "other.D": torch.randn(6, 5, generator=generator),
    }
    packed = pack(adapter)
    for name, tensor in adapter.items():
        step = packed.scales[name]
        across = 0 if name.endswith("B") else 1
        assert torch.allclose(step, tensor.abs().amax(across, keepdim=True) / 127)
        assert ((packed.adapter[name] - tensor).abs() <= 0.501 * step).all()
        assert packed.numbers[name].dtype == torch.int8


def test_what_is_packed_stays_as_it_is_when_packed_again() -> None:
    tensor = torch.randn(30, 50, generator=torch.Generator().manual_seed(1))
    once = pack({"layer.A": tensor})
    again = pack(once.adapter)
    assert torch.equal(once.numbers["layer.A"], again.numbers["layer.A"])


def test_zeros_stay_zeros() -> None:
    packed = pack({"layer.A": torch.zeros(2, 3), "layer.B": torch.zeros(3, 2)})
    assert not any(tensor.any() for tensor in packed.adapter.values())
