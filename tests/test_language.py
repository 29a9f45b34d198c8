"""Stage 4: words that are in no list are left alone as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_learn import random_adapter
from helpers_store import make_record
from words import leak, without

from comfy_continual_lora import language, targets, textspace
from comfy_continual_lora.adapters.adapter import Adapter, new_adapter
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.consolidation import solution
from comfy_continual_lora.errors import Cancelled
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import SolveSettings
from comfy_continual_lora.stack import ConceptStack

# left out of every list, and of the sample of language
NOUNS = ("star", "moon", "mug", "house", "fish", "dog", "sneaker", "mushroom")
COLORS = ("orange", "teal", "purple", "white")
PLACES = ("on sand", "in the sky", "in snow", "at night", "on carpet")
LEFT_OUT = (*NOUNS, *COLORS, *PLACES)


def _listed(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in LEFT_OUT]


@pytest.fixture
def reduced() -> Iterator[None]:
    """The lists and the sample without the words that are left out."""
    with without(LEFT_OUT):
        yield


def _captions(
    nouns: tuple[str, ...], colors: tuple[str, ...], places: tuple[str, ...]
) -> list[str]:
    return [
        f"a photo of a {color} {noun} {places[(n + k) % len(places)]}"
        for n, noun in enumerate(nouns)
        for k, color in enumerate(colors)
    ]


def _stack(backbone: Backbone, share: float) -> ConceptStack:
    """Of two concepts with random words."""
    generator = torch.Generator().manual_seed(1)
    table = backbone.text_encoders[0].model.get_input_embeddings().weight
    records = [
        replace(make_record(number), noun=noun) for number, noun in ((1, "ball"), (2, "box"))
    ]
    words = {
        record.id: table.mean(0)
        + table.std(0) * torch.randn(4, backbone.word_width, generator=generator)
        for record in records
    }
    stack = ConceptStack(backbone.fingerprint, records, words)
    return targets.with_prompts(targets.PromptBank(backbone, stack.tokens), stack, language=share)


@pytest.mark.slow
@pytest.mark.usefixtures("reduced")
@pytest.mark.parametrize("start", ["random", "as learning starts"])
def test_solving_moves_no_leak_into_words_that_are_in_no_list(mini: Backbone, start: str) -> None:
    """With the lists alone, as it was, it does: three to six times as much as before."""
    adapters = [random_adapter(mini, "lora", seed) for seed in (1, 2)]
    if start != "random":
        adapters = [_late(mini, seed) for seed in (1, 2)]
    others = textspace.moment(mini, {}, _captions(NOUNS, COLORS, PLACES)).cpu()
    before = sum(leak(mini, adapter, others) for adapter in adapters) / len(adapters)
    after = {}
    for share, ridge in ((0.0, 1e-4), (language.LANGUAGE, SolveSettings().ridge)):
        settings = SolveSettings(ridge=ridge, language=share)
        solved, _ = solution(_stack(mini, share), settings, adapters)
        assert solved
        after[share] = leak(mini, solved, others)
    assert after[0.0] > 2 * before
    assert after[language.LANGUAGE] < before


def _late(backbone: Backbone, seed: int) -> Adapter:
    """A as it is drawn for learning, and B random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.02 * torch.randn(t.shape, generator=generator) if name.endswith(".B") else t
        for name, t in new_adapter(backbone, 16, generator).items()
    }


def test_the_sample_is_wide_and_the_same_every_time(mini: Backbone) -> None:
    prompts = language.language_prompts(mini.tokenizer)
    assert prompts == language.language_prompts(mini.tokenizer)
    assert len(prompts) == language.PROMPTS
    ids = [mini.tokenizer(prompt).input_ids[1:-1] for prompt in prompts]  # type: ignore[operator]
    lengths = [len(one) for one in ids]
    assert min(lengths) <= 2
    assert max(lengths) >= 75
    assert len({token for one in ids for token in one}) > 10_000
    assert any("worst quality" in prompt for prompt in prompts)
    assert any("1girl" in prompt for prompt in prompts)


def test_encoding_it_shows_progress_can_be_stopped_and_is_done_once(
    backbone: Backbone, tmp_path: Path
) -> None:
    seen: list[int] = []

    def stop(progress: Progress) -> None:
        seen.append(progress.step)
        if progress.step >= 64:
            raise Cancelled

    with pytest.raises(Cancelled):
        targets.PromptBank(backbone, {}, cache=tmp_path, on_progress=stop).ordinary(["ball"])
    assert seen == [0, 16, 32, 48, 64]
    seen.clear()
    again = targets.PromptBank(
        backbone, {}, cache=tmp_path, on_progress=lambda p: seen.append(p.step)
    )
    again.ordinary(["ball"])
    assert seen[-1] == language.PROMPTS - 16
    seen.clear()
    targets.PromptBank(backbone, {}, cache=tmp_path, on_progress=stop).ordinary(["fish"])
    assert not seen
