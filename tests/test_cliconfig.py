"""Flags in a TOML file, and what was run as such a file."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_store import make_stack
from safetensors.torch import save_file

from comfy_continual_lora import cli, cliflags, store, upkeep
from comfy_continual_lora.cliconfig import with_config, write_config
from comfy_continual_lora.errors import SettingError
from comfy_continual_lora.files import stack_path
from comfy_continual_lora.listing import checkpoints_in
from comfy_continual_lora.operations import OPERATIONS

DOG = """
checkpoint = "models/sd15.safetensors"
images = 'dog'
token = "V1"
noun = "black dog"
steps = 500
lr = 1e-3
preview_every = 7
flip = false
replace = true
method = "lora"
"""


def request_of(*words: str) -> Any:
    whole = cli.parser()
    arguments = whole.parse_args(with_config(words, whole))
    return cliflags.request_of(OPERATIONS[arguments.command], arguments)


def write(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_gives_flags_and_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    file = write(tmp_path, DOG)
    request = request_of("learn", "--config", file)
    assert request.checkpoint == tmp_path / "models" / "sd15.safetensors"
    assert (request.images, request.noun) == (tmp_path / "dog", "black dog")
    assert (request.settings.steps, request.settings.rate) == (500, 1e-3)
    assert (request.settings.preview_every, request.settings.flip) == (7, False)
    assert (request.settings.method, request.replace) == ("lora", True)
    request = request_of("learn", f"--config={file}", "-s", "9", "--images", "cat", "--flip")
    assert (request.settings.steps, request.settings.flip) == (9, True)
    assert (request.images, request.noun) == (Path("cat"), "black dog")


@pytest.mark.parametrize("flag", ["--conf", "--confi", "--config", "--conf=", "--config="])
def test_shortened_flags_are_flags(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def given(file: str) -> list[str]:
        return [flag + file] if flag.endswith("=") else [flag, file]

    file = write(tmp_path, 'checkpoint = "c"\nprompt = ["a", "b"]\nsteps = 7\nonly = ["V1"]')
    request = request_of("draw", *given(file))
    assert (request.prompts, request.settings.steps, request.only) == (["a", "b"], 7, ["V1"])
    for own in (
        ["--prom", "d"],
        ["--prom=d"],
        ["-pd"],
        ["-p", "d"],
    ):  # a list is replaced, not joined
        assert request_of("draw", *given(file), *own, "--on", "V2").prompts == ["d"]
    assert cli.main(["draw", *given(str(tmp_path / "none"))]) == 2
    assert "none can't be read" in " ".join(capsys.readouterr().err.split())


def test_what_could_be_several_flags_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["evaluate", "--con", "x"], ["learn", "--config"], ["demo", "--config", "x"]):
        with pytest.raises(SystemExit):
            cli.main(words)
    told = capsys.readouterr().err
    assert "ambiguous option: --con could match --concepts, --config" in told
    assert "--config: expected one argument" in told
    assert "there is no flag --config" in told


def test_lists_and_what_has_no_dashes(tmp_path: Path) -> None:
    file = write(tmp_path, 'checkpoint = "c"\nprompt = ["a", "-b c"]\nonly = ["V1", "V2"]')
    request = request_of("draw", "--config", file)
    assert (request.prompts, request.only) == (["a", "-b c"], ["V1", "V2"])
    assert request_of("draw", "--config", file, "-p", "d").prompts == ["d"]
    request = request_of(
        "rename", "--config", write(tmp_path, 'checkpoint="c"\ntoken="V1"\nto="V2"')
    )
    assert (request.token, request.to) == ("V1", "V2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "is not TOML"),
        ("\xff\0", "is not TOML"),
        ("step = 5", "there is no flag --step. Did you mean steps?"),
        ("rate = 5", "there is no flag --rate. Did you mean lr?"),
        ("config = 'x'", "there is no flag --config"),
        ("[settings]\nsteps = 5", "there is no flag --settings"),
        ("steps = 1979-05-27", "steps is datetime.date"),
        ("steps = [[1]]", "steps is [[1]]"),
        ("steps = [5, 9]", "steps is [5, 9]. Expected one text or number"),
        ("steps = [5]", "steps is [5]. Expected one text or number"),
        ("lr = true", "lr is true. Expected one text or number"),
        ("until = false", "until is false. Expected one text or number. Leave the line out for"),
        (
            "images = ['a.png', 'b.png']",
            "Expected one text or number. Put the pictures in one folder",
        ),
        ("images = []", "images is []. Expected one text or number"),
        ("flip = 'yes'", "flip is 'yes'. Expected true or false"),
        ("replace = [true]", "replace is [True]. Expected true or false"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(SettingError) as error:
        request_of("learn", "--config", file)
    assert message in str(error.value)
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("draw", "prompt = []", "prompt is []. Expected texts, in a list"),
        ("draw", "only = ['V1', true]", "only is ['V1', True]. Expected texts, in a list"),
        ("draw", "only = false", "only is false. Expected texts, in a list"),
        ("draw", "beside = [['a']]", "beside is [['a']]. Expected texts, in a list"),
        ("rename", "to = ['V2', 'V3']", "to is ['V2', 'V3']. Expected one text or number"),
        ("merge", "other = true", "other is true. Expected one text or number"),
    ],
)
def test_a_list_is_for_what_takes_several(
    tmp_path: Path, command: str, text: str, message: str
) -> None:
    with pytest.raises(SettingError) as error:
        request_of(command, "--config", write(tmp_path, text))
    assert message in str(error.value)


def test_a_missing_file_and_a_wrong_value_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["learn", "--config", str(tmp_path / "none")]) == 2
    assert "none can't be read" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(SystemExit):
        cli.main(["learn", "--config", write(tmp_path, DOG.replace("500", '"many"'))])
    assert "--steps: invalid int value: 'many'" in capsys.readouterr().err


def test_what_was_run_can_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["learn", "-c", "a b.safetensors", "-i", 'p"\\\n狗', "-t", "V1", "-n", "dog"]
    words += ["--lr", "1e-05", "--no-flip", "--replace", "--dsc-steps", "3", "--json"]
    whole = cli.parser()
    arguments = whole.parse_args(words)
    own = whole.commands()["learn"]
    path = write_config(tmp_path / "run.toml", own, arguments)
    assert path
    assert "continual-lora learn --config run.toml" in path.read_text(encoding="utf-8")
    again = request_of("learn", "--config", str(path))
    first = cliflags.request_of(OPERATIONS["learn"], arguments)
    assert again.checkpoint == tmp_path / first.checkpoint
    assert again.images == tmp_path / first.images
    assert (again.settings, again.token, again.replace) == (first.settings, "V1", True)
    assert again.stack is None
    assert write_config(path, own, arguments) == path  # its own file is written again
    path.write_text("mine = 1")
    assert write_config(path, own, arguments) is None
    assert path.read_text() == "mine = 1"


def test_learning_leaves_what_was_run(
    checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learn", "-c", checkpoint, "-i", pictures, "-t", "V1", "-n", "ball", "--size", 64]
    words += ["--method", "textual_inversion", "-s", 1, "--batch", 1, "--device", "cpu"]
    assert cli.main([*map(str, words)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    file = checkpoint.with_name("mini.concepts.V1.toml")
    assert line == f"What was run: {file}"
    assert cli.main(["learn", "--config", str(file)]) == 0
    assert "V1 ball is already on the stack" in capsys.readouterr().out


# --- list, completion ----------------------------------------------------------------------------


def test_list_shows_what_each_checkpoint_has_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    for name in ("a.safetensors", "deep/b.safetensors", "ab.safetensors"):
        (tmp_path / name).touch()
    store.save_stack(make_stack(2), stack_path(tmp_path / "a.safetensors"))
    store.save_stack(make_stack(1), stack_path(tmp_path / "a.safetensors", "other"))
    store.save_stack(make_stack(1), tmp_path / "folder.concepts.safetensors")
    stack_path(deep / "b.safetensors").write_bytes(b"damaged")
    assert cli.main(["list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.replace(str(tmp_path), ".").replace("\\", "/").splitlines()
    assert lines[:4] == [
        "./a.safetensors",
        "    V1 mug, V2 mug",
        "./a.safetensors (a.other.concepts.safetensors)",
        "    V1 mug",
    ]
    assert lines[4:6] == ["./ab.safetensors", "    nothing learned yet"]
    assert lines[6] == "./deep/b.safetensors"
    assert "can't be read" in lines[7]
    assert lines[-2:] == ["./folder.concepts.safetensors", "    V1 mug"]
    assert cli.main(["list", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["names"] for row in rows] == [["V1 mug", "V2 mug"], ["V1 mug"], [], [], ["V1 mug"]]
    assert cli.main(["list", str(tmp_path / "none")]) == 2
    assert cli.main(["list", str(deep.with_name("deeper"))]) == 2


def test_a_stack_is_listed_with_the_checkpoint_of_the_longest_name(tmp_path: Path) -> None:
    names = ["sd.safetensors", "sd.v2.safetensors", "sd.v2.1.safetensors", "x.y.safetensors"]
    (tmp_path / "sub").mkdir()
    checkpoints = [tmp_path / name for name in [*names, "sub/sd.v2.safetensors"]]
    for checkpoint in checkpoints:
        checkpoint.touch()
    own = [stack_path(checkpoint) for checkpoint in checkpoints]
    named = [stack_path(checkpoint, "dogs") for checkpoint in checkpoints]
    # whose checkpoints are not there
    others = [stack_path(tmp_path / name) for name in ("x.safetensors", "sub/sd.safetensors")]
    elsewhere = tmp_path / "sd.v3.my.concepts.safetensors"
    for stack in (*own, *named, *others, elsewhere):
        store.save_stack(make_stack(1), stack)
    rows = upkeep.stacks_in(tmp_path).rows
    found = {row.stack_file: row.checkpoint for row in rows}
    assert len(rows) == len(found)
    assert found == {
        **dict(zip(own, checkpoints, strict=True)),
        **dict(zip(named, checkpoints, strict=True)),
        **dict.fromkeys(others),
        elsewhere: checkpoints[0],
    }


def test_a_link_is_listed_with_its_targets_stack(tmp_path: Path) -> None:
    folder, target = tmp_path / "models", tmp_path / "disk" / "sd.safetensors"
    for parent in (folder, target.parent):
        parent.mkdir()
    target.touch()
    own, named = stack_path(target), stack_path(folder / "link.safetensors", "dogs")
    (folder / "link.safetensors").symlink_to(target)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    for stack in (own, named):
        store.save_stack(make_stack(1), stack)
    rows = upkeep.stacks_in(folder).rows
    assert [(row.checkpoint, row.stack_file) for row in rows] == [
        (folder / "link.safetensors", own),
        (folder / "link.safetensors", named),
        (folder / "loop.safetensors", None),
    ]
    assert rows[0].names == ["V1 mug"]


# The first weights of files as their programs write them
NETS = {
    "sd15": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.bias"],
    "converted": ["state_dict.model.diffusion_model.out.2.bias"],
    "flux-in-one": ["model.diffusion_model.double_blocks.0.img_attn.proj.weight"],
    "loras/anima": ["llm_adapter.out_proj.weight", "blocks.0.mlp.layer1.weight"],
    "anima-of-nvidia": ["net.llm_adapter.out_proj.weight"],
    "anima-of-comfyui": ["model.diffusion_model.llm_adapter.out_proj.weight"],
}
OTHERS = {
    "Stable-diffusion/kohya": ["lora_unet_input_blocks_1_1_proj_in.lora_down.weight"],
    "comfyui": ["diffusion_model.llm_adapter.out_proj.lora_A.weight"],
    "a-trainers": ["model.diffusion_model.out.2.lora_up.weight"],
    "full": ["model.diffusion_model.out.2.diff"],
    "anima-lora": ["lora_unet_llm_adapter_blocks_0_mlp_0.alpha"],
    "peft/adapter_model": ["base_model.model.mid_block.attentions.0.to_k.lora_A.weight"],
    "word": ["emb_params"],
    "word-xl": ["clip_l", "clip_g"],
    "vae": ["encoder.conv_in.weight", "decoder.conv_in.weight"],
    "vae-of-a-checkpoint": ["first_stage_model.decoder.conv_in.weight"],
    "qwen": ["model.layers.0.mlp.up_proj.weight"],
    "folder/unet/diffusion_pytorch_model": ["down_blocks.0.resnets.0.conv1.weight"],
}


def test_files_without_a_net_are_not_listed(tmp_path: Path) -> None:
    for name, weights in {**NETS, **OTHERS}.items():
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({weight: torch.zeros(1) for weight in weights}, path, {"a": "model."})
    unreadable = ["broken.safetensors", "none.safetensors", "pipe.safetensors"]
    (tmp_path / unreadable[0]).write_bytes(b"GGUF")
    (tmp_path / unreadable[1]).symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / unreadable[2])
    expected = sorted(
        tmp_path / name for name in [*(f"{n}.safetensors" for n in NETS), *unreadable]
    )
    assert [row.checkpoint for row in upkeep.stacks_in(tmp_path).rows] == expected
    # a file that becomes another one is looked at again
    save_file({"emb_params": torch.zeros(2)}, tmp_path / "sd15.safetensors")
    assert tmp_path / "sd15.safetensors" not in checkpoints_in(tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="completion needs shtab")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "install-webui" in script
    assert "preview-every" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert "_shtab_continual_lora_learn___checkpoint_COMPGEN=_shtab_compgen_files" in script


def test_completion_without_its_library_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install shtab" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["plan", "json", "config", "help"])
def test_a_flag_that_is_no_part_of_a_run_is_not_suggested(name: str, tmp_path: Path) -> None:
    file = tmp_path / "dog.toml"
    file.write_text(f"{name} = true", encoding="utf-8")
    with pytest.raises(SettingError) as refused:
        with_config(["learn", "--config", str(file)], cli.parser())
    assert not re.search(rf"(mean |[ ,]){name}[?,.]", str(refused.value))
