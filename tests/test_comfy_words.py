"""Which nouns of a prompt are found among the tokens of ComfyUI's text encoders, whose layout is played
here; the real ones are in test_comfyui.py and test_anima_nodes.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_continual_lora.comfy_nodes.words import with_names, with_words

PROMPT = "a V1 mug and a V2 fish"
NOUNS = {"V1": "mug", "V2": "fish"}


class _Encoder:
    """The tokenizer of one text encoder: a token a word, behind a start token."""

    embedding_size, embedding_directory = 4, None

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def tokenizer(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(one, len(self.ids)) for one in text.split()]}

    def tokenize_with_weights(self, text: str) -> list[list[tuple[int, float]]]:
        return [[(-1, 1.0), *((one, 1.0) for one in self.tokenizer(text)["input_ids"])]]


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
    def clone(self) -> _Clip:
        return _Clip(tokenizer=self.tokenizer)


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
