"""Stage 1: other models and damaged ones are refused by name, folders are read part by part."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfy_continual_lora import lorafile
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone, open_checkpoint
from comfy_continual_lora.checkpoint.path import check_path
from comfy_continual_lora.errors import CheckpointError, StackError
from comfy_continual_lora.files import stack_path
from comfy_continual_lora.operations import OPERATIONS
from comfy_continual_lora.requests import parse

KEYS = {
    "SD3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "pos_embed.pos_embed"],
    "Flux.1": [
        "double_blocks.0.img_attn.qkv.weight",
        "single_transformer_blocks.0.attn.to_q.weight",
    ],
    "Flux.2": ["double_stream_modulation_img.lin.weight", "single_stream_modulation.linear.weight"],
    "Chroma": ["distilled_guidance_layer.in_proj.bias"],
    "a part of Anima": ["net.llm_adapter.blocks.0.cross_attn.q_proj.weight"],
    "Z-Image": ["cap_pad_token", "model.diffusion_model.layers.0.adaLN_modulation.0.weight"],
    "Lumina": ["cap_embedder.1.weight", "time_caption_embed.caption_embedder.0.weight"],
    "Qwen-Image": ["transformer_blocks.0.img_mod.1.weight"],
    "Krea 2": ["txtfusion.projector.weight", "text_fusion.layerwise_blocks.0.norm1.weight"],
    "Wan": ["model.diffusion_model.head.modulation", "condition_embedder.time_proj.weight"],
    "HiDream": ["double_stream_blocks.0.block.adaLN_modulation.1.bias"],
    "PixArt": ["t_block.1.weight", "adaln_single.emb.timestep_embedder.linear_1.bias"],
    "Sana": [
        "blocks.0.mlp.inverted_conv.conv.weight",
        "transformer_blocks.0.ff.conv_inverted.weight",
    ],
    "Kolors": ["encoder_hid_proj.weight"],
    "Stable Cascade": ["model.diffusion_model.clip_txt_mapper.weight"],
    "Hunyuan-DiT": ["mlp_t5.0.weight"],
    "AuraFlow": ["model.double_layers.0.attn.w1q.weight"],
    "LTX-Video": ["patchify_proj.weight"],
    "a ControlNet": ["control_model.time_embed.0.weight", "controlnet_down_blocks.0.weight"],
    "a LoRA": ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"],
    "a VAE": ["decoder.conv_in.weight"],
    "a text or image encoder": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "an upscaler": ["model.1.sub.0.RDB1.conv1.0.weight"],
    "the embedding of a word": ["emb_params"],
}


@pytest.mark.parametrize(("kind", "key"), [(k, key) for k, keys in KEYS.items() for key in keys])
def test_other_models_are_refused_by_name(tmp_path: Path, kind: str, key: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=rf"look like {kind} \(") as error:
        load_backbone(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [
        ("Flux2KleinPipeline", "Flux.2"),
        ("FluxPipeline", "Flux.1"),
        ("StableDiffusion3Pipeline", "SD3"),
        ("WanImageToVideoPipeline", "Wan"),
    ],
)
def test_other_folders_are_refused_by_name(tmp_path: Path, pipeline: str, kind: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(CheckpointError, match=rf"holds {kind} \({pipeline}\)"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"GGUF\3", "GGUF"), (b"PK\3\4", "pickle"), (b"<!DOCTYPE html>", "a web page")],
)
def test_files_of_other_kinds_are_named(tmp_path: Path, start: bytes, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(start + bytes(100))
    with pytest.raises(CheckpointError, match=kind):
        load_backbone(path)


def _rewritten(source: Path, target: Path, rename: Callable[[str], str], **metadata: str) -> Path:
    with safe_open(source, "pt") as file:
        known = file.metadata()
    save_file({rename(k): v for k, v in load_file(source).items()}, target, known | metadata)
    return target


def test_older_and_nested_names_are_read(
    thin_file: Path, backbone: Backbone, tmp_path: Path
) -> None:
    def older(name: str) -> str:
        return f"state_dict.{name.replace('transformer.text_model.', 'transformer.')}"

    other = load_backbone(_rewritten(thin_file, tmp_path / "o.safetensors", older), device="cpu")
    assert other.fingerprint == backbone.fingerprint
    prompt = ["a red mug"]
    assert torch.equal(other.encode_prompts(prompt), backbone.encode_prompts(prompt))


@pytest.mark.parametrize(
    ("text", "size"),
    [("256x192", 192), (" 256 X 256 ", 256), ("100", 96), ("", 512), ("NaN", 512), ("9" * 30, 512)],
)
def test_a_resolution_of_any_text(thin_file: Path, tmp_path: Path, text: str, size: int) -> None:
    resolution = {"modelspec.resolution": text}
    path = _rewritten(thin_file, tmp_path / "r.safetensors", str, **resolution)
    with open_checkpoint(path) as layout:
        assert layout.size == size


@pytest.mark.parametrize(
    "part", ["diffusion_model.out.2.weight", "text_model.final_layer_norm.bias"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    thin_file: Path, tmp_path: Path, part: str, value: float
) -> None:
    tensors = load_file(thin_file)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name].view(-1)[0] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} contains infinite or NaN"):
        load_backbone(tmp_path / "bad.safetensors", device="cpu")


@pytest.fixture(scope="module")
def _folder(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folders") / "model"
    backbone.unet.save_pretrained(path / "unet")
    backbone.vae.save_pretrained(path / "vae")
    backbone.text_encoders[0].model.save_pretrained(path / "text_encoder")
    backbone.tokenizer.save_pretrained(path / "tokenizer")
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return path


@pytest.fixture
def folder(_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_folder, tmp_path / "model"))


def _configure(folder: Path, part: str, **values: Any) -> None:
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"lacks the folder {part}"):
        load_backbone(folder, device="cpu")
    (folder / part).mkdir()
    with pytest.raises(CheckpointError, match=rf"model.{part}"):
        load_backbone(folder, device="cpu")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
@pytest.mark.parametrize("file", ["", "unet/config.json", "vae/config.json"])
def test_a_pipe_is_not_waited_for(folder: Path, tmp_path: Path, file: str) -> None:
    """Nor a device, such as /dev/zero, which has no end."""
    path = folder / file if file else tmp_path / "a.safetensors"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        load_backbone(folder if file else path, device="cpu")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_a_pipe_are_not_waited_for(folder: Path, part: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=f"{part}.*(pipe|lacks|no )"):
        load_backbone(folder, device="cpu")


def test_each_part_is_read_in_the_format_it_has(folder: Path, backbone: Backbone) -> None:
    plain = folder / "text_encoder" / "model.safetensors"
    plain.rename(plain.with_name("model.fp16.safetensors"))
    _configure(folder, "unet", sample_size=[16, 24])
    mixed = load_backbone(folder, device="cpu")
    assert mixed.fingerprint == backbone.fingerprint
    assert mixed.size == 128


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("unet", "layers_per_block", 10**9),
        ("unet", "transformer_layers_per_block", 10**6),
        ("unet", "block_out_channels", "32"),
        ("unet", "sample_size", [0, 16]),
        ("unet", "in_channels", [4]),
        ("vae", "scaling_factor", float("nan")),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "hidden_size", "64"),
        ("text_encoder", "num_attention_heads", -1),
        ("unet", "norm_eps", -1e-5),
        ("unet", "norm_eps", None),
        ("unet", "mid_block_scale_factor", None),
        ("text_encoder", "layer_norm_eps", None),
        ("vae", "scaling_factor", -0.18),
    ],
)
def test_a_bad_value_is_named(folder: Path, part: str, field: str, value: object) -> None:
    _configure(folder, part, **{field: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is "):
        load_backbone(folder, device="cpu")


@pytest.mark.parametrize("name", [None, 5, ["StableDiffusionPipeline"]])
def test_a_pipeline_without_a_name_is_told(folder: Path, name: object) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(CheckpointError, match="it holds no pipeline with a name"):
        load_backbone(folder, device="cpu")


def test_null_stands_for_most_defaults(folder: Path) -> None:
    _configure(folder, "unet", num_attention_heads=None, time_cond_proj_dim=None)
    _configure(folder, "vae", force_upcast=None)
    load_backbone(folder, device="cpu")


def test_a_stack_lies_beside_the_folder_that_dots_stand_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stack_path(folder)
    monkeypatch.chdir(folder / "unet")
    for path in ("..", "../", "../unet/..", str(folder) + os.sep):
        assert stack_path(path) == expected


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def test_any_configuration_is_read_or_refused(folder: Path) -> None:
    files = {part: (folder / part / "config.json") for part in ("unet", "vae", "text_encoder")}
    texts = {part: file.read_text() for part, file in files.items()}

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        part = data.draw(st.sampled_from(sorted(files)))
        config = json.loads(texts[part])
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(_JSON)
        files[part].write_text(json.dumps(config))
        try:
            with open_checkpoint(folder) as layout:
                assert 64 <= layout.size <= 4096
        except CheckpointError:
            pass
        finally:
            files[part].write_text(texts[part])

    check()


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.symlink_to("moved.safetensors")
    with pytest.raises(CheckpointError, match="a link that leads to nothing"):
        check_path(path)


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
def test_a_file_without_permission_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        for outer in (tmp_path, *tmp_path.parents[:3]):
            outer.chmod(outer.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        told = rf"{path} can't be read \(Permission denied\)\. Give this user permission"
        with pytest.raises(CheckpointError, match=told), open_checkpoint(path):
            pass
        with pytest.raises(StackError, match=told):
            lorafile.read(path)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("operation", ["info", "undo", "forget", "draw"])
def test_a_loop_of_links_is_told(tmp_path: Path, operation: str) -> None:
    path = tmp_path / "a.safetensors"
    path.symlink_to(path.name)
    given = {"forget": {"token": "V1"}, "draw": {"prompts": ["a mug"]}}.get(operation, {})
    request = parse(OPERATIONS[operation].request, {"checkpoint": str(path), **given})
    with pytest.raises(CheckpointError, match="a link that leads to nothing"):
        OPERATIONS[operation](request)


@pytest.mark.parametrize("change", ["undo", "restore", "rename"])
def test_a_misspelled_checkpoint_is_named_before_its_stack(
    thin_file: Path, tmp_path: Path, change: str
) -> None:
    shutil.copy(thin_file, tmp_path / "model.safetensors")
    given = {"restore": {"version": 1}, "rename": {"token": "V1", "to": "V2"}}.get(change, {})
    request = parse(
        OPERATIONS[change].request, {"checkpoint": str(tmp_path / "modle.safetensors"), **given}
    )
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*modle.*Did you mean .*model"):
        OPERATIONS[change](request)
