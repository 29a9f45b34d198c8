"""SD2.x and SDXL: what loads is what diffusers computes with, and everything that can be done with
a checkpoint works on them.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_families as families
import pytest
import torch
from helpers_areas import follows_areas
from helpers_families import KINDS
from helpers_learn import NOUNS
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfy_continual_lora import foreign, pipeline, requests, sample, store
from comfy_continual_lora.adapters.adapter import attached, delta_weights
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.checkpoint.stable import COLORS
from comfy_continual_lora.diffusion import alphas_cumprod, noised, timestep_weight
from comfy_continual_lora.errors import CheckpointError, StackError
from comfy_continual_lora.export import export_files
from comfy_continual_lora.settings import (
    DrawSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
    TrainSettings,
)

_WEIGHT = "model.diffusion_model.middle_block.1.proj_out.weight"
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


def _theirs(
    pipe: Any, prompts: list[str], noisy: torch.Tensor, timestep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Text features, pooled text and prediction as the pipeline itself computes them."""
    features, _, *pooled = pipe.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = None
    if pooled:
        sizes = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 96)
        added = {"text_embeds": pooled[0], "time_ids": sizes.repeat(len(prompts), 1)}
    return (
        features,
        pooled[0] if pooled else None,
        pipe.unet(noisy, timestep, features, added_cond_kwargs=added).sample,
    )


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_and_predictions_are_those_of_diffusers(
    loaded: dict[str, Backbone], tmp_path: Path, kind: str, layout: str
) -> None:
    pipe, ours = families.pipeline(kind), loaded[kind]
    if layout == "folder":
        pipe.save_pretrained(tmp_path / "folder")
        ours = load_backbone(tmp_path / "folder", device="cpu")
        assert ours.fingerprint == loaded[kind].fingerprint
    noisy, timestep = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([20, 500, 980]),
    )
    expected, pooled, answer = _theirs(pipe, PROMPTS, noisy, timestep)
    features = ours.encode_prompts(PROMPTS)
    assert torch.allclose(ours.context(features), expected, atol=1e-5)
    if pooled is not None:
        assert torch.allclose(features[:, 77, :96], pooled, atol=1e-5)
        assert not features[:, 77, 96:].any()
    predicted = ours.predict(noisy, timestep, features)
    assert torch.allclose(predicted, answer, atol=1e-5)
    assert not torch.allclose(
        predicted, ours.predict(noisy, timestep, features[[1, 0, 0]]), atol=1e-3
    )  # the text counts
    family, v = kind.split("-")[0], kind.endswith("-v")
    assert (ours.preset, ours.prediction, ours.zero_snr) == (
        family,
        "v_prediction" if v else "epsilon",
        kind == "sdxl-v",
    )
    assert ours.word_widths == ([64, 128] if family == "sdxl" else [64])
    assert ours.vae.config["scaling_factor"] == (0.13025 if family == "sdxl" else 0.18215)


