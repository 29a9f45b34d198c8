"""Stage 8: which learned things a prompt names."""

from __future__ import annotations

import pytest

from comfy_continual_lora.mentions import Mentions, mentions

NOUNS = {
    "V1": "plushie tortoise",
    "V2": "waterfall",
    "V3": "dog",
    "sks": "dog",
    "V4": "",
    "my.thing": "mug",
}


def _nouns(found: Mentions) -> list[list[str]]:
    return [[found.neutral[a:b] for a, b in places] for places in found.nouns]


def _found(prompt: str) -> Mentions:
    found = mentions(prompt, NOUNS)
    assert found
    return found


def test_the_paper_s_prompt() -> None:
    found = _found("A photo of V1 plushie tortoise. Posing in front of V2 waterfall")
    assert found.tokens == ("V1", "V2")
    assert found.neutral == "A photo of plushie tortoise. Posing in front of waterfall"
    assert found.own == (
        "A photo of V1 plushie tortoise. Posing in front of waterfall",
        "A photo of plushie tortoise. Posing in front of V2 waterfall",
    )
    assert _nouns(found) == [["plushie tortoise"], ["waterfall"]]


@pytest.mark.parametrize(
    ("prompt", "neutral", "first"),
    [
        ("a V3 dog and a sks dog", "a dog and a dog", "a V3 dog and a dog"),
        ("V3 and V2", "dog and waterfall", "V3 and waterfall"),
        ("a v3 fluffy white Dog, SKS", "a fluffy white Dog, dog", "a v3 fluffy white Dog, dog"),
        ("(V3 dog:1.2) [V2]", "(dog:1.2) [waterfall]", "(V3 dog:1.2) [waterfall]"),
        ("V3 dog BREAK V2 waterfalls", "dog BREAK waterfalls", "V3 dog BREAK waterfalls"),
        ("a V3 on a dog, V2", "a dog on a dog, waterfall", "a V3 on a dog, waterfall"),
        ("a V4 and my.thing", "a thing and mug", "a V4 and mug"),
        ("V3\ndog\nV2\nwaterfall", "dog\nwaterfall", "V3\ndog\nwaterfall"),
    ],
)
def test_nouns_take_the_place_of_words(prompt: str, neutral: str, first: str) -> None:
    found = _found(prompt)
    assert found.neutral == neutral
    assert found.own[0] == first


def test_a_thing_named_twice_is_one_thing() -> None:
    found = _found("a V3 dog, a V2 waterfall and a V3 dog")
    assert found.tokens == ("V3", "V2")
    assert found.own[0] == "a V3 dog, a waterfall and a V3 dog"
    assert _nouns(found) == [["dog", "dog"], ["waterfall"]]
    assert mentions("a V3 dog and a V3 dog", NOUNS) is None


def test_every_place_is_of_a_noun_of_its_own() -> None:
    found = _found("a V3 dog and a sks dog and a dog")
    assert found.neutral == "a dog and a dog and a dog"
    assert found.nouns == (((2, 5),), ((12, 15),))


@pytest.mark.parametrize("prompt", ["", "a dog", "V3", "V30 and V3", "xsks V3 dog", "V3 V3"])
def test_fewer_than_two_are_drawn_as_they_are(prompt: str) -> None:
    assert mentions(prompt, NOUNS) is None


def test_without_learned_words_there_is_nothing_to_keep_apart() -> None:
    assert mentions("a V1 and a V2", {}) is None
