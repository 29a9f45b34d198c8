"""Stage 8: which learned things a prompt names."""

from __future__ import annotations

import re

import pytest

from comfy_continual_lora.mentions import Mentions, mentions, named, noun_positions

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
        ("a (V3:1.2) dog, (V2:.8) waterfall", "a dog, waterfall", "a (V3:1.2) dog, waterfall"),
        ("a ((V3)) dog, {V2} waterfall", "a dog, waterfall", "a ((V3)) dog, waterfall"),
        (
            "a (fluffy V3:1.2) dog, V2",
            "a (fluffy :1.2) dog, waterfall",
            "a (fluffy V3:1.2) dog, waterfall",
        ),
        ("V3 (dog:1.2), V2", "(dog:1.2), waterfall", "V3 (dog:1.2), waterfall"),
        (
            "V3 (fluffy:1.3) dog, V2",
            "(fluffy:1.3) dog, waterfall",
            "V3 (fluffy:1.3) dog, waterfall",
        ),
        ("V3 \\(dog\\), V2", "\\(dog\\), waterfall", "V3 \\(dog\\), waterfall"),
        ("a \"V3\" dog, 'V2' waterfall", "a dog, waterfall", 'a "V3" dog, waterfall'),
        ("V3, dog, V2: waterfall", "dog, waterfall", "V3, dog, waterfall"),
        ("V3, a dog, V2", "dog, a dog, waterfall", "V3, a dog, waterfall"),
        ("V3 BREAK dog, V2", "dog BREAK dog, waterfall", "V3 BREAK dog, waterfall"),
        ("(V3:1.2), (V2)", "(dog:1.2), (waterfall)", "(V3:1.2), (waterfall)"),
        (
            "embedding:V3 dog, (embedding:V2:1.2) waterfall",
            "dog, waterfall",
            "embedding:V3 dog, waterfall",
        ),
        (
            "embedding:V3-old.pt V3 dog, V2",
            "embedding:V3-old.pt dog, waterfall",
            "embedding:V3-old.pt V3 dog, waterfall",
        ),
    ],
)
def test_nouns_take_the_place_of_words(prompt: str, neutral: str, first: str) -> None:
    found = _found(prompt)
    assert found.neutral == neutral
    assert found.own[0] == first


@pytest.mark.parametrize(
    "prompt",
    [
        "a (V3:1.2) dog and a ((V2)) waterfall",
        "V3, dog, V2 (big:1.2) (waterfalls)",
        "embedding:V3 dog, embedding:V2",
    ],
)
def test_each_noun_is_found_where_it_stands(prompt: str) -> None:
    assert [[one.rstrip("s") for one in nouns] for nouns in _nouns(_found(prompt))] == [
        ["dog"],
        ["waterfall"],
    ]


@pytest.mark.parametrize(
    "prompt",
    [
        "embedding:V3-a V2 waterfall",
        "embedding:V3.pt, V2",
        "embedding:art/V3 V2",
        "embedding:V30 V2",
    ],
)
def test_the_names_of_other_embeddings_are_none_of_ours(prompt: str) -> None:
    assert named([prompt], NOUNS) == ["V2"]


# how CLIP's tokenizer splits words that end in a noun
_PIECES = {"superdog": ["super", "dog"], "my_dog": ["my", "_", "dog"], "dogs": ["dogs"]}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a superdog, a V3 dog, V2", 5),
        ("a my_dog, a V3 dog, V2", 6),
        ("(superdog:1.2) (dog) V3 dog, V2", 3),
        ("dogs and a V3 dog, V2", 3),
        ("V3 dog and a superdog, V2", 0),
        ("embedding:dog-style a V3 dog, V2", 1),
    ],
)
def test_a_compound_is_no_noun_of_a_thing(prompt: str, expected: int) -> None:
    def tokens(text: str) -> list[str]:
        return [piece for one in re.findall(r"\w+|,", text) for piece in _PIECES.get(one, [one])]

    found = _found(prompt)
    read = re.sub(r"embedding:\S+|:1\.2", "", found.neutral)  # by a host
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(tokens(found.neutral)))}
    positions = noun_positions(
        found, [ids[one] for one in tokens(read)], lambda text: [ids[one] for one in tokens(text)]
    )
    assert positions[0] == [expected]


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
