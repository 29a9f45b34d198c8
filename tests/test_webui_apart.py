"""Several learned things in one prompt of a web UI: what needs no web UI that runs, but stands in for
its modules.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_continual_lora.hostareas import SceneText

NAME = "comfy_continual_lora.webui.apart"


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    modules, parser = ModuleType("modules"), ModuleType("modules.prompt_parser")
    modules.shared = SimpleNamespace(opts=None)  # type: ignore[attr-defined]
    parser.SdConditioning = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.prompt_parser", parser)
    yield importlib.import_module(NAME)
    del sys.modules[NAME]


def _scene(whole: torch.Tensor) -> SceneText:
    return SceneText(("V1", "V2"), whole, whole, (whole, whole), torch.ones(2, whole.shape[1]))


def test_a_prompt_that_begins_with_another_is_not_taken_for_it(apart: Any) -> None:
    """As a prompt with BREAK begins with that of the second pass, encoded later."""
    short, more = torch.randn(2, 1, 77, 8).unbind()
    long, scenes = torch.cat([short, more], 1), apart.Apart()
    scenes.scenes.extend([_scene(long), _scene(short)])
    found = [
        one and one[1].whole.shape[1] for one in scenes._scenes_of(torch.cat([long, long * 2]))
    ]
    assert found == [154, None]
    assert scenes._scenes_of(short)[0][1].whole is short


def test_the_infotext_of_a_batch_is_its_own(apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "words_in_use", lambda: ({}, "sd1"))
    things, kept = apart.Apart(), {"Size": "64x64"}
    processing = SimpleNamespace(
        prompts=["a dog"], extra_generation_params={**kept, apart.INFOTEXT: "V1, V2"}
    )
    things.begin(processing)
    things.finish(processing)
    assert processing.extra_generation_params == kept


@pytest.mark.parametrize(
    ("engine", "preset", "is_read"),
    [
        ("text_processing_engine_l", "sdxl", True),
        ("text_processing_engine_anima", "anima", True),
        ("text_processing_engine_gemma", "sdxl", False),  # Z-Image and Lumina in Forge Neo
        ("text_processing_engine_t5", "sd1", False),  # Flux
        ("text_processing_engine_l", "anima", False),
    ],
)
def test_a_lora_of_another_kind_of_checkpoint_does_not_fail(
    apart: Any, monkeypatch: pytest.MonkeyPatch, engine: str, preset: str, is_read: bool
) -> None:
    monkeypatch.setattr(apart, "words_in_use", lambda: ({"V1": "ball", "V2": "mug"}, preset))
    reader = SimpleNamespace(tokenize_line=lambda text: None)
    model = SimpleNamespace(get_learned_conditioning=list, **{engine: reader})
    told: list[str] = []
    processing = SimpleNamespace(
        prompts=["a V1 ball and a V2 mug"],
        negative_prompts=[],
        extra_generation_params={},
        sd_model=model,
        comment=told.append,
    )
    apart.Apart().begin(processing)
    assert (model.get_learned_conditioning is not list) == is_read
    assert ["of V1, V2 is for another kind of checkpoint" in one for one in told] == (
        [] if is_read else [True]
    )


def test_on_anima_words_are_plain_text(apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "words_in_use", lambda: ({"V1": "ball"}, "anima"))
    monkeypatch.setattr(apart, "_embeddings", list)
    told: list[str] = []
    processing = SimpleNamespace(
        prompts=["a V10 ball"],
        negative_prompts=[],
        extra_generation_params={},
        comment=told.append,
    )
    apart.Apart().begin(processing)
    (note,) = told
    assert "V10 is not a learned word" in note
