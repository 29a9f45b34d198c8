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


def _texts(texts: list[str], copy_from: Any = None) -> list[str]:
    return list(texts)


def _encode(model: Any, texts: list[str], steps: int) -> Any:
    """As the web UIs' own."""
    return model.get_learned_conditioning(texts)


class _Model:
    """A web UI's model, whose text features are random; its tokens are words."""

    def __init__(self, **engines: Any) -> None:
        self.encoded: list[str] = []
        self.text_processing_engine = self
        self.__dict__.update(engines)

    def get_learned_conditioning(self, texts: list[str]) -> torch.Tensor:
        self.encoded += texts
        return torch.randn(len(texts), 8, 4)

    def tokenize_line(self, line: str) -> Any:
        return [SimpleNamespace(tokens=[hash(one) for one in line.split()])], None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[hash(one) for one in text.split()] for text in texts]


def _processing(model: Any, told: list[str]) -> Any:
    return SimpleNamespace(
        prompts=["a V1 ball and a V2 mug"],
        negative_prompts=[],
        extra_generation_params={},
        sd_model=model,
        comment=told.append,
    )


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    modules, parser = ModuleType("modules"), ModuleType("modules.prompt_parser")
    modules.shared = SimpleNamespace(opts=None)  # type: ignore[attr-defined]
    parser.SdConditioning = _texts  # type: ignore[attr-defined]
    parser.get_learned_conditioning = _encode  # type: ignore[attr-defined]
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
    apart.Apart().begin(_processing(model, told))
    assert (apart.prompt_parser.get_learned_conditioning is not _encode) == is_read
    assert ["of V1, V2 is for another kind of checkpoint" in one for one in told] == (
        [] if is_read else [True]
    )


def test_a_second_pass_with_another_checkpoint_has_its_scenes(
    apart: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Forge family loads it as a model of its own, after the first pass."""
    monkeypatch.setattr(apart, "words_in_use", lambda: ({"V1": "ball", "V2": "mug"}, "sd1"))
    things, told = apart.Apart(), []
    processing = _processing(_Model(), told)
    things.begin(processing)
    for model in (processing.sd_model, _Model()):
        (features,) = apart.prompt_parser.get_learned_conditioning(model, processing.prompts, 4)
        assert model.encoded == [
            "a V1 ball and a V2 mug",
            "a ball and a mug",
            "a V1 ball and a mug",
            "a ball and a V2 mug",
        ]
        assert torch.equal(things.scenes[-1].whole[0], features)
        assert things.scenes[-1].nouns.nonzero().tolist() == [[0, 1], [1, 4]]
        assert "get_learned_conditioning" not in model.__dict__
    assert len(things.scenes) == 2
    assert not told
    things.end()
    assert apart.prompt_parser.get_learned_conditioning is _encode


def test_a_second_pass_of_another_kind_is_told(apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "words_in_use", lambda: ({"V1": "ball", "V2": "mug"}, "sd1"))
    things, told = apart.Apart(), []
    processing = _processing(_Model(), told)
    things.begin(processing)
    flux = processing.sd_model = _Model(text_processing_engine_t5=None)
    apart.prompt_parser.get_learned_conditioning(flux, processing.prompts, 4)
    things.before_sampling(processing)
    assert flux.encoded == processing.prompts
    (note,) = told
    assert "of V1, V2 is for another kind of checkpoint" in note
    things.finish(processing)
    assert not processing.extra_generation_params


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
