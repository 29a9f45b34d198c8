"""Stage 1: what loads, what is refused and why, and that names and shapes agree with diffusers' own
converters.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from helpers_full_size import SD15_UNET, SD15_VAE, SD21_UNET, SDXL_UNET
from helpers_learn import plan_of
from safetensors.torch import load_file, save_file

from comfy_continual_lora.checkpoint import keys, shapes
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.errors import CheckpointError
from comfy_continual_lora.presets import BETA_END, BETA_START
from comfy_continual_lora.settings import LearnSettings

UNETS = {
    "SD1.5": (SD15_UNET, "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"),
    "SD2.1": (SD21_UNET, "output_blocks.11.1.transformer_blocks.0.norm1.bias"),
    "SDXL": (SDXL_UNET, "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"),
}


@pytest.mark.parametrize(("config", "name"), UNETS.values(), ids=UNETS)
def test_unet_names_and_config_agree_with_diffusers(config: dict[str, Any], name: str) -> None:
    """`name` is a published one, with its shape there; K/V layers alone are named as all layers
    are.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    ours = keys.unet_names(unet.state_dict())
    ldm = {keys.UNET_PREFIX + ours[name]: tensor for name, tensor in unet.state_dict().items()}
    theirs = convert_ldm_unet_checkpoint(dict(ldm), dict(unet.config))
    assert {name: id(tensor) for name, tensor in theirs.items()} == {
        name: id(ldm[keys.UNET_PREFIX + ours[name]]) for name in ours
    }
    tensors = {
        name.removeprefix(keys.UNET_PREFIX): tuple(tensor.shape) for name, tensor in ldm.items()
    }
    assert shapes.unet_config(tensors) == config
    assert name in tensors
    assert tensors["output_blocks.5.2.conv.weight"] == (
        640 if "addition_embed_type" in config else 1280,
    ) * 2 + (3, 3)  # after an attention
    kv = [name.removesuffix(".weight") for name in ours if ".attn2.to_k." in name]
    assert keys.unet_names(kv) == {
        name: ours[f"{name}.weight"].removesuffix(".weight") for name in kv
    }


def test_vae_names_and_config_agree_with_diffusers() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**SD15_VAE)
    ours = keys.vae_names(vae.state_dict())
    ldm = {keys.VAE_PREFIX + ours[name]: tensor for name, tensor in vae.state_dict().items()}
    theirs = convert_ldm_vae_checkpoint(dict(ldm), dict(vae.config))
    assert {name: id(tensor) for name, tensor in theirs.items()} == {
        name: id(ldm[keys.VAE_PREFIX + ours[name]]) for name in ours
    }
    config = shapes.vae_config(
        {name.removeprefix(keys.VAE_PREFIX): tuple(t.shape) for name, t in ldm.items()}
    )
    assert {**config, "scaling_factor": 0.18215} == SD15_VAE


