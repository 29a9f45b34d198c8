"""The mini-SD with a text encoder of another width (benchmarks/second/wide.py), without training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import wide
from safetensors.torch import save_file
from torch import Tensor

from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import parts, weights
from comfy_continual_lora.mini.training import Run

PROMPTS = ["a photo of a red striped mug on wood", "a photo of a blue fish on sand"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A folder with the shipped parts, as `wide.look` leaves them."""
    monkeypatch.setattr(wide, "PICTURES", 48)
    weights.unpack(tmp_path)
    for name in ("clip", "unet"):
        (tmp_path / f"{name}.safetensors").rename(tmp_path / f"shipped-{name}.safetensors")
    return Run(tmp_path, torch.device("cpu"))


def _predicted(backbone: Backbone) -> Tensor:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone.encode_prompts(PROMPTS, {})
        return backbone.predict(latents, torch.tensor([500, 500]), features)


def _packed(run: Run, width: int) -> Backbone:
    wide.start_unet(run, width)
    (run.out / "unet.start.safetensors").rename(run.out / "unet.safetensors")
    wide.pack(run)
    return load_backbone(run.out / "wide.safetensors", device="cpu")


def test_with_the_shipped_text_tower_the_net_it_starts_from_is_the_shipped_one(
    run: Run, mini: Backbone
) -> None:
    shutil.copy(run.out / "shipped-clip.safetensors", run.out / "clip.safetensors")
    predicted, expected = _predicted(_packed(run, parts.TEXT_WIDTH)), _predicted(mini)
    assert float((predicted - expected).norm() / expected.norm()) < 0.02


def test_a_wider_text_tower_makes_a_checkpoint_of_that_width(run: Run) -> None:
    clip = parts.new_clip(text_width=384)
    save_file(
        {k: v.contiguous() for k, v in clip.state_dict().items()}, run.out / "clip.safetensors"
    )
    backbone = _packed(run, 384)
    assert backbone.word_width == backbone.unet.config["cross_attention_dim"] == 384
    assert _predicted(backbone).isfinite().all()
