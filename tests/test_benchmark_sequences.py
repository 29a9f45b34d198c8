"""What the retention benchmark's sequences and prompts are made of."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run
import tune
import words
from jobs import Job
from learning import checkpoint_of
from PIL import Image
from rows import ROWS
from subjects import of_folder, of_world

from comfy_continual_lora import language, targets, textspace
from comfy_continual_lora.mini import world
from comfy_continual_lora.mini.looks import Look
from comfy_continual_lora.mini.parts import tokenizer
from comfy_continual_lora.presets import TEMPLATES

JOB = Job("retention", 0, 6, 16, Path("out"), steps=200, split="test")
# words that say how things stand, which any prompt may have
COMMON = set(
    re.findall(r"\w+", "a an the in on at of by with and to is my it one two for from who")
)


def _words(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z0-9']+", text.lower())} - COMMON


@pytest.fixture(scope="module")
def listed() -> set[str]:
    """Every word of a list that some method protects."""
    nouns = list(world.SHAPES)
    lists = (language.STYLES, language.TAGS, language.NEGATIVE, language.FORMS, TEMPLATES)
    return _words([*textspace.ordinary_prompts(nouns), *(text for one in lists for text in one)])


def test_prompts_as_people_write_them_have_no_protected_word(listed: set[str]) -> None:
    assert not _words(list(words.WRITTEN)) & listed
    assert not _words(list(words.UNLISTED_PLACES)) & listed
    assert not _words(list(words.HELD_OUT_FORMS)) & listed


def test_the_splits_share_no_concept_and_the_world_keeps_its_earlier_ones() -> None:
    looks = [{one.look for one in world.concepts(split)} for split in world.SPLITS]
    assert (
        len(set.union(*looks))
        == sum(map(len, looks))
        == len(world.SPLITS) * world.CONCEPTS_PER_SPLIT
    )
    assert world.concepts("reporting")[0].name == "rep00-zigzag-heart"
    assert len({one.name for one in of_world("test", 0, 6)}) == 6


def _looks(order: str, count: int = 6) -> list[Look]:
    found = of_world("development", 0, count, order)
    assert len({one.name for one in found}) == count
    assert all(one.concept and one.concept.look.shape == one.noun for one in found)
    return [one.concept.look for one in found if one.concept]


def test_harder_sequences_are_what_they_are_called() -> None:
    mixed, one_noun = _looks("mixed"), _looks("one-noun")
    assert len({look.shape for look in mixed}) > 1
    assert {look.shape for look in one_noun} == {mixed[0].shape}
    assert [look.colors for look in one_noun] == [look.colors for look in mixed]
    twins = _looks("near-duplicates")
    for first, second in zip(twins[::2], twins[1::2], strict=True):
        assert replace(second, colors=first.colors) == first
        same = [a == b for a, b in zip(first.colors, second.colors, strict=True)]
        assert same == [False, True, True]
    shared = [
        sum(a.pattern == b.pattern or a.shape == b.shape for a, b in pairwise(looks))
        for looks in (mixed, _looks("adversarial"))
    ]
    assert shared[1] == 5 > shared[0]


def test_words_left_out_are_in_no_prompt_that_is_protected_meanwhile() -> None:
    listed, left_out = JOB.words
    assert not set(listed.all) & set(left_out.all)
    nouns = [subject.noun for subject in JOB.subjects]
    assert not set(nouns) & set(left_out.all)
    with words.without(left_out.all):
        held = textspace.ordinary_prompts(nouns)
        sample = targets.language_prompts(tokenizer())
    assert not any(word in prompt.split() for word in left_out.nouns for prompt in held)
    assert not any(word in prompt for word in left_out.all for prompt in sample)
    assert any(word in prompt for word in left_out.all for prompt in words.captions(left_out))


def test_each_picture_has_a_place_in_both_kinds_of_prompts() -> None:
    assert len(JOB.prompts) == len(JOB.held_out_prompts) == 16
    for usual, held_out in zip(JOB.prompts, JOB.held_out_prompts, strict=True):
        places = [p for p in world.BACKGROUNDS.values() if p in usual]
        assert places == [p for p in world.BACKGROUNDS.values() if p in held_out]
        assert "{}" in held_out


def test_what_a_variant_says_goes_before_what_was_tuned_and_that_before_what_is_common() -> None:
    job = replace(
        JOB, variant="lora rate=1e-3", common=("rate=2e-3", "batch=4"), tuned=("batch=2",)
    )
    assert (job.settings.rate, job.settings.batch) == (1e-3, 2)
    merge = replace(JOB, variant="ties density=0.3", common=("batch=4",), tuned=("weight=0.7",))
    assert merge.options == {"density": 0.3, "weight": 0.7, "rank": 0.0}
    assert (merge.alone.variant, merge.alone.settings.batch) == ("separate", 4)
    held = replace(JOB, variant="solve base=retention").alone
    assert (held.variant, held.settings.method) == ("separate base=retention", "retention")


def test_every_row_is_allowed_and_has_five_trials() -> None:
    assert len(set(ROWS)) == len(ROWS)
    for variant in ROWS:
        job = replace(JOB, variant=variant)
        job.check()
        first, second = tune.KNOBS[job.method]
        assert len(first.values) + len(second.values) - 1 == 5


def test_tuning_takes_the_best_of_five_trials_and_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_here: list[tuple[str, ...]] = []

    def gains_of(job: Job) -> list[float]:
        if len(run_here) == 4:
            raise KeyboardInterrupt
        run_here.append(job.tuned)
        return [job.choices["rate"], job.choices.get("token_rate", 0.0)]

    monkeypatch.setattr(tune, "gains_of", gains_of)
    file, job = tmp_path / "tuned.json", replace(JOB, variant="lora")
    with pytest.raises(KeyboardInterrupt):
        tune.tuned(file, job)
    assert tune.read(file) == {}
    first_four, run_here[:] = list(run_here), []
    chosen = tune.tuned(file, job)["chosen"]
    assert len(run_here) == 1
    usual = job.settings.resolved("mini")
    rates = [json.loads(trial[0].removeprefix("rate=")) for trial in first_four[:3]]
    assert rates == pytest.approx([0.3 * usual.rate, usual.rate, 3 * usual.rate])
    best = {change.partition("=")[0]: float(change.partition("=")[2]) for change in chosen}
    assert best == pytest.approx({"rate": 3 * usual.rate, "token_rate": 3 * usual.token_rate})
    assert tune.read(file) == {"lora": list(chosen)}


# --- photographs ----------------------------------------------------------------------------------


def _photographs(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((40, 60, 3), 20 * number, np.uint8)).save(folder / f"{number}.png")
    return folder


def test_subjects_of_a_folder_are_named_and_some_pictures_are_kept_from_learning(
    tmp_path: Path,
) -> None:
    _photographs(tmp_path / "plushie_tortoise2", 8)
    _photographs(tmp_path / "cat2", 4)
    listed = [{"instance_data_dir": "x/cat2", "class_prompt": "kitten", "instance_prompt": "-"}]
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    found = {one.noun: one for one in of_folder(tmp_path, 0, 32)}
    assert found.keys() == {"plushie tortoise", "kitten"}
    many, few = found["plushie tortoise"], found["kitten"]
    assert many.learned_from().shape == (6, 3, 32, 32)
    shown = {round(float(one.mean()), 3) for one in many.learned_from()}
    assert not shown & {round(float(one.mean()), 3) for one in many.real(16)}
    assert len(many.real(16)) == 2
    assert len(few.learned_from()) == len(few.real(16)) == 4  # too few to keep any
    assert len(many.save(tmp_path / "saved")) == 6


@pytest.mark.parametrize(("count", "message"), [(1, "needs two or more"), (0, "no folder of")])
def test_a_folder_that_can_not_be_used_is_refused(tmp_path: Path, count: int, message: str) -> None:
    if count:
        _photographs(tmp_path / "cat", count)
    with pytest.raises(ValueError, match=message):
        of_folder(tmp_path, 0, 32)


def test_a_job_that_fails_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_with_ewc(job: Job) -> dict[str, Any]:
        if job.method == "lora_ewc":
            raise RuntimeError("out of memory")
        return {"method": job.variant, "a_mmd": 0.0, "newest_mmd": 0.0}

    monkeypatch.setattr(run, "run", fails_with_ewc)
    every = [Job(name, 0, 2, 2, tmp_path, 1) for name in ("lora", "lora_ewc", "retention")]
    rows = run.run_all(every, 1, ray=False)
    assert [row["method"] for row in rows] == ["lora", "retention"]
    assert "out of memory" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="No job succeeded"):
        run.run_all(every[1:2], 1, ray=False)


# --- another miniature ----------------------------------------------------------------------------


def test_a_job_learns_on_the_miniature_it_is_given(tmp_path: Path) -> None:
    given = tmp_path / "wide.safetensors"
    given.write_bytes(b"weights")
    job = replace(JOB, out=tmp_path / "out", miniature=given)
    job.folder.mkdir(parents=True)
    found = checkpoint_of(job)
    assert (found.parent, found.resolve()) == (job.folder, given)  # its stacks lie beside it
    assert checkpoint_of(job) == found
    assert checkpoint_of(replace(job, miniature=tmp_path)) == tmp_path  # an Anima is a folder
    assert job.sequence == JOB.sequence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere.safetensors"], "there is no nowhere.safetensors"),
        (["--clip", "."], "--clip judges photographs"),
        (["--concepts", "photographs"], "needs --checkpoint and --clip FOLDER"),
        (["--concepts", "photographs", "--checkpoint", "a"], "needs --checkpoint and --clip"),
    ],
)
def test_a_checkpoint_or_photographs_that_do_not_fit_are_refused(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert message in capsys.readouterr().err
