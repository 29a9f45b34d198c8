"""SD2.x and SDXL: what loads is what diffusers computes with, and everything that can be done with a checkpoint works on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import KINDS
from safetensors.torch import load_file, save_file

from comfy_continual_lora import sample
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.diffusion import alphas_cumprod, noised
from comfy_continual_lora.errors import CheckpointError
from comfy_continual_lora.settings import DrawSettings

PROMPTS = ["a photo of a red mug on wood", "", "a mug " * 90]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny single file of each kind. Not to be changed."""
    root = tmp_path_factory.mktemp("families")
    return {kind: families.write(kind, root / f"{kind}.safetensors") for kind in KINDS}


@pytest.fixture(scope="session")
def loaded(files: dict[str, Path]) -> dict[str, Backbone]:
    """Shared: a test that attaches something takes it out again."""
    return {kind: load_backbone(path, device="cpu") for kind, path in files.items()}


def _theirs(pipe: Any, prompts: list[str], noisy: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Text features, pooled text and prediction as the pipeline itself computes them."""
    features, _, *pooled = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = None
    if pooled:
        sizes = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 96)
        added = {"text_embeds": pooled[0], "time_ids": sizes.repeat(len(prompts), 1)}
    return features, pooled[0] if pooled else None, pipe.unet(noisy, timestep, features, added_cond_kwargs=added).sample


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_and_predictions_are_those_of_diffusers(loaded: dict[str, Backbone], tmp_path: Path, kind: str, layout: str) -> None:
    pipe, ours = families.pipeline(kind), loaded[kind]
    if layout == "folder":
        pipe.save_pretrained(tmp_path / "folder")
        ours = load_backbone(tmp_path / "folder", device="cpu")
        assert ours.fingerprint == loaded[kind].fingerprint
    noisy, timestep = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 500, 980])
    expected, pooled, answer = _theirs(pipe, PROMPTS, noisy, timestep)
    features = ours.encode_prompts(PROMPTS)
    assert torch.allclose(ours.context(features), expected, atol=1e-5)
    if pooled is not None:
        assert torch.allclose(features[:, 77, :96], pooled, atol=1e-5)
        assert not features[:, 77, 96:].any()
    predicted = ours.predict(noisy, timestep, features)
    assert torch.allclose(predicted, answer, atol=1e-5)
    assert not torch.allclose(predicted, ours.predict(noisy, timestep, features[[1, 0, 0]]), atol=1e-3)  # the text counts
    family, v = kind.split("-")[0], kind.endswith("-v")
    assert (ours.preset, ours.prediction, ours.zero_snr) == (family, "v_prediction" if v else "epsilon", kind == "sdxl-v")
    assert ours.word_widths == ([64, 128] if family == "sdxl" else [64])
    assert ours.vae.config["scaling_factor"] == (0.13025 if family == "sdxl" else 0.18215)


def test_sizes_suit_the_family_unless_the_file_says_otherwise(loaded: dict[str, Backbone], tmp_path: Path) -> None:
    assert {kind: one.size for kind, one in loaded.items()} == {"sd2": 512, "sd2-v": 768, "sdxl": 1024, "sdxl-v": 1024}
    said = families.write("sd2-v", tmp_path / "x.safetensors", **{"modelspec.resolution": "512x512", "modelspec.prediction_type": "epsilon"})
    backbone = load_backbone(said, device="cpu")
    assert (backbone.size, backbone.prediction) == (512, "epsilon")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_half_precision_and_weights_of_others_are_read_too(loaded: dict[str, Backbone], tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    path = families.write(kind, tmp_path / "half.safetensors", dtype)
    save_file({**load_file(path), "model_ema.decay": torch.ones(1), "cond_stage_model.logit_scale": torch.ones(1)}, path)
    half, whole = load_backbone(path, device="cpu"), loaded[kind]
    assert {p.dtype for part in half.parts for p in part.parameters()} == {torch.float32}
    features = whole.encode_prompts(PROMPTS)
    assert torch.allclose(half.encode_prompts(PROMPTS), features, atol=0.05 * float(features.abs().max()))


def test_weights_take_the_format_asked_for_and_the_vae_stays_in_float32(files: dict[str, Path]) -> None:
    backbone = load_backbone(files["sdxl"], device="cpu", dtype=torch.bfloat16)
    assert [next(part.parameters()).dtype for part in backbone.parts] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    assert backbone.encode_images(torch.zeros(1, 3, 64, 64)).isfinite().all()


def _without(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if part not in name}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "sdxl",
            lambda s: _without(s, "resblocks.1.attn.in_proj_weight"),
            "lacks 3 weights of its conditioner.embedders.1.model, the first is .*in_proj",
        ),
        ("sdxl", lambda s: _without(s, "text_projection"), "the first is conditioner.embedders.1.model.text_projection"),
        ("sdxl", lambda s: _without(s, "label_emb.0.2"), "lacks 2 weights .* model.diffusion_model.label_emb.0.2"),
        ("sdxl", lambda s: _without(s, "embedders.1."), "a U-Net without its text encoder"),
        ("sdxl", lambda s: {**s, "edm_mean": torch.zeros(1)}, "Playground v2.5"),
        ("sdxl", lambda s: {**s, "edm_vpred.sigma_max": torch.zeros(1)}, "CosXL"),
        ("sd2", lambda s: {**s, "embedder.model.visual.proj": torch.zeros(1)}, "SD2.x unCLIP.*take SD2.1"),
        ("sd2", lambda s: _without(s, "ln_final.bias"), "lacks 1 weights of its cond_stage_model.model, the first is .*ln_final.bias"),
        ("sd2", lambda s: {**s, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)}, "an inpainting model"),
        ("sd2", lambda s: {**s, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 5, 3, 3)}, "a depth model"),
    ],
)
def test_what_is_incomplete_or_only_alike_is_refused_by_name(files: dict[str, Path], tmp_path: Path, kind: str, change: Any, message: str) -> None:
    save_file(change(load_file(files[kind])), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path / "other.safetensors")


def test_a_file_cut_in_the_middle_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut.safetensors", files["sdxl"].read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"can't be read as safetensors .* download or copy it again"):
        load_backbone(cut)


def test_folders_of_other_pipelines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLInpaintPipeline"}')
    with pytest.raises(CheckpointError, match=r"holds a StableDiffusionXLInpaintPipeline\. Expected a StableDiffusionPipeline"):
        load_backbone(tmp_path)


# --- what is learned from -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_noising_and_target_are_those_of_the_scheduler(loaded: dict[str, Backbone], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    timestep, scheduler = torch.tensor([0, 500, 999]), families.pipeline(kind).scheduler
    noisy, target = noised(loaded[kind], clean, noise, timestep)
    assert torch.allclose(noisy, scheduler.add_noise(clean, noise, timestep), atol=1e-4)
    assert torch.allclose(target, scheduler.get_velocity(clean, noise, timestep) if kind.endswith("-v") else noise, atol=1e-4)
    if kind == "sdxl-v":  # at the last step nothing of the picture is left, and the picture is what is asked for
        assert torch.equal(noisy[2], noise[2])
        assert torch.equal(target[2], -clean[2])


def test_a_velocity_by_hand(loaded: dict[str, Backbone]) -> None:
    clean, noise = torch.full((1, 4, 8, 8), 2.0), torch.full((1, 4, 8, 8), 3.0)
    alpha = float(alphas_cumprod()[700])
    _, target = noised(loaded["sd2-v"], clean, noise, torch.tensor([700]))
    assert float(target[0, 0, 0, 0]) == pytest.approx(alpha**0.5 * 3 - (1 - alpha) ** 0.5 * 2, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_stands_in_every_encoder_and_gets_their_gradients(loaded: dict[str, Backbone], kind: str) -> None:
    backbone = loaded[kind]
    red = backbone.word_of_vocabulary("red")
    assert red is not None
    plain = backbone.encode_prompts(["a photo of a red mug"])
    assert torch.allclose(backbone.encode_prompts(["a photo of a V1 mug"], {"V1": red}), plain, atol=1e-6)
    word = red.clone().requires_grad_()
    features = backbone.encode_prompts(["a V1 mug"], {"V1": word})
    features.square().sum().backward()
    assert word.grad is not None
    assert all(part.abs().sum() > 0 for part in word.grad.split(backbone.word_widths))
    assert backbone.word_start("mug", torch.Generator().manual_seed(0)).shape == (backbone.word_width,)


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_is_what_the_pipeline_draws(loaded: dict[str, Backbone], kind: str) -> None:
    """The same noise, DDIM and guidance: the picture is that of diffusers."""
    settings = DrawSettings(steps=3, solver="ddim", guidance=3.0, size=64).resolved("sdxl")
    ours = sample.draw(loaded[kind], {}, ["a red mug"], [5], settings)
    pipe, noise = families.pipeline(kind), torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"height": 64, "width": 64, "latents": noise[None], "num_inference_steps": 3, "guidance_scale": 3.0}
    theirs = pipe("a red mug", negative_prompt="", output_type="pt", **given).images
    assert torch.allclose(ours, theirs * 2 - 1, atol=1e-3)
