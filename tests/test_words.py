"""What a learned word is in a text, for every part of the program: where it begins and ends, what only
looks like one, what of a prompt is read, and the nouns that go with it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_learn import QUICK, save_concept
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_continual_lora import concepts, pipeline, requests
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import ConceptImagesError, SettingError
from comfy_continual_lora.mentions import named, not_learned, unknown_words, whole_words
from comfy_continual_lora.progress import Progress

WORDS = ["sks", "V1", "V1-a", "V10", "V1_a", "my-V1"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("V1-a ball", ["V1-a"]),
        ("V1 -a ball", ["V1"]),
        ("V10, V1_a and my-V1", ["V10", "V1_a", "my-V1"]),
        ('(V1:1.2), v1\'s "V1" V1.', ["V1"]),
        ("V1-ab V1- V100 xV1 V1x", []),
        ("V1狗 éV1", ["V1"]),
        ("embedding:V1-a", ["V1-a"]),
        ("\u017fks and s\u212as", []),
    ],
)
def test_a_word_ends_where_no_letter_of_words_follows(text: str, found: list[str]) -> None:
    assert named([text], WORDS) == found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.from_regex(r"[0-9A-Za-z_-]{1,4}", fullmatch=True), min_size=1, unique_by=str.lower),
    st.data(),
)
def test_every_word_is_found_among_any_others(words: list[str], data: st.DataObject) -> None:
    text = data.draw(st.lists(st.sampled_from(words), min_size=1))
    assert whole_words(words).findall(" ".join(text)) == text


def test_the_backbone_reads_the_longer_word(backbone: Backbone) -> None:
    vectors = torch.eye(2, backbone.word_width)
    words = {"V1": vectors[:1], "V1-a": vectors[1:]}
    _, slot = backbone.tokenize("a V1-a ball and a V1 ball", words)
    assert [one for one in slot if one >= 0] == [1, 0]
    _, alone = backbone.tokenize("a V1-a ball", {"V1": vectors[:1]})
    assert max(alone) == -1


@pytest.mark.parametrize(
    ("prompt", "words", "unknown"),
    [
        ("a V3 ball", [], ["V3"]),
        ("a v3 ball, V3", ["V1"], ["v3"]),
        ("a V1-b ball and a V1_x", ["V1"], ["V1-b", "V1_x"]),
        ("sks2 beside a sks1 dog", ["sks1"], ["sks2"]),
        ("a V1 ball, 50 mm, f/2.8, 4k, R2-D2, A4 paper, iPhone 15, mp3, v", ["V1"], []),
        ("a dog-like V1, a well-known ball - on grass", ["V1", "dog"], ["dog-like"]),
        ("embedding:V3 <lora:V1-old:0.8> (V1:1.1) V1- V1", ["V1"], []),
        ("3 of 2", ["2"], []),
    ],
)
def test_what_only_looks_like_a_word_is_told(
    prompt: str, words: list[str], unknown: list[str]
) -> None:
    assert unknown_words([prompt], words) == unknown


def test_the_note_says_what_is_learned() -> None:
    assert not_learned(["V3"], ["V1", "V2"]) == (
        "V3 is not a learned word (learned: V1, V2), so it is read as ordinary text."
    )
    assert "V3 and V4 are not learned words (nothing is learned yet)" in not_learned(
        ["V3", "V4"], []
    )


def test_the_end_that_is_not_read(backbone: Backbone) -> None:
    words = {"V1": torch.zeros(4, backbone.word_width)}
    prompt = "a small red ball on green grass " * 12
    end = backbone.not_read(prompt + "V1", words)
    read = (prompt + "V1").removesuffix(end)
    assert end.endswith("V1")
    assert backbone.not_read(read, words) == ""
    assert backbone.tokenize(read, words)[0] == backbone.tokenize(prompt + "V1", words)[0]
    assert backbone.not_read("a photo of a V1 ball", words) == ""
    assert backbone.not_read("红" * 200, words)


def _learned_notes(request: requests.LearnRequest) -> list[str]:
    seen: list[Progress] = []
    pipeline.learn_concept(request, seen.append)
    return [progress.note for progress in seen if progress.note]


LONG = "a very detailed picture of a sunny day with many small things in it, " * 8


def test_captions_that_are_too_long_are_told_or_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = save_concept(tmp_path / "p", 0, 3)
    request = requests.LearnRequest(checkpoint, folder, "V1", "ball", QUICK, device="cpu")
    for number in range(3):
        (folder / f"{number}.txt").write_text(LONG + "V1 ball")
    with pytest.raises(ConceptImagesError, match="V1 would not be learned: every caption"):
        pipeline.learn_concept(request)
    (folder / "0.txt").write_text("V1 ball, " + LONG)
    (folder / "1.txt").write_text("V1 ball")
    note = next(note for note in _learned_notes(request) if "too long" in note)
    assert "captions of 2 of 3 pictures" in note
    assert "In 1 of them V1 is not read" in note


def test_a_noun_is_learned_without_its_article(checkpoint: Path, tmp_path: Path) -> None:
    folder = save_concept(tmp_path / "p", 0, 3)
    request = requests.LearnRequest(checkpoint, folder, "V1", " A  ball", QUICK, device="cpu")
    notes = _learned_notes(request)
    assert any('The class noun is "ball"' in note for note in notes)
    result = pipeline.learn_concept(
        requests.LearnRequest(checkpoint, folder, "V1", "ball", QUICK, device="cpu")
    )
    assert (result.again, result.record.noun) == (True, "ball")


@pytest.mark.parametrize(
    ("noun", "class_noun"),
    [("an apple", "apple"), ("the the", "the"), ("a", "a"), ("Andes", "Andes"), ("ant", "ant")],
)
def test_articles(noun: str, class_noun: str) -> None:
    assert requests.without_article(noun) == class_noun


@pytest.mark.parametrize(
    ("noun", "problem"),
    [
        ("dog " * 20, "more than 8 words"),
        ("d" * 81, "more than 8 words or 80 letters"),
        ("dog\ncat", "not a single line"),
        ("dog\0", "not a single line"),
        ("v1 dog", "contains V1 itself"),
    ],
)
def test_nouns_that_prompts_could_not_contain(noun: str, problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        concepts.check_noun(noun, "V1")
    concepts.check_noun("black and white border collie", "V1")


def test_drawing_tells_what_is_not_learned_and_not_read(checkpoint: Path) -> None:
    seen: list[Progress] = []
    drawing = requests.DrawSettings(steps=1, size=64)
    prompts = ["a photo of a V7 ball", LONG]
    pipeline.draw(
        requests.DrawRequest(checkpoint, prompts, drawing, device="cpu"),
        seen.append,
    )
    notes = [progress.note for progress in seen if progress.note]
    assert "holds no concept yet" in notes[0]
    assert "V7 is not a learned word (nothing is learned yet)" in notes[1]
    assert "is too long: the text encoder does not read its end" in notes[2]
