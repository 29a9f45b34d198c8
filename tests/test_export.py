"""Stage 7: the exported files change the net exactly as the attached adapter does."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from helpers_store import make_record, make_stack
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save

from comfy_continual_lora import export, stock, store
from comfy_continual_lora.adapters.adapter import KINDS, delta_weights, new_adapter
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import StackError
from comfy_continual_lora.exported import Exported
from comfy_continual_lora.files import PRESET, WORDS
from comfy_continual_lora.settings import FORMATS
from comfy_continual_lora.stackfile import read_header
from comfy_continual_lora.webui.loras import exports_of, newest_lora, words_of


def _stack(backbone: Backbone, kind: str) -> store.ConceptStack:
    generator = torch.Generator().manual_seed(3)
    adapter = {
        k: t + 0.05 * torch.randn(t.shape, generator=generator)
        for k, t in new_adapter(backbone, 4, generator, kind).items()
    }
    stack = store.ConceptStack("f", rank=4)
    return stack.learned(
        make_record(1), torch.randn(3, backbone.word_width, generator=generator), adapter
    )


def _export(stack: store.ConceptStack, out: Path) -> Exported:
    return export.export_files(stack, out, out / "embeddings", "mini")


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_the_same_change(backbone: Backbone, tmp_path: Path, kind: str) -> None:
    stack = _stack(backbone, kind)
    done = _export(stack, tmp_path)
    assert done.lora
    tensors = load_file(done.lora)
    assert stack.adapter
    for layer, change in delta_weights(backbone, stack.adapter).items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        if kind == "full":
            exported = tensors.pop(f"{name}.diff").float()
        else:
            down, up, alpha = (
                tensors.pop(f"{name}.{leaf}").float()
                for leaf in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            exported = up @ down * alpha / len(down)
        assert torch.allclose(exported, change, atol=2e-3)
    assert not tensors


def test_words_card_and_metadata(backbone: Backbone, tmp_path: Path) -> None:
    stack = _stack(backbone, "lora")
    done = _export(stack, tmp_path)
    assert [p.name for p in done.embeddings] == ["V1.safetensors"]
    word = load_file(done.embeddings[0])
    assert list(word) == ["emb_params"]
    assert torch.allclose(word["emb_params"].float(), stack.tokens["V1"], atol=2e-3)
    assert done.lora
    with safe_open(done.lora, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "V1 mug"
    assert metadata["ss_output_name"] == done.lora.stem
    assert json.loads(done.lora.with_suffix(".json").read_text())["activation text"] == "V1 mug"


def test_a_lora_says_which_words_it_is_for(backbone: Backbone, tmp_path: Path) -> None:
    """By their embeddings' names; an export from before it did so is completed."""
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "V1.safetensors").write_bytes(b"somebody else's")
    stack = _stack(backbone, "lora")
    lora = _export(stack, tmp_path).lora
    assert lora
    words = words_of(lora)
    assert words == ({"V1-2": stack.records[0].noun}, stack.checkpoint.preset)
    with safe_open(lora, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k not in (WORDS, PRESET)}
    lora.write_bytes(save(load_file(lora), metadata))
    assert words_of(lora) == ({}, "")
    assert _export(stack, tmp_path).lora == lora
    assert words_of(lora) == words


def test_a_stacks_exports_are_found_whatever_their_names(
    backbone: Backbone, tmp_path: Path
) -> None:
    """Another stack's and a stranger's are left out; the newest comes first."""
    stack, other = _stack(backbone, "lora"), _stack(backbone, "lora")
    stack.fingerprint = other.fingerprint = "0" * 64
    own, path = tmp_path / "own.concepts.safetensors", tmp_path / "renamed.safetensors"
    store.save_stack(stack, own)
    store.save_stack(other, tmp_path / "other.concepts.safetensors")
    lora = _export(stack, tmp_path / "out").lora
    assert lora
    lora.rename(path := tmp_path / "out" / "renamed.safetensors")
    theirs = _export(other, tmp_path / "out").lora
    assert theirs
    (tmp_path / "out" / "broken.safetensors").write_bytes(b"no tensors")
    os.utime(path, (1, 1))
    found = exports_of(tmp_path / "out", own)
    assert found == [path]
    folders = tmp_path / "out", tmp_path / "out" / "embeddings"
    assert newest_lora(*folders, own, "V1") == (path, "V1")
    assert newest_lora(*folders, own, "V9") is None
    assert exports_of(tmp_path / "out", tmp_path / "none.concepts.safetensors") == []


