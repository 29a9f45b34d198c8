"""What Anima takes: its plan, eight bits, checkpointing, and its text encoders while it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_anima as anima
import pytest
import torch
from helpers_learn import learn_request, plan_of
from safetensors.torch import load_file
from torch import nn

from comfy_continual_lora import cli, pipeline, requests
from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.checkpoint.anima import AnimaBackbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.errors import SettingError
from comfy_continual_lora.plan import Plan
from comfy_continual_lora.settings import LearnSettings

QUICK = LearnSettings(method="lora", steps=3, batch=2, rank=4, size=64, rate=3e-2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The net's, in bf16. No stack is to be left beside it."""
    return anima.write(tmp_path_factory.mktemp("anima"), dtype=torch.bfloat16)


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_weights_are_counted_as_they_will_be_held(file: Path, precision: str) -> None:
    planned = plan_of(file, replace(QUICK, precision=precision))
    own: Any = load_backbone(file, device="cpu", precision=precision)
    held = {
        "transformer": [own.unet],
        "VAE": [own.vae],
        "text encoders": [own.text_encoder, own.conditioner],
    }
    assert planned.weights.keys() == held.keys()
    for name, models in held.items():
        size = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
        assert planned.weights[name][0] == pytest.approx(size, rel=0.01)


def test_files_are_as_large_as_planned(
    file: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    request = replace(learn_request(file, folders, "V1", QUICK), stack=tmp_path / "s.safetensors")
    planned = pipeline.plan(request)
    done = pipeline.learn_concept(request)
    assert sum(t.nbytes for t in load_file(done.stack_file).values()) == planned.stack_file
    export = requests.ExportRequest(file, tmp_path / "out", stack=done.stack_file)
    lora = pipeline.export(export).lora
    assert lora
    factors = [t for name, t in load_file(lora).items() if not name.endswith(".alpha")]
    assert sum(t.nbytes for t in factors) == planned.exported


def test_what_lowers_memory_lowers_the_plan(file: Path) -> None:
    def kept(**change: Any) -> int:
        return plan_of(file, replace(QUICK, **change)).activations

    assert kept(size=256, checkpointing=True) < 0.8 * kept(size=256)  # of two blocks
    assert kept(accumulate=2) == pytest.approx(0.5 * kept(), rel=0.05)
    assert kept(precision="bf16") < kept(precision="fp32")
    assert kept(size=72) == kept(size=80)  # an odd side of latents is filled up


def test_beside_a_gpu_text_encoders_are_in_main_memory_while_it_learns(
    file: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("comfy_continual_lora.plan.pick_device", torch.device)
    monkeypatch.setattr("comfy_continual_lora.plan._speed", lambda *_: 1e12)
    settings = replace(QUICK, precision="bf16")
    planned: Plan = plan_of(file, settings, "cuda")
    assert planned.resting == ["VAE", "text encoders"]
    learning = planned.weights["transformer"][0] + planned.learned + planned.optimizer
    assert planned.peak == learning + planned.activations
    # not less than what is loaded
    tiny = plan_of(file, replace(settings, batch=1, checkpointing=True, rank=1), "cuda")
    assert tiny.peak >= sum(tiny.weights[name][0] for name in ("transformer", "text encoders"))
    command = ["learn", "--checkpoint", str(file), "--images", str(pictures), "--token", "V1"]
    command += ["--noun", "ball", "--device", "cuda", "--precision", "bf16", "--plan"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("in main memory while learning") == 2


def test_what_learning_refuses_has_no_plan(file: Path) -> None:
    for change in ({"vectors": 2}, {"method": "textual_inversion"}):
        with pytest.raises(SettingError, match="plain text"):
            plan_of(file, replace(QUICK, **change))


# --- eight bits and checkpointing ----------------------------------------------------------------


def test_an_adapter_learns_on_eight_bits_and_with_checkpointing(file: Path) -> None:
    """Its gradient points where the whole net's does, and is the same with checkpointing."""
    noisy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = {}
    for precision in ("fp32", "fp8"):
        own = load_backbone(file, device="cpu", precision=precision)
        features = own.encode_prompts(["a photo of a red mug", "a dog"])
        draws = torch.Generator().manual_seed(1)
        adapter = {
            f"{name}.{part}": 0.1 * torch.randn(shape, generator=draws)
            for name, layer in own.kv_layers.items()
            for part, shape in (("A", (4, layer.in_features)), ("B", (layer.out_features, 4)))
        }
        for checkpointing in (False, True):
            if checkpointing:
                own.unet.enable_gradient_checkpointing()
                own.unet.train()
            with attached(own, adapter, trainable=True) as factors:
                answer = own.predict(noisy, torch.tensor([100, 700]), features)
                answer.square().mean().backward()
                found = [p.grad.flatten() for p in factors.values() if p.grad is not None]
            assert len(found) == len(adapter)
            gradients[precision, checkpointing] = torch.cat(found)
    whole, eighth = gradients["fp32", False], gradients["fp8", False]
    assert float(torch.cosine_similarity(whole, eighth, dim=0)) > 0.98
    for precision, plain in (("fp32", whole), ("fp8", eighth)):
        torch.testing.assert_close(gradients[precision, True], plain)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_learning_with_checkpointing_is_the_same(
    file: Path, folders: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    losses = []
    for checkpointing in (False, True):
        settings = replace(QUICK, precision=precision, checkpointing=checkpointing)
        request = learn_request(file, folders, "V1", settings)
        stack = tmp_path / f"{checkpointing}.safetensors"
        losses.append(pipeline.learn_concept(replace(request, stack=stack)).losses)
    assert losses[0] == pytest.approx(losses[1])


# --- text encoders -------------------------------------------------------------------------------


def test_prompts_are_encoded_once_and_text_encoders_leave_the_device(
    file: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, to, happened = AnimaBackbone.encode_prompts, nn.Module.to, []

    def spy_encode(self: Any, prompts: Any, words: Any = None) -> torch.Tensor:
        happened.extend(prompts)
        return encode(self, prompts, words)

    def spy_to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self).__name__ in ("Qwen3Model", "AnimaTextConditioner"):
            happened.append(f"to {args[0]}")
        return to(self, *args, **kwargs)

    monkeypatch.setattr(AnimaBackbone, "encode_prompts", spy_encode)
    monkeypatch.setattr(nn.Module, "to", spy_to)
    settings = replace(QUICK, steps=20)
    request = learn_request(file, folders, "V1", settings)
    pipeline.learn_concept(replace(request, stack=tmp_path / "s.safetensors"))
    prompts = happened[: happened.index("to cpu")]
    assert 1 < len(prompts) == len(set(prompts))
    assert all("V1 ball" in prompt for prompt in prompts)
    assert happened[len(prompts) :][:4] == ["to cpu"] * 4


def test_a_prompt_is_encoded_where_the_text_encoders_are(file: Path) -> None:
    own = load_backbone(file, device="cpu")
    expected = own.encode_prompts(["a dog"])
    with own.text_aside():
        assert torch.equal(own.encode_prompts(["a dog"]), expected)
    assert torch.equal(own.encode_prompts(["a dog"]), expected)