def test_sizes_suit_the_family_unless_the_file_says_otherwise(
    loaded: dict[str, Backbone], tmp_path: Path
) -> None:
    assert {kind: one.size for kind, one in loaded.items()} == {
        "sd2": 512,
        "sd2-v": 768,
        "sdxl": 1024,
        "sdxl-v": 1024,
    }
    said = families.write(
        "sd2-v",
        tmp_path / "x.safetensors",
        **{"modelspec.resolution": "512x512", "modelspec.prediction_type": "epsilon"},
    )
    backbone = load_backbone(said, device="cpu")
    assert (backbone.size, backbone.prediction) == (512, "epsilon")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_half_precision_and_weights_of_others_are_read_too(
    loaded: dict[str, Backbone], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    path = families.write(kind, tmp_path / "half.safetensors", dtype)
    save_file(
        {
            **load_file(path),
            "model_ema.decay": torch.ones(1),
            "cond_stage_model.logit_scale": torch.ones(1),
        },
        path,
    )
    half, whole = load_backbone(path, device="cpu"), loaded[kind]
    assert {p.dtype for part in half.parts for p in part.parameters()} == {torch.float32}
    features = whole.encode_prompts(PROMPTS)
    assert torch.allclose(
        half.encode_prompts(PROMPTS), features, atol=0.05 * float(features.abs().max())
    )


def test_the_unet_takes_the_format_asked_for_and_the_vae_stays_in_float32(
    files: dict[str, Path],
) -> None:
    backbone = load_backbone(files["sdxl"], device="cpu", precision="bf16")
    assert [{p.dtype for p in part.parameters()} for part in backbone.parts] == [
        {torch.bfloat16},
        *[{torch.float32}] * 3,
    ]
    assert backbone.encode_images(torch.zeros(1, 3, 64, 64))[0].isfinite().all()


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
        (
            "sdxl",
            lambda s: _without(s, "text_projection"),
            "the first is conditioner.embedders.1.model.text_projection",
        ),
        (
            "sdxl",
            lambda s: _without(s, "label_emb.0.2"),
            "lacks 2 weights .* model.diffusion_model.label_emb.0.2",
        ),
        ("sdxl", lambda s: _without(s, "embedders.1."), "a U-Net without its text encoder"),
        ("sdxl", lambda s: {**s, "edm_mean": torch.zeros(1)}, "Playground v2.5"),
        ("sdxl", lambda s: {**s, "edm_vpred.sigma_max": torch.zeros(1)}, "CosXL"),
        (
            "sd2",
            lambda s: {**s, "embedder.model.visual.proj": torch.zeros(1)},
            "SD2.x unCLIP.*take SD2.1",
        ),
        (
            "sd2",
            lambda s: {**s, _WEIGHT: s[_WEIGHT].to(torch.int8)},
            "proj_out.weight holds torch.int8 numbers.*get the model in float32",
        ),
        (
            "sd2",
            lambda s: {**s, f"{_WEIGHT[:-7]}.scale_weight": torch.ones(1)},
            "quantised weights and their scales .*proj_out.scale_weight.*a quantised copy",
        ),
        (
            "sd2",
            lambda s: _without(s, "ln_final.bias"),
            "lacks 1 weights of its cond_stage_model.model, the first is .*ln_final.bias",
        ),
        (
            "sd2",
            lambda s: {
                **s,
                "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3),
            },
            "an inpainting model",
        ),
        (
            "sd2",
            lambda s: {
                **s,
                "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 5, 3, 3),
            },
            "a depth model",
        ),
    ],
)
def test_what_is_incomplete_or_only_alike_is_refused_by_name(
    files: dict[str, Path], tmp_path: Path, kind: str, change: Any, message: str
) -> None:
    save_file(change(load_file(files[kind])), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path / "other.safetensors")


def test_a_file_cut_in_the_middle_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut.safetensors", files["sdxl"].read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        CheckpointError, match=r"can't be read as safetensors .* download or copy it again"
    ):
        load_backbone(cut)


def test_folders_of_other_pipelines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionXLInpaintPipeline"}'
    )
    with pytest.raises(
        CheckpointError,
        match=r"holds a StableDiffusionXLInpaintPipeline\. Expected a StableDiffusionPipeline",
    ):
        load_backbone(tmp_path)