def test_what_is_exported_again_is_the_newest(backbone: Backbone, tmp_path: Path) -> None:
    """The stack went back to an earlier version: its LoRA goes with the embeddings written now."""
    stack, path = _stack(backbone, "lora"), tmp_path / "own.concepts.safetensors"
    stack.fingerprint = "0" * 64
    store.save_stack(stack, path)
    first = _export(stack, tmp_path).lora
    assert first
    assert stack.adapter
    other = dataclasses.replace(stack, adapter={k: t + 1 for k, t in stack.adapter.items()})
    undone = _export(other, tmp_path).lora
    os.utime(first, (1, 1))
    assert newest_lora(tmp_path, tmp_path / "embeddings", path, "V1") == (undone, "V1")
    assert undone
    os.utime(undone, (2, 2))
    assert _export(stack, tmp_path).lora == first
    assert newest_lora(tmp_path, tmp_path / "embeddings", path, "V1") == (first, "V1")


def test_a_word_is_found_under_the_name_it_was_exported_by(tmp_path: Path) -> None:
    """Another's embedding has the word's, so has another stack's numbered one; later both are gone.
    The stack is one of an early version, which stored no identity.
    """
    own, out, embeddings = tmp_path / "own.concepts.safetensors", tmp_path / "out", tmp_path / "em"
    shutil.copy(Path(__file__).parent / "data" / "stack-8a93aef.safetensors", own)
    stack = store.open_stack(own)
    other = dataclasses.replace(stack, identity="ab" * 8)
    embeddings.mkdir()
    (embeddings / "V1.pt").write_bytes(b"another embedding")
    theirs = export.export_files(other, tmp_path / "theirs", embeddings, "other")
    assert newest_lora(out, embeddings, own, "V1") is None
    done = export.export_files(stack, out, embeddings, "own")
    assert [path.stem for path in theirs.embeddings] == ["V1-2", "V2", "V3"]
    assert [path.stem for path in done.embeddings] == ["V1-3", "V2-2", "V3-2"]
    for before in (True, False):  # it is stored by this version
        for token, path in zip(("V1", "V2", "V3"), done.embeddings, strict=True):
            assert newest_lora(out, embeddings, own, token) == (done.lora, path.stem)
        if before:
            assert not read_header(own)["identity"]
            store.save_stack(stack, own)
    for path in theirs.embeddings:
        path.unlink()
    again = export.export_files(stack, out, embeddings, "own").lora
    assert again
    os.utime(again, (2**31, 2**31))
    for token, name in (("V1", "V1-2"), ("V2", "V2"), ("V3", "V3")):
        assert newest_lora(out, embeddings, own, token) == (again, name)
    assert newest_lora(out, embeddings, own, "V1-2") is None


@pytest.mark.parametrize(
    "words",
    ["", "{", "[]", "1", '{"../V1": "dog"}', '{"V1": 3}', '{"V1": null}', "[" * 100_000]
    + [json.dumps({"V1": "dog" * 100})],
)
def test_what_another_file_says_of_its_words_is_not_believed(tmp_path: Path, words: str) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(save({"x": torch.zeros(1)}, {WORDS: words, PRESET: "sd1"}))
    assert words_of(path) == ({}, "")


def test_what_is_no_lora_has_no_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    other = tmp_path / "other.safetensors"
    other.write_bytes(save({"x": torch.zeros(1)}, {WORDS: '{"V1": "dog"}', PRESET: "flux"}))
    for path in (broken, other, tmp_path, tmp_path / "missing", Path()):
        assert words_of(path) == ({}, "")


