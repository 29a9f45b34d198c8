"""Adapters in eight bits: near, exact where they can be, and independent of other rows."""

from __future__ import annotations

import pytest
import torch

from comfy_continual_lora.adapters.packed import pack

RANK, WIDTH = 3, 40
OUTPUTS = {"a.to_k": 20, "b.to_k": 12, "b.to_v": 20}


def made(kind: str) -> dict[str, torch.Tensor]:
    """Rows of A and columns of B of very different sizes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = torch.tensor([1e-6, 1.0, 1e5])
    adapter = {}
    for layer, out in OUTPUTS.items():
        if kind == "full":
            adapter[f"{layer}.D"] = random(out, WIDTH)
        else:
            adapter[f"{layer}.A"] = random(RANK, WIDTH) * sizes[:, None]
            adapter[f"{layer}.B"] = random(out, RANK) / sizes
    return adapter


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_value_is_within_half_a_step(kind: str) -> None:
    adapter = made(kind)
    packed = pack(adapter)
    found = packed.adapter
    assert found.keys() == adapter.keys()
    for name, tensor in adapter.items():
        step = tensor.abs().amax(0 if name.endswith("B") else 1, keepdim=True) / 127
        assert ((found[name] - tensor).abs() <= 0.501 * step).all()
    assert {numbers.dtype for numbers in packed.numbers.values()} == {torch.int8}


def test_layers_stand_one_below_the_other_by_name() -> None:
    adapter = made("lora")
    packed, other = pack(adapter), pack(dict(reversed(adapter.items())))
    assert list(packed.outputs.items()) == list(OUTPUTS.items()) == list(other.outputs.items())
    assert packed.numbers["A"].shape == (len(OUTPUTS) * RANK, WIDTH)
    assert packed.numbers["B"].shape == (sum(OUTPUTS.values()), RANK)
    assert packed.scales["B"].shape == (len(OUTPUTS), RANK)
    assert all(torch.equal(packed.numbers[part], other.numbers[part]) for part in "AB")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_packed_stays_as_it_is_when_packed_again(kind: str) -> None:
    once = pack(made(kind))
    again = pack(once.adapter)
    assert all(torch.equal(again.numbers[part], one) for part, one in once.numbers.items())


def test_zeros_stay_zeros() -> None:
    packed = pack({"layer.A": torch.zeros(2, 3), "layer.B": torch.zeros(3, 2)})
    assert not any(tensor.any() for tensor in packed.adapter.values())