# --- what is learned from
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_noising_and_target_are_those_of_the_scheduler(
    loaded: dict[str, Backbone], kind: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    timestep, scheduler = torch.tensor([0, 500, 999]), families.pipeline(kind).scheduler
    noisy, target = noised(loaded[kind], clean, noise, timestep)
    assert torch.allclose(noisy, scheduler.add_noise(clean, noise, timestep), atol=1e-4)
    assert torch.allclose(
        target,
        scheduler.get_velocity(clean, noise, timestep) if kind.endswith("-v") else noise,
        atol=1e-4,
    )
    if (
        kind == "sdxl-v"
    ):  # at the last step nothing of the picture is left, and the picture is what is asked for
        assert torch.equal(noisy[2], noise[2])
        assert torch.equal(target[2], -clean[2])


@pytest.mark.parametrize("declared", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_zero_terminal_snr_counts_only_where_v_is_predicted(
    tmp_path: Path, layout: str, declared: str
) -> None:
    path = tmp_path / "model.safetensors"
    if layout == "file":
        families.write("sdxl-v", path, **{"modelspec.prediction_type": declared})
    else:
        families.pipeline("sdxl-v").save_pretrained(path)
        file = path / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": declared}))
    as_declared = load_backbone(path, device="cpu")
    assert (as_declared.prediction, as_declared.zero_snr) == (declared, declared == "v_prediction")
    noise = replace(as_declared, prediction="epsilon")
    assert not noise.zero_snr
    assert not load_backbone(path, device="cpu", prediction="epsilon").zero_snr
    assert timestep_weight(noise, torch.tensor([999]), "debiased").isfinite().all()
    settings = DrawSettings(steps=1, size=64, solver="ddim").resolved("sdxl")
    assert sample.draw(noise, {}, ["a red mug"], [0], settings).isfinite().all()
    assert load_backbone(path, device="cpu", prediction="v_prediction").zero_snr
    assert replace(noise, prediction="v_prediction").zero_snr


@pytest.mark.parametrize("declared", ["v", "V", " V-Prediction ", "v_prediction"])
def test_what_metadata_declare_is_read_in_any_case(tmp_path: Path, declared: str) -> None:
    path = tmp_path / "model.safetensors"
    families.write("sdxl", path, **{"modelspec.prediction_type": declared})
    assert load_backbone(path, device="cpu").prediction == "v_prediction"


@pytest.mark.parametrize(
    "changed",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 1100},
        {"beta_end": 0.014},
        {"beta_start": None},
        {"trained_betas": [0.1, 0.2]},
    ],
)
def test_another_noise_schedule_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    families.pipeline("sdxl").save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **changed}))
    with pytest.raises(CheckpointError, match=f"scheduler_config.json: {next(iter(changed))} is"):
        load_backbone(tmp_path, device="cpu")
    file.write_text(json.dumps({name: config[name] for name in config if "beta" not in name}))
    assert load_backbone(tmp_path, device="cpu").prediction == "epsilon"