def test_a_changed_adapter_gets_a_new_name(backbone: Backbone, tmp_path: Path) -> None:
    stack = _stack(backbone, "lora")
    first = _export(stack, tmp_path).lora
    assert _export(stack, tmp_path).lora == first
    assert stack.adapter
    next(iter(stack.adapter.values())).add_(1)
    assert _export(stack, tmp_path).lora != first


def test_a_full_size_change_has_no_place_in_peft(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="only kohya's format can hold it"):
        export.export_files(_stack(backbone, "full"), tmp_path, tmp_path, "mini", "peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_other_programs_find_the_rank_that_the_matrices_have(
    backbone: Backbone, tmp_path: Path, kind: str, format: str
) -> None:
    """Also if solving for several concepts raised it above the one that the stack learns with."""
    stack = dataclasses.replace(_stack(backbone, kind), rank=2)
    lora = export.export_files(stack, tmp_path, tmp_path, "mini", format).lora
    assert lora
    assert stack.adapter
    file = lora / "adapter_model.safetensors" if format == "peft" else lora
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    unet: Any = copy.deepcopy(backbone.unet)
    if format == "peft":
        loaded: Any = PeftModel.from_pretrained(unet, str(lora)).base_model.model
        assert json.loads((lora / "adapter_config.json").read_text())["r"] == 4
    else:
        loader: Any = StableDiffusionLoraLoaderMixin
        blocks = SimpleNamespace(layers_per_block=2)
        state, alphas = loader.lora_state_dict(str(file), unet_config=blocks)
        loader.load_lora_into_unet(state, alphas, unet, low_cpu_mem_usage=False)
        loaded = unet
    for layer, change in delta_weights(backbone, stack.adapter).items():
        module = loaded.get_submodule(layer)
        (name,) = module.lora_A
        assert torch.allclose(module.get_delta_weight(name), change, atol=2e-3)


def test_the_full_size_change_has_no_rank(backbone: Backbone, tmp_path: Path) -> None:
    lora = _export(_stack(backbone, "full"), tmp_path).lora
    assert lora
    with safe_open(lora, framework="pt") as file:
        assert "ss_network_dim" not in file.metadata()


