"""The shipped weights: small enough, loadable, and the same net in both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

from comfy_continual_lora.checkpoint import keys
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import parts, weights


def test_shipped_weights_are_at_most_40_mb() -> None:
    assert sum(p.stat().st_size for p in weights.SHIPPED.iterdir()) <= 40e6


def test_padding_the_slim_autoencoder_changes_nothing() -> None:
    torch.manual_seed(0)
    slim, full = parts.SlimAutoencoder(), AutoencoderTiny()
    full.load_state_dict(weights.tiny_state(slim.state_dict()))
    images, latents = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(slim.encode(images), full.encode(images).latents, atol=1e-6)
        assert torch.allclose(slim.decode(latents), full.decode(latents).sample, atol=1e-6)
    back = weights.slim_state(full.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in slim.state_dict().items())


def test_shipped_weights_unpack_and_pack_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.unpack(tmp_path)
    before = {path: load_file(path) for path in (weights.CHECKPOINT, weights.VISION)}
    for name in ("CHECKPOINT", "VISION"):
        monkeypatch.setattr(weights, name, tmp_path / "again" / getattr(weights, name).name)
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "again")
    weights.pack(tmp_path)
    for path, state in before.items():
        again = load_file(tmp_path / "again" / path.name)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.usefixtures("_float32_widening")
@pytest.mark.slow
def test_the_stock_layout_computes_the_same(mini: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "stock.safetensors"
    weights.write_checkpoint(path, stock=True)
    assert "channel_mult: [1, 3]" in path.with_suffix(".yaml").read_text()
    stock = load_backbone(path, device="cpu")
    assert stock.unet.config["block_out_channels"][0] == 320
    assert stock.unet.config["cross_attention_dim"] == stock.word_width == 768
    prompt, latents, timestep = (
        ["a photo of a red striped mug on wood"],
        torch.randn(1, 4, 16, 16),
        torch.tensor([400]),
    )
    features, wide = mini.encode_prompts(prompt), stock.encode_prompts(prompt)
    assert torch.allclose(features.repeat_interleave(3, 2), wide, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(
            mini.predict(latents, timestep, features),
            stock.predict(latents, timestep, wide),
            atol=1e-4,
        )


@pytest.fixture
def _float32_widening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to float16 after dividing is the file's business; the algebra is tested without it."""
    monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.float)


def test_the_layout_is_that_of_sd1(mini_file: Path) -> None:
    from safetensors import safe_open

    with safe_open(mini_file, framework="pt") as file:
        names = set(file.keys())
        assert (
            file.get_slice(
                "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
            ).get_shape()[0]
            == 49408
        )
    assert f"{keys.UNET_PREFIX}input_blocks.0.0.weight" in names
    assert f"{keys.UNET_PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight" in names
    assert f"{keys.VAE_PREFIX}taesd_decoder.1.weight" in names


def test_the_text_tower_mixes_tokens(backbone: Backbone) -> None:
    red, blue = backbone.encode_prompts(["a red mug on wood", "a blue mug on wood"])
    assert torch.equal(red[1], blue[1])  # causal: what comes before does not change
    assert (red[4] - blue[4]).abs().max() > 0.1  # what comes after does
