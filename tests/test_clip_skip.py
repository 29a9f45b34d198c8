"""Clip skip: which layer of SD1.x's text encoder is used, everywhere, and who is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_families import write
from helpers_learn import learn_request
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfy_continual_lora import pipeline
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import SettingError, StackError
from comfy_continual_lora.presets import CLIP_SKIP_2
from comfy_continual_lora.requests import (
    DrawRequest,
    ExportRequest,
    ImportRequest,
    InfoRequest,
    LearnRequest,
    MergeRequest,
)
from comfy_continual_lora.settings import DrawSettings, LearnSettings
from comfy_continual_lora.store import open_stack, stack_path

QUICK = LearnSettings(method="lora", steps=2, rank=4)
SKIPPED = replace(QUICK, clip_skip=2)


def test_the_layer_before_the_last_is_normed(backbone: Backbone) -> None:
    encoder = backbone.text_encoders[0].model
    ids = torch.tensor([backbone.tokenize("a red mug", {})[0]])
    with torch.no_grad():
        layers = encoder(ids, output_hidden_states=True).hidden_states
        expected = encoder.final_layer_norm(layers[-2])
        plain = encoder.final_layer_norm(layers[-1])
        skipped = backbone.with_clip_skip(2).encode_prompts(["a red mug"])
        usual = backbone.encode_prompts(["a red mug"])
    assert torch.equal(skipped, expected)
    assert torch.allclose(usual, plain, atol=1e-6)
    assert not torch.allclose(usual, skipped, atol=1e-3)
    assert (backbone.clip_skip, backbone.with_clip_skip(2).clip_skip) == (1, 2)


def test_a_stack_keeps_its_clip_skip_and_refuses_another(
    learned: Callable[..., Path], pictures: Path
) -> None:
    checkpoint = learned(SKIPPED, "V1")
    stack = open_stack(stack_path(checkpoint))
    assert stack.checkpoint.clip_skip == 2
    assert stack.records[0].settings["clip_skip"] == 2
    other = LearnRequest(checkpoint, pictures, "V2", "ball", replace(QUICK, clip_skip=1))
    with pytest.raises(StackError, match=r"learned with clip_skip 2, not 1; one stack has one"):
        pipeline.learn_concept(other)
    pipeline.learn_concept(replace(other, settings=QUICK))  # the stack's own
    after = open_stack(stack_path(checkpoint))
    assert after.checkpoint.clip_skip == 2
    assert after.records[1].settings["clip_skip"] == 2
    info = pipeline.info(InfoRequest(checkpoint))
    assert info.clip_skip == 2
    assert info.summary().endswith("clip skip 2")


def test_a_stack_from_before_there_was_one_has_1(learned: Callable[..., Path]) -> None:
    path = stack_path(learned(QUICK, "V1"))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["stack"])
    del header["base"]["clip_skip"]
    save_file(load_file(path), path, {**metadata, "stack": json.dumps(header)})
    assert open_stack(path).checkpoint.clip_skip == 1


def test_drawing_and_learning_use_it(learned: Callable[..., Path]) -> None:
    draw = DrawSettings(steps=2)
    skipped, plain = (
        pipeline.draw(DrawRequest(learned(one, "V1"), ["a red mug"], draw)).pictures[0]
        for one in (SKIPPED, QUICK)
    )
    assert skipped.image.tobytes() != plain.image.tobytes()
    assert "Clip skip: 2," in skipped.texts["parameters"]
    assert json.loads(skipped.texts["continual_lora"])["clip_skip"] == 2
    assert "Clip skip" not in plain.texts["parameters"]
    losses = [
        open_stack(stack_path(learned(one, "V1"))).records[0].loss for one in (SKIPPED, QUICK)
    ]
    assert losses[0] != losses[1]


def test_the_export_says_it_to_programs_and_people(
    learned: Callable[..., Path], tmp_path: Path
) -> None:
    for settings, told in ((SKIPPED, "2"), (QUICK, None)):
        out = tmp_path / str(told)
        done = pipeline.export(ExportRequest(learned(settings, "V1"), out))
        assert done.lora
        with safe_open(done.lora, framework="pt") as file:
            assert file.metadata().get("ss_clip_skip") == told
        assert (CLIP_SKIP_2 in done.notes) == (told == "2")


def test_learning_tells_what_to_set_elsewhere(
    checkpoint: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    result = pipeline.learn_concept(learn_request(checkpoint, folders, "V1", SKIPPED))
    assert CLIP_SKIP_2 in result.summary()
    assert "CLIP Set Last Layer at -2" in CLIP_SKIP_2


def test_stacks_of_different_clip_skip_are_not_merged(learned: Callable[..., Path]) -> None:
    here, there = learned(SKIPPED, "V1"), learned(QUICK, "V1", "V2")
    with pytest.raises(StackError, match=r"learned with clip_skip 1, those of .* with 2"):
        pipeline.merge(MergeRequest(here, stack_path(there)))
    assert len(open_stack(stack_path(here)).records) == 1


def test_an_empty_stack_takes_the_clip_skip_of_what_is_merged_or_imported(
    learned: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    there = learned(SKIPPED, "V1")
    empty = tmp_path / "merged.concepts.safetensors"
    pipeline.merge(MergeRequest(checkpoint, stack_path(there), stack=empty))
    assert open_stack(empty).checkpoint.clip_skip == 2
    done = pipeline.export(ExportRequest(there, tmp_path / "out"))
    assert done.lora
    imported = ImportRequest(checkpoint, done.lora, "V5", "ball", done.embeddings[0])
    pipeline.import_concept(imported)
    assert open_stack(stack_path(checkpoint)).checkpoint.clip_skip == 2
    notes: list[str] = []
    plain = learned(QUICK, "V1")
    pipeline.import_concept(
        replace(imported, checkpoint=plain), lambda progress: notes.append(progress.note)
    )
    assert any("trained with clip skip 2; this stack has 1" in note for note in notes)
    assert open_stack(stack_path(plain)).checkpoint.clip_skip == 1


@pytest.mark.parametrize(("family", "name"), [("sd2", "SD2.x"), ("sdxl", "SDXL")])
def test_other_families_are_what_they_are(
    family: str, name: str, pictures: Path, tmp_path: Path
) -> None:
    path = write(family, tmp_path / f"{family}.safetensors")
    request = LearnRequest(path, pictures, "V1", "ball", replace(SKIPPED, size=64))
    with pytest.raises(SettingError, match=f"clip_skip is 2, but .* is {name}, which always uses"):
        pipeline.learn_concept(request)
    assert not stack_path(path).exists()
