"""Moments of text features are computed once and kept beside the stack, exactly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_learn import QUICK, learn_request, stack_of, tensors_of

from comfy_continual_lora import moments, pipeline, requests, store
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.files import cache_folder
from comfy_continual_lora.moments import MomentCache
from comfy_continual_lora.progress import Progress

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


def _by_token(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The stack's tensors, named by words: a concept's id holds the second it was learned in."""
    stack = stack_of(checkpoint)
    names = {record.id: record.token for record in stack.records}
    named = {}
    for name, tensor in tensors_of(stack).items():
        for concept, token in names.items():
            name = name.replace(concept, token)
        named[name] = tensor
    return named


@pytest.mark.slow
def test_each_concept_is_prepared_once_and_what_is_learned_is_the_same(
    checkpoint: Path, folders: dict[str, Path], computed: list[list[str]]
) -> None:
    """With the cache, and without it."""
    quick = replace(QUICK, method="retention")
    for token in ("V1", "V2"):
        pipeline.learn_concept(learn_request(checkpoint, folders, token, quick))
    cache = cache_folder(store.stack_path(checkpoint))
    kept, held = _by_token(checkpoint), len(list(cache.iterdir()))
    pipeline.learn_concept(learn_request(checkpoint, folders, "V3", quick))
    about_the_first = [one for one in computed if any("V1" in prompt for prompt in one)]
    assert len(about_the_first) == 1
    assert len(list(cache.iterdir())) == held + 1  # V3's; the nouns' are others by then
    with_cache = _by_token(checkpoint)
    for file in cache.iterdir():
        file.unlink()
    pipeline.undo(requests.UndoRequest(checkpoint))
    undone = _by_token(checkpoint)
    assert undone.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in undone.items())
    pipeline.learn_concept(learn_request(checkpoint, folders, "V3", quick))
    without = _by_token(checkpoint)
    assert without.keys() == with_cache.keys()
    assert all(torch.equal(tensor, with_cache[name]) for name, tensor in without.items())


def test_forgetting_a_concept_leaves_no_moment_and_merging_the_same_again_loads_nothing(
    learned: Callable[..., Path], tmp_path: Path, computed: list[list[str]]
) -> None:
    checkpoint = learned(replace(QUICK, method="retention"), "V1", "V2")
    path = store.stack_path(checkpoint)
    cache = cache_folder(path)
    same = Path(shutil.copy(path, tmp_path / "same.concepts.safetensors"))
    seen: list[Progress] = []
    merging = requests.MergeRequest(checkpoint, same, device="cpu")
    assert pipeline.merge(merging, seen.append).added == []
    assert not seen
    assert list(cache.iterdir())
    computed.clear()
    pipeline.forget(requests.ForgetRequest(checkpoint, "V1", device="cpu"))
    assert not cache.exists()
    assert [prompts for prompts in computed if any("V1 ball" in one for one in prompts)] == []
    assert pipeline.merge(merging).added == ["V1 ball"]
    assert list(cache.iterdir())