def test_a_velocity_by_hand(loaded: dict[str, Backbone]) -> None:
    clean, noise = torch.full((1, 4, 8, 8), 2.0), torch.full((1, 4, 8, 8), 3.0)
    alpha = float(alphas_cumprod()[700])
    _, target = noised(loaded["sd2-v"], clean, noise, torch.tensor([700]))
    assert float(target[0, 0, 0, 0]) == pytest.approx(
        alpha**0.5 * 3 - (1 - alpha) ** 0.5 * 2, rel=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_stands_in_every_encoder_and_gets_their_gradients(
    loaded: dict[str, Backbone], kind: str
) -> None:
    backbone = loaded[kind]
    red = backbone.word_of_vocabulary("red")
    assert red is not None
    plain = backbone.encode_prompts(["a photo of a red mug"])
    assert torch.allclose(
        backbone.encode_prompts(["a photo of a V1 mug"], {"V1": red}), plain, atol=1e-6
    )
    word = red.clone().requires_grad_()
    features = backbone.encode_prompts(["a V1 mug"], {"V1": word})
    features.square().sum().backward()
    assert word.grad is not None
    assert all(part.abs().sum() > 0 for part in word.grad.split(backbone.word_widths, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_starts_as_a_modifier_of_its_noun(loaded: dict[str, Backbone], kind: str) -> None:
    backbone = loaded[kind]
    colors = [backbone.word_of_vocabulary(color) for color in COLORS]
    vectors = torch.cat([color for color in colors if color is not None])
    assert len(vectors) == len(COLORS)  # each is one token

    def start(noun: str, count: int = 3) -> torch.Tensor:
        return backbone.word_start(noun, torch.Generator().manual_seed(0), count)

    word = start("mug")
    assert word.shape == (3, backbone.word_width)
    noise = word - vectors.mean(0)
    assert 0 < noise.std() < 0.2 * vectors.std()
    assert not torch.equal(word[0], word[1])
    assert torch.equal(word, start("cat"))  # it says nothing of what the noun is
    assert (start("") - vectors.mean(0)).std() > 3 * noise.std()


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_is_what_the_pipeline_draws(loaded: dict[str, Backbone], kind: str) -> None:
    """The same noise, DDIM and guidance: the picture is that of diffusers."""
    settings = DrawSettings(steps=3, solver="ddim", guidance=3.0, size=64).resolved("sdxl")
    ours = sample.draw(loaded[kind], {}, ["a red mug"], [5], settings)
    pipe, noise = (
        families.pipeline(kind),
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)),
    )
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {
        "height": 64,
        "width": 64,
        "latents": noise[None],
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
    }
    theirs = pipe("a red mug", negative_prompt="", output_type="pt", **given).images
    assert torch.allclose(ours, theirs * 2 - 1, atol=1e-3)


# --- from the first concept to the exported files
# --------------------------------------------------------------------------------------------------

QUICK = LearnSettings(
    method="lora_dsc_ewc_dc",
    steps=2,
    batch=3,
    rank=4,
    size=64,
    fisher_samples=3,
    dsc_steps=2,
    rate=0.01,
)


@pytest.fixture(scope="session", params=["sd2-v", "sdxl"])
def taught(
    request: pytest.FixtureRequest,
    files: dict[str, Path],
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint that learned two concepts with the paper's method. Not to be changed."""
    path = Path(shutil.copy(files[request.param], tmp_path_factory.mktemp("taught")))
    for token in ("V1", "V2"):
        pipeline.learn_concept(
            requests.LearnRequest(path, folders[token], token, NOUNS[token], QUICK, device="cpu")
        )
    return path


@pytest.fixture
def own(taught: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copy(store.stack_path(taught), tmp_path)
    return Path(shutil.copy(taught, tmp_path))


@pytest.mark.slow
def test_every_stage_works(own: Path, folders: dict[str, Path]) -> None:
    stack = store.open_stack(store.stack_path(own))
    assert stack.fishers.keys() == {record.id for record in stack.records}
    assert all(
        tensor.isfinite().all() for fisher in stack.fishers.values() for tensor in fisher.values()
    )
    assert (stack.checkpoint.preset, stack.checkpoint.prediction) == (
        own.stem.split("-")[0],
        "v_prediction" if own.stem.endswith("-v") else "epsilon",
    )
    drawn = pipeline.draw(
        requests.DrawRequest(
            own, ["a V1 ball and a V2 fish"], DrawSettings(steps=2, size=64), device="cpu"
        )
    ).pictures
    assert drawn[0].image.size == (64, 64)
    scores = pipeline.dc_scores(
        requests.ScoreRequest(own, folders["V1"], ScoreSettings(trials=4, size=64), device="cpu")
    ).images
    assert all(sum(one.scores.probabilities) == pytest.approx(1) for one in scores)
    quick = TrainSettings(batch=3, size=64, dsc_steps=2, fisher_samples=3)
    pipeline.consolidate(requests.ConsolidateRequest(own, folders["V2"], quick, device="cpu"))
    done = pipeline.consolidate_in_closed_form(requests.SolveRequest(own, device="cpu"))
    assert done.after["V1"] < done.before["V1"]
    kept = pipeline.evaluate(
        requests.EvaluateRequest(
            own, settings=EvaluateSettings(pictures=1, steps=1, trials=2, size=64), device="cpu"
        )
    )
    assert kept.likeness.shape == (2, 2)
    assert pipeline.undo(requests.UndoRequest(own)).token == "V2"
    pipeline.learn_concept(
        requests.LearnRequest(
            own,
            folders["V3"],
            "V3",
            "mug",
            replace(QUICK, method="retention", retention_weight=1.0, checkpointing=True),
            device="cpu",
        )
    )
    assert pipeline.forget(requests.ForgetRequest(own, "V1", device="cpu")).record.token == "V1"


def test_a_stack_of_another_family_is_refused(own: Path, mini_file: Path) -> None:
    with pytest.raises(StackError, match="made for another checkpoint"):
        pipeline.draw(
            requests.DrawRequest(
                mini_file, ["a V1 ball"], stack=store.stack_path(own), device="cpu"
            )
        )


def test_diffusers_loads_the_exported_lora_and_words(
    taught: Path, tmp_path: Path, loaded: dict[str, Backbone]
) -> None:
    """Its net with the LoRA answers as ours with the adapter, and its prompts with the embeddings
    read as ours with the words.
    """
    done, backbone = pipeline.export(requests.ExportRequest(taught, tmp_path)), loaded[taught.stem]
    stack = store.open_stack(store.stack_path(taught))
    assert done.lora
    assert stack.adapter
    pipe = copy.deepcopy(families.pipeline(taught.stem))
    save_file(
        {name: tensor.float() for name, tensor in load_file(done.lora).items()},
        tmp_path / "lora.safetensors",
    )
    words = {
        token: _rounded(load_file(tmp_path / f"{token}.safetensors")) for token in stack.tokens
    }
    for token, word in words.items():
        parts = word.split(backbone.word_widths, 1)
        for encoder, tokenizer, part in zip(
            ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2"), parts, strict=False
        ):
            pipe.load_textual_inversion(
                part, token, text_encoder=getattr(pipe, encoder), tokenizer=getattr(pipe, tokenizer)
            )
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    noisy, timestep = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([500]),
    )
    with torch.no_grad():
        expected, _, answer = _theirs(pipe, ["a photo of a V1 ball"], noisy, timestep)
        features = backbone.encode_prompts(["a photo of a V1 ball"], words)
        assert torch.allclose(backbone.context(features), expected, atol=1e-5)
        plain = backbone.predict(noisy, timestep, features)
        with attached(
            backbone, {name: tensor.half().float() for name, tensor in stack.adapter.items()}
        ):
            changed = backbone.predict(noisy, timestep, features)
    assert torch.allclose(changed, answer, atol=1e-4)
    assert float((changed - plain).abs().max()) > 1e-3


@torch.no_grad()
def test_diffusers_reads_all_vectors_of_a_word_in_lower_case_alone(
    loaded: dict[str, Backbone], tmp_path: Path
) -> None:
    """And the export says so of a word that is not."""
    backbone = loaded["sd2-v"]
    word = torch.randn(3, backbone.word_width, generator=torch.Generator().manual_seed(0))
    expected = backbone.encode_prompts(["a photo of a V1 ball"], {"V1": word})
    noisy, timestep = torch.randn(1, 4, 8, 8), torch.tensor([500])
    whole = {}
    for token in ("v1", "V1"):
        pipe = copy.deepcopy(families.pipeline("sd2-v"))
        pipe.load_textual_inversion(word, token)
        features, _, _ = _theirs(pipe, [f"a photo of a {token} ball"], noisy, timestep)
        whole[token] = torch.allclose(backbone.context(expected), features, atol=1e-5)
    assert whole == {"v1": True, "V1": False}


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_diffusers_and_peft_load_what_is_written_for_them(
    taught: Path, tmp_path: Path, loaded: dict[str, Backbone], format: str
) -> None:
    done, backbone, pipe = (
        pipeline.export(requests.ExportRequest(taught, tmp_path, format=format)),
        loaded[taught.stem],
        copy.deepcopy(families.pipeline(taught.stem)),
    )
    adapter = {
        name: tensor.half().float()
        for name, tensor in (store.open_stack(store.stack_path(taught)).adapter or {}).items()
    }
    assert done.lora
    noisy, timestep = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([500]),
    )
    features = backbone.encode_prompts(["a photo of a ball"])
    with torch.no_grad(), attached(backbone, adapter):
        wanted = backbone.predict(noisy, timestep, features)
    if format == "diffusers":
        pipe.load_lora_weights(tmp_path, weight_name=done.lora.name)
    else:
        pipe.unet = PeftModel.from_pretrained(pipe.unet, str(done.lora))
    with torch.no_grad():
        answer = replace(backbone, unet=pipe.unet).predict(noisy, timestep, features)
        plain = backbone.predict(noisy, timestep, features)
    assert torch.allclose(answer, wanted, atol=1e-4)
    assert float((answer - plain).abs().max()) > 1e-3
    again = foreign.read_lora(
        done.lora / "adapter_model.safetensors" if format == "peft" else done.lora, backbone
    )
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)


