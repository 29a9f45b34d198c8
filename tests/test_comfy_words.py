"""Which nouns of a prompt are found among the tokens of ComfyUI's text encoders, and what goes with the
prompt's conditioning. Their layout is played here; the real ones are in test_comfyui.py and
test_anima_nodes.py.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_continual_lora.comfy_nodes.words import KEY, with_names, with_words

PROMPT = "a V1 mug and a V2 fish"
NOUNS = {"V1": "mug", "V2": "fish"}
CHUNK = 8  # words of a prompt that are encoded together


class _Encoder:
    """The tokenizer of one text encoder: a token a word, behind a start token."""

    embedding_size, embedding_directory = 4, None

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def tokenizer(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(one, len(self.ids)) for one in text.split()]}

    def tokenize_with_weights(self, text: str) -> list[list[tuple[int, float]]]:
        ids = self.tokenizer(text)["input_ids"]
        starts = range(0, max(1, len(ids)), CHUNK)
        return [
            [(-1, 1.0), *((one, 1.0) for one in ids[start : start + CHUNK])] for start in starts
        ]


class _Tokenizer:
    """As ComfyUI's: an attribute for each text encoder, and tokens under names of their own."""

    def __init__(self, encoders: dict[str, str]) -> None:
        self.encoders = encoders
        for attribute in encoders:
            setattr(self, attribute, _Encoder())

    def tokenize_with_weights(self, text: str) -> dict[str, Any]:
        return {
            name: getattr(self, attribute).tokenize_with_weights(text)
            for attribute, name in self.encoders.items()
        }


class _Clip(SimpleNamespace):
    """Positions are those of the text encoder that is given the least, as in SDXL."""

    patcher, use_clip_schedule = SimpleNamespace(forced_hooks=None), True

    def clone(self) -> _Clip:
        return _Clip(tokenizer=self.tokenizer)

    def encode_from_tokens(
        self, tokens: Any, return_pooled: Any = False, return_dict: bool = False
    ) -> Any:
        cond = self._cond(tokens)
        return {"cond": cond, "pooled_output": None} if return_dict else cond

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        if self.patcher.forced_hooks is None:
            values = self.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
            return [[values.pop("cond"), values]]
        return [[self._cond(tokens) + part, {"clip_start_percent": part / 2}] for part in range(2)]

    def _cond(self, tokens: Any) -> torch.Tensor:
        count = min(len(chunks) for chunks in tokens.values()) * (CHUNK + 1)
        return torch.full((1, count, 1), float(sum(map(len, next(iter(tokens.values()))))))


@pytest.mark.parametrize(
    "encoders",
    [
        {"clip_l": "l"},
        {"clip_h": "h"},
        {"clip_g": "g", "clip_l": "l"},
        {"qwen3_06b": "qwen3_06b", "t5xxl": "t5xxl"},
    ],
    ids=["SD1.x", "SD2.x", "SDXL", "Anima"],
)
def test_the_nouns_of_a_scene_are_found_among_the_tokens(encoders: dict[str, str]) -> None:
    clip = _Clip(tokenizer=_Tokenizer(encoders))
    if "t5xxl" in encoders:
        told = with_names(clip, list(NOUNS), NOUNS)
    else:
        width = 4 * len(encoders)
        told = with_words(clip, {token: torch.zeros(1, width) for token in NOUNS}, NOUNS)
    tokens = told.tokenizer.tokenize_with_weights(PROMPT)
    assert set(tokens) == set(encoders.values())
    for one in tokens.values():
        assert one.scene.tokens == ("V1", "V2")
        assert one.nouns == [[2], [5]]  # of "a mug and a fish", behind the start token
    assert not hasattr(
        next(iter(told.tokenizer.tokenize_with_weights("a V1 mug").values())), "scene"
    )


def _words(encoders: dict[str, str]) -> Any:
    vectors = {token: torch.zeros(1, 4 * len(encoders)) for token in NOUNS}
    return with_words(_Clip(tokenizer=_Tokenizer(encoders)), vectors, NOUNS)


def test_each_part_of_a_schedule_has_its_scene() -> None:
    """Where hooks change CLIP while it samples."""
    clip = _words({"clip_l": "l"})
    tokens = clip.tokenizer.tokenize_with_weights(PROMPT)
    ((cond, values),) = clip.encode_from_tokens_scheduled(tokens)
    assert values[KEY].whole is cond
    clip.patcher = SimpleNamespace(forced_hooks=object())
    parts = clip.encode_from_tokens_scheduled(tokens)
    assert len(parts) == 2
    for number, (cond, values) in enumerate(parts):
        scene = values[KEY]
        assert scene.whole is cond
        assert len(scene.own) == 2
        assert float(scene.neutral[0, 0, 0]) == 6 + number  # a start token and five words
        assert scene.nouns.nonzero().tolist() == [[0, 2], [1, 5]]
    clip.use_clip_schedule = False  # the class above does not look, ComfyUI does
    assert not any(KEY in values for _, values in clip.encode_from_tokens_scheduled(tokens))


def test_text_encoders_may_be_given_prompts_of_different_lengths() -> None:
    """CLIP Text Encode SDXL has a prompt for each, and makes the shorter one as long as the other."""
    clip = _words({"clip_g": "g", "clip_l": "l"})
    tokenize = clip.tokenizer.tokenize_with_weights
    tokens = tokenize(f"a photo of the table on which there are {PROMPT}")
    tokens["l"] = tokenize(PROMPT)["l"]
    while len(tokens["l"]) < len(tokens["g"]):
        tokens["l"] += tokenize("")["l"]
    scene = clip.encode_from_tokens(tokens, return_dict=True)[KEY]
    assert scene.neutral.shape == scene.own[0].shape == scene.whole.shape
    # behind the start tokens of two chunks
    assert scene.nouns.nonzero().tolist() == [[0, 12], [1, 15]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What nodes said."""
    messages: list[str] = []
    host: Any = ModuleType("host")
    host.tell = messages.append
    monkeypatch.setitem(sys.modules, "comfy_continual_lora.comfy_nodes.host", host)
    return messages


def test_a_word_of_two_stacks_is_told(told: list[str]) -> None:
    clip = _words({"clip_l": "l"})
    assert not told
    with_words(clip, {"V3": torch.zeros(1, 4)}, {"V3": "ball"})
    assert not told
    with_words(
        clip, {"v2": torch.zeros(1, 4), "V3": torch.zeros(1, 4)}, {"v2": "cat", "V3": "ball"}
    )
    (note,) = told
    assert note.startswith("This CLIP knows v2 already, from an Apply Concepts before this one. ")


def test_text_encoders_that_are_given_different_things_are_told(told: list[str]) -> None:
    clip = _words({"clip_g": "g", "clip_l": "l"})
    tokens = clip.tokenizer.tokenize_with_weights(PROMPT)
    tokens["l"] = clip.tokenizer.tokenize_with_weights("best quality")["l"]
    ((_, values),) = clip.encode_from_tokens_scheduled(tokens)
    assert KEY not in values
    (note,) = told
    assert note.startswith("V1 and V2 are drawn mixed, because not every text encoder")