@pytest.mark.parametrize("part", ["adapter", "word"])
def test_what_float16_can_not_hold_is_not_exported(
    backbone: Backbone, tmp_path: Path, part: str
) -> None:
    stack = _stack(backbone, "lora")
    for tensor in (stack.adapter or {}).values() if part == "adapter" else stack.words.values():
        tensor.fill_(1e6)
    with pytest.raises(StackError, match=r"values above 65504.*nothing was exported"):
        _export(stack, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nothing_to_export(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="nothing to export"):
        _export(store.ConceptStack("f"), tmp_path)


# --- whose the files are --------------------------------------------------------------------------


def test_an_earlier_version_supersedes_nothing(backbone: Backbone, tmp_path: Path) -> None:
    """As ComfyUI's nodes export it, where the stack has learned more since."""
    stack = _owned(backbone, "a" * 16)
    assert stack.adapter
    word, words = stack.words[stack.records[0].id], ["V1", "V2"]
    newest = stack.learned(make_record(2), word + 1, {k: t + 1 for k, t in stack.adapter.items()})
    last = export.export_files(newest, tmp_path, tmp_path, "mini", words=words)
    assert [path.name for path in last.embeddings] == ["V1.safetensors", "V2.safetensors"]
    done = export.export_files(stack, tmp_path, tmp_path, "mini", remove=True, words=words)
    assert (done.removed, done.superseded) == ([], [])
    assert all(path.exists() for path in last.files)
    after = export.export_files(newest, tmp_path, tmp_path, "mini", remove=True, words=words)
    assert after.removed == [done.lora]


def _owned(backbone: Backbone, identity: str, token: str = "V1") -> store.ConceptStack:
    stack = _stack(backbone, "lora")
    stack.identity = identity
    stack.records = [dataclasses.replace(stack.records[0], token=token)]
    return stack


THEIRS = {
    "V1.safetensors": save({"emb_params": torch.ones(1, 256)}),
    "v1.safetensors": save(
        {"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, {"ss_output_name": "v1"}
    ),
    "V1.pt": b"a pickle that another program made",
    "V1.png": b"an embedding in a picture",
    "V1.SAFETENSORS": b"not even safetensors",
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_users_file_is_left_alone_and_the_word_gets_another_name(
    backbone: Backbone, tmp_path: Path, name: str
) -> None:
    theirs = tmp_path / "embeddings" / name
    theirs.parent.mkdir()
    theirs.write_bytes(THEIRS[name])
    done = _export(_owned(backbone, "a" * 16), tmp_path)
    assert theirs.read_bytes() == THEIRS[name]
    assert [path.name for path in done.embeddings] == ["V1-2.safetensors"]
    assert (done.renamed, done.triggers) == ({"V1": "V1-2"}, ["V1-2 mug"])
    assert "use V1-2 in prompts" in done.notes[0]
    assert done.lora
    with safe_open(done.lora, framework="pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "V1-2 mug"
    assert json.loads(done.lora.with_suffix(".json").read_text())["activation text"] == "V1-2 mug"
    again = _export(_owned(backbone, "a" * 16), tmp_path)
    assert (again.embeddings, again.lora) == (done.embeddings, done.lora)


def test_two_stacks_share_folders_and_each_keeps_its_own(
    backbone: Backbone, tmp_path: Path
) -> None:
    first, second = _owned(backbone, "a" * 16), _owned(backbone, "b" * 16)
    second.words = {"id1": second.words["id1"] + 1}
    one, two = _export(first, tmp_path), _export(second, tmp_path)
    assert [one.embeddings[0].name, two.embeddings[0].name] == [
        "V1.safetensors",
        "V1-2.safetensors",
    ]
    before = one.embeddings[0].read_bytes()
    first.words = {"id1": first.words["id1"] - 1}
    assert _export(first, tmp_path).embeddings == one.embeddings  # its own is replaced
    assert one.embeddings[0].read_bytes() != before
    assert torch.allclose(
        load_file(two.embeddings[0])["emb_params"].float(), second.words["id1"], atol=5e-3
    )


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_users_of_diffusers_are_told_of_what_it_reads_in_part(
    backbone: Backbone, tmp_path: Path, format: str
) -> None:
    """tests/test_families.py has diffusers itself read such words."""
    stack = _owned(backbone, "a" * 16)
    assert len(stack.words["id1"]) > 1
    for number, token in ((2, "v2"), (3, "V3")):
        record = dataclasses.replace(make_record(number), token=token)
        vectors = torch.ones(2 if token == "v2" else 1, backbone.word_width)
        stack = stack.learned(record, vectors, stack.adapter)
    done = export.export_files(stack, tmp_path, tmp_path / "embeddings", "mini", format)
    told = [note for note in done.notes if "diffusers" in note]
    assert len(told) == (format != "kohya")
    if told:
        assert "embeddings of V1 in lower case" in told[0]  # v2 is in lower case, V3 has one vector
        assert 'token="v1"' in told[0]


def test_a_new_name_is_no_other_word_of_the_stack(backbone: Backbone, tmp_path: Path) -> None:
    """V1's name is another file's, and V1-2 is a concept of its own, learned after an export."""
    theirs = tmp_path / "embeddings" / "V1.safetensors"
    theirs.parent.mkdir()
    theirs.write_bytes(THEIRS["V1.safetensors"])
    alone = _owned(backbone, "a" * 16)
    assert _export(alone, tmp_path).renamed == {"V1": "V1-2"}
    word = torch.ones(1, backbone.word_width)
    both = alone.learned(dataclasses.replace(make_record(2), token="v1-2"), word, alone.adapter)
    done = _export(both, tmp_path)
    assert done.renamed == {"V1": "V1-3", "v1-2": "v1-2-2"}  # V1's older file stays
    both.records[1] = dataclasses.replace(both.records[1], token="V1-2")
    done = _export(both, tmp_path)
    assert done.renamed == {"V1": "V1-3"}
    assert torch.equal(load_file(done.embeddings[1])["emb_params"].float(), word)
    some = export.export_files(
        alone, tmp_path / "some", theirs.parent, "mini", only=["V1"], words=both.tokens
    )
    assert some.renamed == {"V1": "V1-3"}


def test_what_an_earlier_program_exported_is_taken_for_its_own(
    backbone: Backbone, tmp_path: Path
) -> None:
    stack = _owned(backbone, "a" * 16)
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "V1.safetensors").write_bytes(
        save(stock.embedding(stack.words["id1"], stack.checkpoint))
    )
    assert not _export(stack, tmp_path).renamed


def test_a_checkpoint_in_the_folder_is_safe(backbone: Backbone, tmp_path: Path) -> None:
    checkpoint = tmp_path / "sd15.safetensors"
    checkpoint.write_bytes(b"4 GB")
    done = export.export_files(_owned(backbone, "a" * 16, token="sd15"), tmp_path, tmp_path, "sd15")
    assert checkpoint.read_bytes() == b"4 GB"
    assert done.embeddings == [tmp_path / "sd15-2.safetensors"]


def test_superseded_exports_are_listed_and_removed_when_asked(
    backbone: Backbone, tmp_path: Path
) -> None:
    stack, other = _owned(backbone, "a" * 16), _owned(backbone, "b" * 16)
    theirs = _export(other, tmp_path / "shared")
    alone = export.export_files(
        stack, tmp_path / "shared", tmp_path / "shared", "mini", only=["V1"]
    )
    assert stack.adapter
    made = []
    for _ in range(9):
        next(iter(stack.adapter.values())).add_(1)
        made.append(_export(stack, tmp_path / "shared").lora)
    last = _export(stack, tmp_path / "shared")
    assert set(last.superseded) == set(made[:-1])
    assert all(path.name in last.notes[-1] for path in last.superseded)
    mine = tmp_path / "shared" / "mine.safetensors"
    mine.write_bytes(save({"x": torch.ones(1)}, {"ss_output_name": "mine"}))
    cleaned = export.export_files(
        stack, tmp_path / "shared", tmp_path / "shared" / "embeddings", "mini", remove=True
    )
    assert set(cleaned.removed) == set(made[:-1])
    assert not cleaned.superseded
    left = {path for path in (tmp_path / "shared").iterdir() if path.suffix == ".safetensors"}
    assert left == {mine, cleaned.lora, theirs.lora, alone.lora, *alone.embeddings}
    assert {p.stem for p in (tmp_path / "shared").glob("*.json")} == {
        p.stem for p in left if p not in (mine, *alone.embeddings)
    }


@pytest.mark.parametrize("stem", ["mini", "sd1.5.safetensors"])
def test_a_format_does_not_supersede_another(tmp_path: Path, stem: str) -> None:
    """Each is for other programs. Those of what the stack held before are superseded in all."""
    stack, words = make_stack(2), tmp_path / "words"

    def exported(**options: Any) -> list[Exported]:
        return [
            export.export_files(stack, tmp_path, words, stem, format, **options)
            for format in FORMATS
        ]

    before = exported()
    assert [done.superseded for done in before] == [[]] * len(FORMATS)
    assert stack.adapter
    next(iter(stack.adapter.values())).add_(1)
    loras = {done.lora for done in before}
    assert [set(done.superseded) for done in exported()] == [loras] * len(FORMATS)
    after = exported(remove=True)
    assert set(after[0].removed) == loras
    assert all(done.lora and done.lora.exists() for done in after)


def test_an_embedding_of_a_forgotten_word_is_listed(backbone: Backbone, tmp_path: Path) -> None:
    stack = _owned(backbone, "a" * 16)
    old = _export(stack, tmp_path).embeddings[0]
    now = _export(_owned(backbone, "a" * 16, token="V2"), tmp_path)
    assert old in now.superseded


def test_names_say_the_stack_and_what_is_on_it() -> None:
    assert export.lora_name("sd15.pets", ["V1", "V2"], "1a2b3c4d5e") == "sd15.pets-V1-V2-1a2b3c4d"
    many = export.lora_name("a:b<c>,d", [f"V{n}" for n in range(1, 51)], "1a2b3c4d5e")
    assert many == "a-b-c--d-V1-to-V50-50-concepts-1a2b3c4d"
    assert len(export.lora_name("x" * 300, ["y" * 64] * 4, "0" * 64)) < 230


def test_a_word_that_is_a_path_is_refused_where_files_are_written(
    backbone: Backbone, tmp_path: Path
) -> None:
    """A second time: the stack that was read was checked, this one was made in memory."""
    with pytest.raises(StackError, match="can't be a file name"):
        _export(_owned(backbone, "a" * 16, token="../../victim"), tmp_path / "a" / "b")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_an_export_that_was_killed_is_completed(backbone: Backbone, tmp_path: Path) -> None:
    stack = _owned(backbone, "a" * 16)
    lora = _export(stack, tmp_path).lora
    assert lora
    lora.with_suffix(".json").unlink()
    before = lora.stat().st_mtime_ns
    assert _export(stack, tmp_path).lora == lora
    assert lora.with_suffix(".json").exists()
    assert lora.stat().st_mtime_ns == before  # web UIs know these weights by this file


@pytest.mark.parametrize("stem", ["mini", "sd1.5", "sd1.5.safetensors", ".5"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_was_written_is_known_among_files_of_others(
    tmp_path: Path, format: str, stem: str
) -> None:
    stack, out = make_stack(2), tmp_path / "out"
    stack.records[-1] = dataclasses.replace(
        stack.records[-1], preview=base64.b64encode(b"\xff\xd8").decode()
    )
    others = ["sd1-anothers.safetensors", "mini.json", ".json", "sd1.5.safetensors", "sd1.json"]
    out.mkdir()
    for name in others:
        (out / name).touch()
    done = export.export_files(stack, out, out / "words", stem, format)
    assert done.lora
    (out / f"{done.lora.name.removesuffix('.safetensors')}-more.safetensors").touch()
    files = {path.relative_to(out).as_posix() for path in done.files}
    written = {f"{done.lora.name}", "words/V1.safetensors", "words/V2.safetensors"}
    if format == "kohya":
        written |= {f"{done.lora.stem}.json", f"{done.lora.stem}.preview.jpg"}
    assert files == written
    assert all(path.exists() for path in done.files)


def test_a_file_where_pefts_folder_would_be_stays(tmp_path: Path) -> None:
    lora = export.export_files(make_stack(2), tmp_path, tmp_path, "mini", "peft").lora
    assert lora
    out = tmp_path / "out"
    out.mkdir()
    (out / lora.name).write_text("a file")
    with pytest.raises(StackError, match=r"failed \(File exists\)"):
        export.export_files(make_stack(2), out, out, "mini", "peft")
    assert (out / lora.name).read_text() == "a file"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_part_of_peft_is_completed(backbone: Backbone, tmp_path: Path, name: str) -> None:
    stack = _owned(backbone, "a" * 16)

    def exported() -> Path:
        lora = export.export_files(stack, tmp_path, tmp_path, "mini", "peft").lora
        assert lora
        return lora

    folder = exported()
    before = (folder / name).read_bytes()
    (folder / name).unlink()
    assert exported() == folder
    assert len((folder / name).read_bytes()) == len(before)
    (folder / "adapter_config.json").write_text('{"r": 16')  # cut short, or by an earlier version
    exported()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
