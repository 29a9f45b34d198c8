"""Stage 8: one prompt with several learned things, on the mini-SD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_areas import NOUNS, PROMPT, follows_areas, words_of
from helpers_learn import QUICK, random_adapter
from torch import Tensor

from comfy_continual_lora import pipeline, requests, sample
from comfy_continual_lora.adapters.adapter import KINDS, attached, folded
from comfy_continual_lora.areas import AreaSettings
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.errors import Cancelled
from comfy_continual_lora.mentions import mentions
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import DrawSettings
from comfy_continual_lora.together import drawn_together, noun_mask

SETTINGS = DrawSettings(steps=4, size=64).resolved("mini")


def _drawn(
    backbone: Backbone, prompts: Sequence[str], nouns: dict[str, str] | None, **changes: Any
) -> Tensor:
    with attached(backbone, random_adapter(backbone, "lora", 1)):
        return sample.draw(
            backbone,
            words_of(backbone),
            prompts,
            range(len(prompts)),
            replace(SETTINGS, **changes),
            nouns=nouns,
        )


@pytest.mark.parametrize("prompt", ["a V1 mug", "a mug and a fish", "a V1 mug and another V1 mug"])
def test_fewer_than_two_things_are_drawn_bit_for_bit_as_ever(
    backbone: Backbone, prompt: str
) -> None:
    before = dict(backbone.unet.attn_processors)
    plain, apart = (_drawn(backbone, [prompt], nouns) for nouns in (None, NOUNS))
    assert torch.equal(plain, apart)
    _drawn(backbone, [PROMPT], NOUNS)
    assert dict(backbone.unet.attn_processors) == before
    assert torch.equal(plain, _drawn(backbone, [prompt], NOUNS))


def test_mixed_draws_as_ever(backbone: Backbone) -> None:
    plain, mixed = (
        _drawn(backbone, [PROMPT], nouns, mixed=nouns is not None) for nouns in (None, NOUNS)
    )
    assert torch.equal(plain, mixed)
    assert not torch.allclose(plain, _drawn(backbone, [PROMPT], NOUNS), atol=0.02)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_picture_of_several_does_not_depend_on_its_neighbours(
    backbone: Backbone, guidance: float
) -> None:
    prompts = ["a V1 mug", PROMPT, "a V3 star, a V2 fish, a V1 mug", "a star", "V3 and V2"]
    together = _drawn(backbone, prompts, NOUNS, guidance=guidance)
    assert together.shape == (5, 3, 64, 64)
    for number in (1, 2):
        with attached(backbone, random_adapter(backbone, "lora", 1)):
            settings = replace(SETTINGS, guidance=guidance)
            words = words_of(backbone)
            alone = sample.draw(backbone, words, [prompts[number]], [number], settings, nouns=NOUNS)
        assert torch.allclose(together[number], alone[0], atol=1e-3)


def test_words_without_effect_draw_the_nouns(backbone: Backbone) -> None:
    """Words that equal their nouns leave nothing to keep apart: all contexts are the same."""
    words = {"V1": backbone.word_of_vocabulary("mug"), "V2": backbone.word_of_vocabulary("fish")}
    assert all(word is not None for word in words.values())
    prompts = ["a V1 and a V2 on grass", "a mug and a fish on grass"]
    apart = sample.draw(backbone, words, prompts, [3, 3], SETTINGS, nouns=NOUNS)  # type: ignore[arg-type]
    assert torch.allclose(apart[0], apart[1], atol=1e-3)


def test_the_mask_of_nouns_has_their_positions(backbone: Backbone) -> None:
    nouns = {**NOUNS, "V3": "golden retriever"}
    scene = mentions("V1 mug, V2, V3 golden retriever near V1", nouns)
    assert scene
    ids = backbone.tokenize(scene.neutral, {})[0]
    found = [
        [backbone.tokenizer.decode([ids[k]]).strip() for k in row.nonzero().flatten()]  # type: ignore[operator]
        for row in noun_mask(backbone, scene)
    ]
    assert found[:2] == [["mug", "mug"], ["fish"]]
    assert "".join(found[2]) == "goldenretriever"


# --- masks that are given ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_given_halves_are_attention_couple(backbone: Backbone, size: tuple[int, int]) -> None:
    follows_areas(backbone, *size)


def test_a_mask_for_the_whole_picture_is_that_concept_s_prompt(backbone: Backbone) -> None:
    scene = mentions(PROMPT, NOUNS)
    assert scene
    text = FrozenText(backbone, words_of(backbone))
    noisy = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    timestep = torch.tensor([500, 20])
    masks = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    with torch.no_grad(), attached(backbone, random_adapter(backbone, "lora", 1)):
        with drawn_together(backbone, text, [scene] * 2, (8, 12), AreaSettings(), masks) as one:
            ours = one.predict(noisy, timestep, None)
        own = text([scene.own[0]] * 2)
        assert torch.allclose(ours, backbone.predict(noisy, timestep, own), atol=1e-4)


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_noun_that_is_not_found_is_drawn_the_plain_way_with_a_note(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "out_of_sight", lambda *_: ["V2"])
    prompt = "a V1 mug and a V2 fish"
    notes: list[str] = []

    def note(progress: Progress) -> None:
        if progress.note:
            notes.append(progress.note)

    words = words_of(backbone)
    drawn = sample.draw(backbone, words, [prompt] * 2, [0, 1], SETTINGS, note, NOUNS)
    plain = sample.draw(backbone, words, [prompt] * 2, [0, 1], SETTINGS)
    assert torch.equal(drawn, plain)
    assert len(notes) == 1
    assert "The noun of V2 was not found" in notes[0]
    assert "drawn without keeping" in notes[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["a V1 mug", PROMPT, ("a V1 mug", "a V2 fish")])
def test_a_folded_adapter_draws_as_an_attached_one(
    backbone: Backbone, prompt: str | Sequence[str], kind: str
) -> None:
    drawn = []
    for carried in (attached, folded):
        with carried(backbone, random_adapter(backbone, kind, 1)):
            words = words_of(backbone)
            drawn.append(sample.draw(backbone, words, [prompt], [0], SETTINGS, nouns=NOUNS))
    assert torch.allclose(*drawn, atol=1e-4)
    plain = sample.draw(backbone, words, [prompt], [0], SETTINGS, nouns=NOUNS)
    assert not torch.allclose(drawn[0], plain, atol=0.02)


def test_cancelling_leaves_the_net_as_it_was(backbone: Backbone) -> None:
    before = dict(backbone.unet.attn_processors)

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        sample.draw(backbone, words_of(backbone), [PROMPT], [0], SETTINGS, stop, NOUNS)
    assert dict(backbone.unet.attn_processors) == before


def test_a_word_of_a_concept_that_was_left_out_is_said(
    learned: Callable[..., Path],
) -> None:
    checkpoint = learned(QUICK, "V1", "V2")
    notes: list[str] = []

    def note(progress: Progress) -> None:
        if progress.note:
            notes.append(progress.note)

    def pictures(prompt: str, **more: Any) -> list[bytes]:
        request = requests.DrawRequest(checkpoint, [prompt], SETTINGS, device="cpu", **more)
        return [one.image.tobytes() for one in pipeline.draw(request, note).pictures]

    both = "a V1 ball and a V2 box"
    assert pictures(both, only=["v1"])
    assert len(notes) == 1
    assert "name V2, which is on the stack but not among the concepts in use" in notes[0]
    mixed = replace(SETTINGS, mixed=True)
    request = requests.DrawRequest(checkpoint, [both], mixed, device="cpu")
    assert pipeline.draw(request).pictures[0].image.tobytes() not in pictures(both)
    assert len(notes) == 1
