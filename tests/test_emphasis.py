"""Weights, BREAK and long prompts in what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_areas import words_of
from torch import Tensor

from comfy_continual_lora import pipeline, sample
from comfy_continual_lora.checkpoint.backbone import Backbone, DrawnText
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.emphasis import CHUNK, Text, Token, chunks, unread, weighted_texts
from comfy_continual_lora.errors import SettingError
from comfy_continual_lora.mentions import mentions
from comfy_continual_lora.requests import DrawRequest
from comfy_continual_lora.settings import DrawSettings, LearnSettings
from comfy_continual_lora.together import noun_mask

NOUNS = {"V1": "mug", "V2": "fish"}
LONG = "a small red ball on green grass under blue sky " * 9  # 90 tokens


# --- the syntax ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red mug", [("a red mug", 1)]),
        ("", []),
        ("a (red) mug", [("a ", 1), ("red", 1.1), (" mug", 1)]),
        ("a ((red)) [mug]", [("a ", 1), ("red", 1.21), (" ", 1), ("mug", 1 / 1.1)]),
        ("(red mug:1.3), grass", [("red mug", 1.3), (", grass", 1)]),
        ("(a (red:1.5) mug:0.5)", [("a ", 0.5), ("red", 0.75), (" mug", 0.5)]),
        ("(V1 mug: 1.2 )", [("V1 mug", 1.2)]),
        ("(red:-1)", [("red", -1)]),
        (r"miku \(vocaloid\) \[x\]", [("miku (vocaloid) [x]", 1)]),
        ("(red) (mug)", [("red", 1.1), (" ", 1), ("mug", 1.1)]),
        ("(tea)(pot)", [("teapot", 1.1)]),  # one word
        ("a (red mug", [("a ", 1), ("red mug", 1.1)]),
        ("a [red", [("a ", 1), ("red", 1 / 1.1)]),
        ("red) mug] a:1.2) b", [("red) mug] a:1.2) b", 1)]),
        ("time: 12:30", [("time: 12:30", 1)]),
        ("(a:1.2.3)", [("a:1.2.3)", 1.1)]),  # no number
        ("a\\b", [("ab", 1)]),
        ("red BREAK blue", [("red", 1), None, ("blue", 1)]),
        ("(red\nBREAK\nblue:1.2)", [("red", 1.2), None, ("blue", 1.2)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
        ("a BREAK", [("a", 1), None, ("", 1)]),
    ],
)  # fmt: skip
def test_weights_and_breaks(prompt: str, expected: list[tuple[str, float] | None]) -> None:
    parts = weighted_texts(prompt)
    assert [part and part.text for part in parts] == [one and one[0] for one in expected]
    for part, one in zip(parts, expected, strict=True):
        if part and one:
            assert part.weight == pytest.approx(one[1])


def test_a_weight_that_no_number_can_hold_is_text() -> None:
    assert weighted_texts(f"(a:{'9' * 400})") == [Text(f"a:{'9' * 400})", 1.1)]


COMMA = 7


def _tokens(text: str) -> list[list[Token] | None]:
    """A unit for each letter: "," the comma, "|" BREAK, "W" a word of four vectors."""
    known = {",": [Token(COMMA)], "|": None, "W": [Token(0, k) for k in range(4)]}
    return [known.get(letter, [Token(100 + ord(letter))]) for letter in text]


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("", [0]),
        ("a" * 75, [75]),
        ("a" * 76, [75, 1]),
        ("a" * 151, [75, 75, 1]),
        ("a|a", [1, 1]),
        ("a|", [1]),
        ("|a", [0, 1]),
        ("a||a", [1, 0, 1]),
        ("a" * 70 + "," + "b" * 10, [71, 10]),  # behind a near comma
        ("a" * 55 + "," + "b" * 20, [56, 20]),
        ("a" * 54 + "," + "b" * 21, [75, 1]),  # too far away
        ("a" * 74 + ",b", [75, 1]),
        ("a" * 75 + ",b", [75, 2]),
        ("a" * 72 + "W", [72, 4]),  # a word stays in one chunk
        ("a" * 71 + "W", [75]),
        ("a" * 68 + ",WWb", [73, 5]),
    ],
)
def test_chunks(text: str, lengths: list[int]) -> None:
    found = chunks(_tokens(text), COMMA)
    assert [len(chunk) for chunk in found] == lengths
    assert [t for chunk in found for t in chunk] == [t for u in _tokens(text) for t in u or ()]


# --- features ------------------------------------------------------------------------------------


def test_a_short_prompt_is_encoded_as_it_is_learned(backbone: Backbone) -> None:
    words = words_of(backbone)
    for prompt in ("", "a photo of a V1 mug, on grass"):
        assert torch.equal(
            backbone.encode_drawn(prompt, words), backbone.encode_prompts([prompt], words)
        )


def test_every_chunk_is_encoded_by_itself(backbone: Backbone) -> None:
    first, second = " ".join(["red"] * CHUNK), "a blue mug"
    both = backbone.encode_drawn(f"{first} {second}")
    assert both.shape == (1, 154, backbone.word_width)
    assert torch.allclose(both[:, :77], backbone.encode_prompts([first]), atol=1e-5)
    assert torch.allclose(both[:, 77:], backbone.encode_prompts([second]), atol=1e-5)
    assert torch.equal(backbone.encode_drawn(f"{first} BREAK {second}"), both)
    ids, positions, count = backbone.drawn_positions(f"{first} {second}")
    assert (len(ids), positions[0], positions[74:76], count) == (78, 1, [75, 78], 154)


def test_weights_scale_their_words_and_keep_the_mean(backbone: Backbone) -> None:
    plain = backbone.encode_drawn("a red mug")
    scaled = plain.clone()
    scaled[:, 2] *= 1.3
    scaled *= plain.mean() / scaled.mean()
    assert torch.allclose(backbone.encode_drawn("a (red:1.3) mug"), scaled, atol=1e-5)
    assert torch.equal(backbone.encode_drawn("a (red:1) mug"), plain)
    assert torch.equal(
        backbone.encode_drawn(r"a \(red\) mug"), backbone.encode_prompts(["a (red) mug"])
    )
    # another chunk keeps what it has
    two = backbone.encode_drawn("a red mug BREAK a (red:1.3) mug")
    assert torch.allclose(two[:, :77], plain, atol=1e-5)
    assert torch.allclose(two[:, 77:], scaled, atol=1e-5)


def test_a_learned_word_is_whole_in_the_second_chunk_and_has_its_weight(
    backbone: Backbone,
) -> None:
    words = {"V1": torch.randn(4, backbone.word_width)}
    first = " ".join(["red"] * 73)
    long = backbone.encode_drawn(f"{first} (V1:1.2) mug", words)
    short = backbone.encode_drawn(f"{first} BREAK (V1:1.2) mug", words)
    assert torch.equal(long, short)
    found = backbone.chunks(f"{first} (V1:1.2) mug", words)
    assert [len(chunk) for chunk in found] == [73, 5]
    assert [(token.vector, token.weight) for token in found[1][:4]] == [(k, 1.2) for k in range(4)]
    assert found[1][4].weight == 1


def test_pooled_text_is_the_first_chunk_s(tmp_path: Path) -> None:
    from helpers_families import write

    xl = load_backbone(write("sdxl", tmp_path / "xl.safetensors"), device="cpu")
    long = xl.encode_drawn("a red mug BREAK a (blue:1.4) fish")
    short = xl.encode_prompts(["a red mug"])
    assert long.shape[1] == 155
    assert torch.allclose(long[:, -1], short[:, -1], atol=1e-5)
    assert xl.context(long).shape[1] == 154
    assert torch.allclose(long[:, :77], short[:, :77], atol=1e-5)


def test_texts_of_different_lengths_are_repeated(backbone: Backbone) -> None:
    text = DrawnText(backbone, {})
    both = text([LONG, "a mug"])
    assert both.shape[1] == 154
    assert torch.equal(both[1, :77], both[1, 77:])
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([500, 500])
    with torch.no_grad():
        together = backbone.predict(noisy, timestep, both)
        alone = backbone.predict(noisy[1:], timestep[1:], text(["a mug"]))
    assert torch.allclose(together[1:], alone, atol=1e-4)


# --- drawing -------------------------------------------------------------------------------------


def _draw(backbone: Backbone, prompts: list[str], **settings: object) -> Tensor:
    resolved = DrawSettings(steps=2, size=64, **settings).resolved("mini")  # type: ignore[arg-type]
    words = words_of(backbone)
    return sample.draw(backbone, words, prompts, [3] * len(prompts), resolved, nouns=NOUNS)


def test_all_of_a_long_prompt_is_drawn(backbone: Backbone) -> None:
    blue, red = (_draw(backbone, [f"{LONG}{color} mug"])[0] for color in ("blue", "red"))
    assert not torch.equal(blue, red)
    one, other = _draw(backbone, ["a mug", f"{LONG}blue mug"], negative=f"{LONG}{LONG}ugly")
    assert torch.allclose(
        other, _draw(backbone, [f"{LONG}blue mug"], negative=f"{LONG}{LONG}ugly")[0]
    )
    assert not torch.equal(one, other)


def test_two_things_in_one_long_prompt_are_kept_apart(backbone: Backbone) -> None:
    """In whichever chunk they are, and with weights."""
    prompt = f"a (V1 mug:1.2), {LONG} and a V2 fish"
    scene = mentions(prompt, NOUNS)
    assert scene
    mask = noun_mask(backbone, scene)
    assert mask.shape == (2, 154)
    assert mask[0].nonzero().flatten().tolist() == [2]
    assert mask[1].nonzero().min() > 77
    apart = _draw(backbone, [prompt], negative="ugly")
    assert torch.allclose(_draw(backbone, [prompt, "a mug"], negative="ugly")[0], apart[0])
    mixed = _draw(backbone, [prompt], negative="ugly", mixed=True)
    assert not torch.allclose(apart, mixed, atol=1e-3)
    assert _draw(backbone, [prompt], negative=LONG + LONG, guidance=3.0).isfinite().all()


def test_a_noun_across_two_chunks_is_found(backbone: Backbone) -> None:
    prompt = "a V2 fish " + " ".join(["red"] * 72) + " V1 golden retriever"
    scene = mentions(prompt, {"V1": "golden retriever", "V2": "fish"})
    assert scene
    assert scene.tokens == ("V2", "V1")
    assert noun_mask(backbone, scene)[1].nonzero().flatten().tolist() == [75, 78]


def test_a_long_prompt_is_drawn_without_a_note(learned: Callable[..., Path]) -> None:
    checkpoint = learned(LearnSettings(method="lora", steps=2, rank=4), "V1")
    notes: list[str] = []
    request = DrawRequest(checkpoint, [f"{LONG}V1 ball"], DrawSettings(steps=1, size=64))
    pipeline.draw(request, lambda progress: notes.append(progress.note))
    assert not any(notes)


@pytest.mark.parametrize(
    ("prompt", "marks"),
    [
        ("a (V1 mug:1.2) [on] grass, 12:30", []),
        ("a mug <lora:pets-V1:1> on grass", ["<lora:pets-V1:1>"]),
        ("a [red:blue:.5] mug AND a [cat|dog]", ["[red:blue:.5]", "AND", "[cat|dog]"]),
        ("SAND and ANDY", []),
        ("[a dog (red:1.2)] [red:blue] [a (b|c)] [1:2:3:4] [a:b|c]", []),
        (r"\[red:blue:.5\] \[a|b\] [a\:3]", []),
        ("[dog:1.2] at [time 10:30]", ["[dog:1.2]", "[time 10:30]"]),
        ("[dog::8] [ : 1e1 ] [[cat]:-.5]", ["[dog::8]", "[ : 1e1 ]", "[[cat]:-.5]"]),
        ("[(red:1.2):blue:5] [fe|]male", ["[(red:1.2):blue:5]", "[fe|]"]),
        ("a [unclosed [red:blue: 3 ]", ["[red:blue: 3 ]"]),
    ],
)
def test_what_only_web_uis_read_is_told(prompt: str, marks: list[str]) -> None:
    assert unread(prompt) == marks


def test_brackets_in_brackets_have_a_limit() -> None:
    assert weighted_texts("(a" * 100 + ")" * 100)
    assert len([*filter(None, weighted_texts("(a)[b]" * 20_000))]) == 40_000
    for bracket in "([":
        with pytest.raises(SettingError, match="more than 100 brackets"):
            weighted_texts(f"{bracket}a" * 101)


def test_weights_too_large_are_refused(backbone: Backbone) -> None:
    with pytest.raises(SettingError, match=r"weights of the prompt .* are too large"):
        backbone.encode_drawn(f"a (red:{'9' * 38}) mug")