def test_a_diffusers_folder_loads_as_the_same_backbone(backbone: Backbone, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline(
            vae=backbone.vae,
            text_encoder=backbone.text_encoders[0].model,
            tokenizer=backbone.tokenizer,
            unet=backbone.unet,
            scheduler=DDIMScheduler(
                beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear"
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(tmp_path / "folder")
    folder = load_backbone(tmp_path / "folder", device="cpu")
    assert folder.fingerprint == backbone.fingerprint
    prompts = ["a photo of a red mug on wood"]
    assert torch.equal(folder.encode_prompts(prompts), backbone.encode_prompts(prompts))


def test_a_word_vector_stands_where_its_token_stands(backbone: Backbone) -> None:
    red = backbone.word_of_vocabulary("red")
    assert red is not None
    plain = backbone.encode_prompts(["a photo of a red mug"])
    for prompt in ("a photo of a V1 mug", "a photo of a v1 mug"):
        assert torch.equal(backbone.encode_prompts([prompt], {"V1": red}), plain)
    other_word = backbone.encode_prompts(["a photo of a V12 mug"], {"V1": red})
    assert not torch.equal(other_word, plain)


def test_a_word_of_several_vectors_takes_as_many_positions(backbone: Backbone) -> None:
    blue, red, fish = (backbone.word_of_vocabulary(word) for word in ("blue", "red", "fish"))
    assert blue is not None
    assert red is not None
    assert fish is not None
    plain = backbone.encode_prompts(["a red fish and a blue red mug"])
    words = {"V1": torch.cat([blue, red]), "V2": torch.cat([red, fish])}
    assert torch.equal(backbone.encode_prompts(["a V2 and a V1 mug"], words), plain)


def test_a_prompt_longer_than_77_tokens_is_cut_not_refused(backbone: Backbone) -> None:
    assert backbone.encode_prompts(["red mug " * 90]).shape == (1, 77, backbone.word_width)


def _without(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if part not in name}


def _with_channels(state: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return {**state, keys.UNET_PREFIX + "input_blocks.0.0.weight": torch.zeros(64, count, 3, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: _without(s, "middle_block"),
            "lacks .* weights of its model.diffusion_model, the first is "
            "model.diffusion_model.middle_block",
        ),
        (lambda s: _without(s, "time_embed.0.bias"), "lacks 1 weights"),
        (lambda s: _without(s, "taesd"), "first_stage_model. are incomplete"),
        (lambda s: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "look like Flux"),
        (lambda s: {"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, "look like SD3"),
        (
            lambda s: {
                **_without(s, "cond_stage"),
                "conditioner.embedders.0.model.ln_final.weight": torch.zeros(1),
            },
            "the SDXL refiner.* base model",
        ),
        (lambda s: _without(s, "cond_stage"), "a U-Net without its text encoder"),
        (lambda s: _with_channels(s, 9), "an inpainting model.*Teach the model it was made from"),
        (lambda s: _with_channels(s, 8), "an instruct-pix2pix model"),
        (lambda s: {"word.0123456789ab": torch.zeros(1)}, "a concept stack"),
        (lambda s: {"lora_unet_down.lora_up.weight": torch.zeros(1)}, "look like a LoRA"),
        (lambda s: {"whatever": torch.zeros(1)}, "something else .first key: whatever"),
    ],
)
def test_what_can_not_be_taught_is_refused_with_the_reason(
    mini_file: Path, tmp_path: Path, change, message: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(change(load_file(mini_file)), path)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(path)


def test_pickles_missing_and_damaged_files_are_refused(mini_file: Path, tmp_path: Path) -> None:
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_backbone(pickle)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load_backbone(tmp_path / "missing.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(mini_file.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"can't be read as safetensors"):
        load_backbone(cut)
    with pytest.raises(CheckpointError, match=r"without model_index\.json"):
        load_backbone(tmp_path)


def test_a_vae_without_room_beside_the_unet_is_given_it_once(
    mini_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(mini_file, device="cpu")
    picture, encode, encoded = torch.rand(3, 64, 64), backbone.vae.encode, []
    latent, weights = (
        backbone.encode_images([picture])[0],
        [p.clone() for p in backbone.unet.parameters()],
    )

    def full(x: torch.Tensor) -> object:
        encoded.append(x)
        if len(encoded) in (1, 3, 4):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return encode(x)

    monkeypatch.setattr(backbone.vae, "encode", full)
    assert torch.equal(backbone.encode_images(iter([picture]))[0], latent)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        backbone.encode_images([picture])
    assert len(encoded) == 4
    assert all(torch.equal(a, b) for a, b in zip(weights, backbone.unet.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cuda:99", "cuda:-1", "meta", "hpu", "mkldnn", "tpu", ""])
def test_a_device_that_can_not_compute_here_is_a_users_mistake(
    thin_file: Path, tmp_path: Path, device: str
) -> None:
    for use in (
        lambda: load_backbone(thin_file, device=device),
        lambda: plan_of(thin_file, LearnSettings(), device),
    ):
        with pytest.raises(CheckpointError) as refused:
            use()
        message = str(refused.value)
        assert message.startswith(f"The device '{device}' can't be used here (")
        assert message.endswith("). Use auto, cpu, cuda, xpu or mps.")
        assert len(message) < 300
