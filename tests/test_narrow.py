"""Number formats: what is stored in fewer bits answers as it should, forward and backward, and
loading holds nothing twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers_families as families
import helpers_full_size as full_size
import pytest
import torch
from safetensors import safe_open
from torch import nn

from comfy_continual_lora.adapters.adapter import attached, new_adapter
from comfy_continual_lora.checkpoint import layout, narrow
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone

PROMPTS = ["a photo of a V1 mug on wood", ""]


def _answer(backbone: Backbone) -> torch.Tensor:
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return backbone.predict(
        noisy,
        torch.tensor([100, 700]),
        backbone.encode_prompts(["a photo of a red mug", "a teapot"]),
    )


def _stored(module: nn.Module) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_text_encoders_stay_as_small_as_in_the_file_and_lose_no_digit(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    path = families.write(kind, tmp_path / "half.safetensors", dtype)
    whole, half = (
        load_backbone(path, device="cpu", precision=precision) for precision in ("fp32", "bf16")
    )
    assert half.fingerprint == whole.fingerprint
    by_format = []
    for backbone in (whole, half):
        word = backbone.word_of_vocabulary("red")
        assert word is not None
        word.requires_grad_()
        features = backbone.encode_prompts(PROMPTS, {"V1": word})
        features.square().sum().backward()
        by_format.append((features, word.grad))
    assert torch.equal(by_format[0][0], by_format[1][0])
    assert torch.allclose(by_format[0][1], by_format[1][1], rtol=1e-5)
    for first, second in zip(whole.text_encoders, half.text_encoders, strict=True):
        assert _stored(second.model) < 0.52 * _stored(first.model)


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_the_fingerprint_is_that_of_the_file_in_every_format(tmp_path: Path, layout: str) -> None:
    path = families.write("sdxl", tmp_path / "half.safetensors", torch.float16)
    if layout == "folder":
        path = tmp_path / "folder"
        families.pipeline("sdxl").save_pretrained(path)
    fingerprints = {
        load_backbone(path, device="cpu", precision=precision).fingerprint
        for precision in ("fp32", "bf16", "fp16", "fp8")
    }
    assert len(fingerprints) == 1


def test_a_folder_in_shards_and_in_half_precision_loads_too(tmp_path: Path) -> None:
    pipe = families.pipeline("sd2")
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 2
    whole, shards = (load_backbone(tmp_path / name, device="cpu") for name in ("whole", "shards"))
    assert torch.equal(_answer(whole), _answer(shards))
    half = load_backbone(tmp_path / "shards", device="cpu", precision="bf16")
    assert torch.equal(half.encode_prompts(PROMPTS), whole.encode_prompts(PROMPTS))
    assert half.unet.dtype == torch.bfloat16


def test_eight_bits_are_close_and_half_as_large(mini_file: Path) -> None:
    whole, half, eighth = (
        load_backbone(mini_file, device="cpu", precision=precision)
        for precision in ("fp32", "bf16", "fp8")
    )
    assert eighth.unet.dtype == torch.bfloat16
    assert _stored(eighth.unet) < 0.6 * _stored(half.unet) < 0.32 * _stored(whole.unet)
    with torch.no_grad():
        expected = _answer(whole)
        error = [
            float((_answer(one) - expected).square().mean() / expected.square().mean()) ** 0.5
            for one in (half, eighth)
        ]
    assert 0 < error[0] < error[1] < 0.05, error
    for name, layer in eighth.kv_layers.items():
        assert torch.equal(layer.weight, half.kv_layers[name].weight)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1)])
def test_gradients_through_eight_bits_are_those_through_the_same_numbers_widened(
    layer: nn.Module,
) -> None:
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layer": layer})
    weight = layer.weight.detach().clone() * torch.tensor([1e-4, 1.0, 30.0, 1.0, 1.0, 1.0])[
        : len(layer.weight)
    ].view(-1, *[1] * (layer.weight.ndim - 1))
    narrow.put(holder, "layer.weight", weight, torch.float32, narrow.FP8)
    stored = holder["layer"]
    assert isinstance(stored, narrow.Narrow)
    assert stored.weight.dtype == narrow.FP8
    assert torch.allclose(stored.wide(), weight, rtol=2**-4, atol=0.002 * float(weight.abs().max()))
    x = torch.randn((3, 6) if isinstance(layer, nn.Linear) else (2, 4, 8, 8), requires_grad=True)
    answer = stored(x)
    (given,) = torch.autograd.grad(answer.square().sum(), x)
    narrow.put(holder, "layer.weight", stored.wide(), torch.float32)
    assert type(holder["layer"]) in (nn.Linear, nn.Conv2d)
    plain = holder["layer"](x)
    assert torch.equal(answer, plain)
    assert torch.allclose(
        given, torch.autograd.grad(plain.square().sum(), x)[0], rtol=1e-5, atol=1e-6
    )


def test_recast_goes_from_any_format_to_any_other(thin_file: Path) -> None:
    own = load_backbone(thin_file, device="cpu", precision="bf16")
    half = _answer(own)
    narrow.recast(own.unet, narrow.FP8)
    eighth = _answer(own)
    assert not torch.equal(half, eighth)
    before = [p.data_ptr() for p in own.unet.parameters()]
    narrow.recast(own.unet, narrow.FP8)
    assert [p.data_ptr() for p in own.unet.parameters()] == before
    narrow.recast(own.unet, torch.bfloat16)
    assert not any(isinstance(layer, narrow.Narrow) for layer in own.unet.modules())
    assert {p.dtype for p in own.unet.parameters()} == {torch.bfloat16}
    assert torch.allclose(_answer(own), eighth, atol=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_learns_on_eight_bits(thin_file: Path, checkpointing: bool) -> None:
    """Its gradient points where the whole net's does."""
    gradients = []
    for precision in ("fp32", "fp8"):
        own = load_backbone(thin_file, device="cpu", precision=precision)
        if checkpointing:
            own.unet.enable_gradient_checkpointing()
            own.unet.train()
        adapter = {
            name: t + 0.01
            for name, t in new_adapter(own, 4, torch.Generator().manual_seed(0)).items()
        }
        with attached(own, adapter, trainable=True) as factors:
            _answer(own).square().mean().backward()
            gradients.append(
                torch.cat([p.grad.flatten() for p in factors.values() if p.grad is not None])
            )
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.98


