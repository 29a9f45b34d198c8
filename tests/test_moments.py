"""Moments of text features are computed once and kept beside the stack, exactly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_learn import NOUNS, QUICK, learn_request, stack_of

from comfy_continual_lora import moments, pipeline, requests, store
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import Cancelled
from comfy_continual_lora.files import cache_folder
from comfy_continual_lora.moments import MomentCache
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.targets import PromptBank

PROMPTS = ["a photo of a V1 ball", "a V1 ball on grass"]


@pytest.fixture
def words(backbone: Backbone) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = backbone.word_width
    return {
        token: torch.randn(n, width, generator=generator) for n, token in ((1, "V1"), (2, "V2"))
    }


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of every moment that was computed."""
    seen: list[list[str]] = []
    moment = moments.moment

    def watched(backbone: Backbone, words: object, prompts: list[str], *rest: object):
        seen.append(list(prompts))
        return moment(backbone, words, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(moments, "moment", watched)
    return seen


def test_prompts_are_encoded_again_only_where_one_of_their_words_is_another(
    backbone: Backbone,
    words: dict[str, torch.Tensor],
    tmp_path: Path,
    computed: list[list[str]],
) -> None:
    first = MomentCache(backbone, tmp_path)(words, PROMPTS)
    again = MomentCache(backbone, tmp_path)({**words, "V2": words["V2"] + 1}, PROMPTS)
    assert torch.equal(again, first)
    assert computed == [PROMPTS]
    for other, prompts, share in (
        ({**words, "V1": words["V1"] + 1}, PROMPTS, None),
        (words, PROMPTS[:1], None),
        (words, PROMPTS, 0.5),
    ):
        assert not torch.equal(MomentCache(backbone, tmp_path)(other, prompts, share), first)
    assert len(computed) == 4


@pytest.mark.parametrize("how", ["cut", "text", "nan", "shape", "name"])
def test_a_file_that_can_not_be_used_is_computed_again(
    backbone: Backbone, words: dict[str, torch.Tensor], tmp_path: Path, how: str
) -> None:
    from safetensors.torch import save

    first = MomentCache(backbone, tmp_path)(words, PROMPTS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damaged = {
        "cut": whole[:-5],
        "text": b"hello",
        "nan": save({"moment": torch.full_like(first, torch.nan)}),
        "shape": save({"moment": torch.ones(3)}),
        "name": save({"other": first}),
    }
    file.write_bytes(damaged[how])
    assert torch.equal(MomentCache(backbone, tmp_path)(words, PROMPTS), first)
    assert file.read_bytes() == whole


def test_a_folder_that_can_not_be_written_costs_time_alone(
    backbone: Backbone, words: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    there = MomentCache(backbone, tmp_path / "file")(words, PROMPTS)
    assert torch.equal(there, MomentCache(backbone)(words, PROMPTS))


@pytest.mark.slow
def test_each_concept_is_encoded_once(
    checkpoint: Path, folders: dict[str, Path], computed: list[list[str]]
) -> None:
    """And ordinary prompts once for all; the stack has them from then on, and the cache is empty."""
    quick = replace(QUICK, method="retention")
    for token in NOUNS:
        computed.clear()
        pipeline.learn_concept(learn_request(checkpoint, folders, token, quick))
        for other in NOUNS:
            about = [one for one in computed if any(f"{other} {NOUNS[other]}" in p for p in one)]
            assert len(about) == (other == token)
        ordinary = [prompts for prompts in computed if not any("V" in p for p in prompts)]
        assert len(ordinary) == (3 if token == "V1" else 1)  # with the noun's
        assert not cache_folder(store.stack_path(checkpoint)).exists()


def test_a_stopped_run_encodes_ordinary_prompts_once(
    checkpoint: Path, folders: dict[str, Path], computed: list[list[str]]
) -> None:
    request = learn_request(checkpoint, folders, "V1", replace(QUICK, method="retention"))

    def stop(progress: Progress) -> None:
        if progress.stage == "learn":
            raise Cancelled

    with pytest.raises(Cancelled):
        pipeline.learn_concept(request, stop)
    assert computed
    computed.clear()
    pipeline.learn_concept(request)
    assert [prompts for prompts in computed if not any("V1" in one for one in prompts)] == []


def test_forgetting_a_concept_leaves_no_prompt_of_it_and_merging_the_same_again_loads_nothing(
    learned: Callable[..., Path], tmp_path: Path, computed: list[list[str]]
) -> None:
    """Neither in the moments of its neighbors nor in ordinary ones: they are as if it had never been."""
    checkpoint = learned(replace(QUICK, method="retention"), "V1", "V2")
    path = store.stack_path(checkpoint)
    same = Path(shutil.copy(path, tmp_path / "same.concepts.safetensors"))
    seen: list[Progress] = []
    merging = requests.MergeRequest(checkpoint, same, device="cpu")
    assert pipeline.merge(merging, seen.append).added == []
    assert not seen
    computed.clear()
    pipeline.forget(requests.ForgetRequest(checkpoint, "V1", device="cpu"))
    assert not cache_folder(path).exists()
    assert [prompts for prompts in computed if any("V1 ball" in one for one in prompts)] == []
    after = store.open_stack(path)
    assert after.ordinary
    assert after.ordinary.nouns == ("fish",)
    assert not len(after.prompts[after.records[0].id].shared)
    alone = learned(replace(QUICK, method="retention"), "V2")
    never = store.open_stack(store.stack_path(alone)).ordinary
    assert never
    assert torch.allclose(after.ordinary.listed, never.listed, atol=1e-4)
    assert pipeline.merge(merging).added == ["V1 ball"]


@pytest.mark.parametrize("forgotten", ["V1", "V2", "V3"])
def test_no_prompt_that_is_held_names_what_is_forgotten(
    learned: Callable[..., Path], backbone: Backbone, forgotten: str
) -> None:
    checkpoint = learned(replace(QUICK, method="retention"), *NOUNS)
    pipeline.forget(requests.ForgetRequest(checkpoint, forgotten, device="cpu"))
    stack = stack_of(checkpoint)
    bank = PromptBank(backbone, stack.tokens)
    for number, record in enumerate(stack.records):
        shared = stack.prompts[record.id].shared.float()
        expected = bank.shared(stack.records, number)
        assert float((shared.T @ shared - expected).norm() / expected.norm()) < 0.02
