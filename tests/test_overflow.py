"""A layer that overflows in fp16 is computed in float32, and what does not overflow is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_learn import QUICK, learn_request, random_adapter, stack_of
from helpers_thin import write_thin
from torch import Tensor, nn

from comfy_continual_lora import pipeline
from comfy_continual_lora.adapters.adapter import attached, folded
from comfy_continual_lora.checkpoint import narrow
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.progress import Progress

FEED = "up_blocks.0.attentions.0.transformer_blocks.0.ff.net"
# What weights are multiplied by; in float32 the net's answer keeps its size
ONE = {f"{FEED}.0.proj": 200.0, f"{FEED}.2": 1 / 40_000}
STREAM = {"down_blocks.0.resnets.0.norm2": 2000.0, "down_blocks.0.resnets.0.conv2": 2000.0}


def answer(backbone: Backbone, features: Tensor | None = None) -> Tensor:
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    if features is None:
        features = backbone.encode_prompts(["a photo of a red mug", ""])
    return backbone.predict(noisy, torch.tensor([100, 700]), features)


def wide(backbone: Backbone) -> list[str]:
    """The layers, norms aside, that are computed in float32."""
    norms = (nn.GroupNorm, nn.LayerNorm)
    return [
        name
        for name, module in backbone.unet.named_modules()
        if "forward" in vars(module) and not isinstance(module, norms)
    ]


@pytest.mark.parametrize(
    ("factors", "count"), [(ONE, 2), (STREAM, 8)], ids=["one layer", "all that follows"]
)
def test_the_net_answers_as_in_float32(
    tmp_path: Path, factors: dict[str, float], count: int
) -> None:
    path = tmp_path / "mini.safetensors"
    write_thin(path, factors=factors)
    whole, half = (load_backbone(path, device="cpu", precision=one) for one in ("fp32", "fp16"))
    notes: list[str] = []
    half.tell = notes.append
    with torch.no_grad():
        expected = answer(whole)
        assert torch.allclose(answer(half), expected, atol=0.01)
        assert torch.equal(answer(half), answer(half))
    assert len(notes) == 1
    assert f"{count} of the net's layers overflow in fp16" in notes[0]
    assert len(wide(half)) == count
    assert half.unet.dtype == torch.float16
    sixteen = [p for p in half.unet.parameters() if p.dtype == torch.float16]
    assert len(sixteen) > 0.6 * len(list(half.unet.parameters()))
    features = half.encode_prompts(["a photo of a red mug", ""]).requires_grad_()
    answer(half, features).square().sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()

    narrow.recast(half.unet, torch.float16)
    assert len(wide(half)) == count
    narrow.recast(half.unet, torch.float32)
    assert not [module for module in half.unet.modules() if "forward" in vars(module)]
    with torch.no_grad():
        assert torch.allclose(answer(half), expected, atol=1e-4)


def test_what_does_not_overflow_stays_as_it_is(thin_file: Path) -> None:
    half = load_backbone(thin_file, device="cpu", precision="fp16")
    half.tell = pytest.fail
    with torch.no_grad():
        answer(half)
    assert not wide(half)


def test_layers_stored_in_eight_bits_are_widened_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "half_dtype", lambda _: torch.float16)
    path = tmp_path / "mini.safetensors"
    write_thin(path, factors=ONE)
    eighth = load_backbone(path, device="cpu", precision="fp8")
    with torch.no_grad():
        assert answer(eighth).isfinite().all()
    assert len(wide(eighth)) == 2
    assert {
        layer.weight.dtype for layer in eighth.unet.modules() if isinstance(layer, narrow.Narrow)
    } == {narrow.FP8}
    narrow.recast(eighth.unet, torch.float32)
    assert not wide(eighth)
    with torch.no_grad():
        assert answer(eighth).isfinite().all()


def test_an_answer_that_float32_can_not_mend_is_left_to_its_caller(thin_file: Path) -> None:
    half = load_backbone(thin_file, device="cpu", precision="fp16")
    half.tell = pytest.fail
    broken = half.encode_prompts(["a", "b"]) * float("nan")
    with torch.no_grad():
        assert not answer(half, broken).isfinite().any()
    assert not wide(half)


def test_an_adapter_comes_off_a_widened_layer(tmp_path: Path) -> None:
    path = tmp_path / "mini.safetensors"
    write_thin(path, factors=ONE)
    half = load_backbone(path, device="cpu", precision="fp16")
    half.tell = lambda _: None
    with torch.no_grad():
        plain = answer(half)
        with attached(half, random_adapter(half, "lora", 1)):
            assert not torch.equal(answer(half), plain)
        assert torch.equal(answer(half), plain)


def test_a_layer_that_is_widened_while_it_is_changed_gets_its_weights_back(tmp_path: Path) -> None:
    """The change makes K of one layer overflow: it is found while drawing, and stays wide."""
    path = tmp_path / "mini.safetensors"
    write_thin(path)
    half = load_backbone(path, device="cpu", precision="fp16")
    half.tell = lambda _: None
    adapter = random_adapter(half, "lora", 1)
    layer = next(iter(half.kv_layers))
    adapter[f"{layer}.B"] = 60_000.0 * adapter[f"{layer}.B"].sign()
    before = {name: one.weight.detach().clone() for name, one in half.kv_layers.items()}
    with torch.no_grad():
        plain = answer(half)
        with folded(half, adapter):
            assert answer(half).isfinite().all()
            assert layer in wide(half)
        assert torch.allclose(answer(half), plain, atol=0.01)
    for name, one in half.kv_layers.items():
        assert torch.equal(one.weight, before[name].to(one.weight.dtype))


def test_learning_tells_and_goes_on(tmp_path: Path, folders: dict[str, Path]) -> None:
    path = tmp_path / "mini.safetensors"
    write_thin(path, factors=ONE)
    settings = replace(QUICK, method="lora", precision="fp16", steps=3)
    told: list[Progress] = []
    pipeline.learn_concept(learn_request(path, folders, "V1", settings), told.append)
    (at,) = (n for n, one in enumerate(told) if "overflow in fp16" in one.note)
    assert f"the first of them {FEED}.0" in told[at].note
    assert all(one.stage == "load" for one in told[: at + 1])
    assert all(one.loss < 10 for one in told if one.stage == "learn")
    assert stack_of(path).tokens["V1"].isfinite().all()