def test_every_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = families.write("sdxl", tmp_path / "x.safetensors", torch.float16), []

    class Spy:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Spy:
            self.file.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(layout, "safe_open", Spy)
    load_backbone(path, device="cpu", precision="bf16")
    assert len(read) == len(set(read)) > 100


def test_the_vae_is_on_the_device_only_while_it_works(
    thin_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, went = load_backbone(thin_file, device="cpu"), []
    to = nn.Module.to
    monkeypatch.setattr(
        nn.Module,
        "to",
        lambda self, *args: (
            went.append(str(args[0])) if self is own.vae else None,
            to(self, *args),
        )[1],
    )
    own.device = torch.device("cpu:0")
    own.decode_latents(torch.stack(own.encode_images(torch.zeros(1, 3, 64, 64))))
    assert went == ["cpu:0", "cpu"] * 2


# --- full size
# --------------------------------------------------------------------------------------------------

# ru_maxrss would begin with the parent's
MEASURE = """
import json, sys, torch
from comfy_continual_lora.checkpoint.load import load_backbone
def peak():
    lines = open("/proc/self/status")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
import diffusers.models, transformers.models.clip.modeling_clip
before = peak()
backbone = load_backbone(sys.argv[1], device="cpu", precision=sys.argv[2])
loaded = peak() - before
tensors = [t for part in backbone.parts for t in (*part.parameters(), *part.buffers())]
held = sum(t.numel() * t.element_size() for t in tensors)
with torch.no_grad():
    features = backbone.encode_prompts(["a photo of a red mug"])
    answer = backbone.predict(torch.randn(1, 4, 8, 8), torch.tensor([500]), features)
print(json.dumps({"loaded": loaded, "held": held, "finite": bool(answer.isfinite().all())}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory as Linux tells it")
def test_loading_a_full_size_sd15_takes_the_model_and_at_most_the_file_beside_it(
    tmp_path: Path,
) -> None:
    """GB: 2.1 the file in float16, 4.3 the model in float32, 2.3 in bf16, 1.5 in 8 bits."""
    path = full_size.write("sd1", tmp_path / "sd15.safetensors")
    size = path.stat().st_size
    try:
        for precision, share in (("fp32", 2.05), ("bf16", 1.12), ("fp8", 0.75)):
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, str(path), precision],
                capture_output=True,
                text=True,
                cwd=Path(__file__).parents[1],
            )
            assert done.returncode == 0, done.stderr
            memory = json.loads(done.stdout)
            print(precision, memory, size)
            assert memory["finite"]
            assert memory["held"] < share * size
            assert memory["loaded"] < memory["held"] + 1.2 * size
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("device", "capability", "hip", "expected"),
    [
        ("cuda", (7, 5), None, torch.float16),  # Turing: torch calls its emulation supported
        ("cuda", (8, 0), None, torch.bfloat16),
        ("cuda", (12, 0), None, torch.bfloat16),
        ("cuda", (7, 5), "6.2", torch.bfloat16),  # AMD counts otherwise
        ("xpu", None, None, torch.bfloat16),
        ("mps", None, None, torch.float32),
        ("cpu", None, None, torch.float32),
    ],
)
def test_auto_precision_is_what_the_device_has(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int] | None,
    hip: str | None,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert narrow.dtype_for("auto", torch.device(device)) == expected