def _rounded(embedding: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat(
        [
            embedding[name].float()
            for name in (("clip_l", "clip_g") if "clip_l" in embedding else ("emb_params",))
        ],
        1,
    )


def test_the_exported_files_say_what_they_are_for(taught: Path, tmp_path: Path) -> None:
    stack = store.open_stack(store.stack_path(taught))
    others = ("epsilon", "v_prediction") if taught.stem == "sd2-v" else ("epsilon",)
    for prediction in others:
        stack.checkpoint = replace(stack.checkpoint, prediction=prediction)
        done = export_files(stack, tmp_path, tmp_path, prediction)
        assert done.lora
        with safe_open(done.lora, framework="pt") as file:
            metadata, names = file.metadata(), list(file.keys())
        card = json.loads(done.lora.with_suffix(".json").read_text())["sd version"]
        said = (
            metadata["modelspec.architecture"],
            metadata["ss_base_model_version"],
            metadata.get("ss_v2"),
            card,
        )
        assert (
            said
            == {
                ("sd2-v", "epsilon"): ("stable-diffusion-v2-512/lora", "sd_v2", "True", "SD2"),
                ("sd2-v", "v_prediction"): (
                    "stable-diffusion-v2-768-v/lora",
                    "sd_v2_v",
                    "True",
                    "SD2",
                ),
                ("sdxl", "epsilon"): (
                    "stable-diffusion-xl-v1-base/lora",
                    "sdxl_base_v1-0",
                    None,
                    "SDXL",
                ),
            }[taught.stem, prediction]
        )
        first = "input_blocks_4_1" if card == "SDXL" else "down_blocks_0_attentions_0"
        assert f"lora_unet_{first}_transformer_blocks_0_attn2_to_k.lora_down.weight" in names


def test_an_exported_lora_can_be_imported(
    own: Path, tmp_path: Path, loaded: dict[str, Backbone]
) -> None:
    done, stack = (
        pipeline.export(requests.ExportRequest(own, tmp_path / "out")),
        store.open_stack(store.stack_path(own)),
    )
    assert done.lora
    bare = tmp_path / "bare.concepts.safetensors"
    pipeline.import_concept(
        requests.ImportRequest(
            own, done.lora, "W1", "ball", embedding=done.embeddings[0], stack=bare, device="cpu"
        )
    )
    found = store.open_stack(bare)
    assert found.checkpoint == stack.checkpoint
    assert torch.allclose(found.tokens["W1"], stack.tokens["V1"], atol=2e-3)
    assert found.adapter
    assert stack.adapter
    changes = delta_weights(loaded[own.stem], stack.adapter)
    for layer, change in delta_weights(loaded[own.stem], found.adapter).items():
        assert torch.allclose(change, changes[layer], atol=2e-3 * float(changes[layer].abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_several_learned_things_follow_areas(loaded: dict[str, Backbone], kind: str) -> None:
    follows_areas(loaded[kind], 16, 24)
