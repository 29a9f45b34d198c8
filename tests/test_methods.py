"""Stage 5: one contract for all methods, run on the mini-SD through the pipeline with a few steps
each.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_learn import NOUNS, QUICK, learn_request, same_stack, stack_of, tensors_of

from comfy_continual_lora import (
    consolidation,
    pipeline,
    presets,
    requests,
    session,
    settings,
    store,
    targets,
    versions,
)
from comfy_continual_lora.adapters.adapter import Adapter, layers_of
from comfy_continual_lora.errors import Cancelled, SettingError
from comfy_continual_lora.methods import METHODS
from comfy_continual_lora.methods.c_lora import Hadamard, hadamard_penalty
from comfy_continual_lora.methods.closed_form import ClosedForm
from comfy_continual_lora.methods.method import LearnedConcept, Method
from comfy_continual_lora.penalty import Penalty, Step
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import LearnSettings, TrainSettings

VARIANTS = {
    **{name: replace(QUICK, method=name) for name in METHODS},
    "c_lora published": replace(QUICK, method="c_lora", c_lora_variant="published"),
    **{
        f"{name} vera": replace(QUICK, method=name, adapter="vera")
        for name in ("lora", "lora_ewc", "lora_ewc_dc")
    },
    "lora_ewc separate, delta": replace(
        QUICK, method="lora_ewc", ewc_mode="separate", fisher_space="delta"
    ),
    "lora_dsc_ewc_dc once": replace(QUICK, dsc_redraw="once", dc_scale="sum"),
}
# one of each kind of memory, in the fast lane
QUICKLY = ("textual_inversion", "lora", "c_lora", "lora_dsc_ewc_dc", "retention")


def keeps_fisher(method: Method) -> bool:
    return type(method).fisher is not Method.fisher


def test_the_table_is_the_one_users_see() -> None:
    assert list(METHODS) == presets.METHODS
    assert settings.LearnSettings().method == "retention"


def test_a_method_may_have_a_choice_of_its_own_on_a_checkpoint() -> None:
    for (preset, method), chosen in presets.METHOD_PRESETS.items():
        for name, value in chosen.items():
            assert (
                getattr(LearnSettings(method=method).resolved(preset), name)
                == value
                != presets.PRESETS[preset][name]
            )
            assert (
                getattr(LearnSettings(method="lora").resolved(preset), name)
                == presets.PRESETS[preset][name]
            )
            assert (
                getattr(LearnSettings(**{"method": method, name: 2 * value}).resolved(preset), name)
                == 2 * value
            )
    for preset, chosen in presets.PRESETS.items():
        assert LearnSettings(adapter="vera").resolved(preset).rate == 30 * chosen["rate"]
        assert LearnSettings(adapter="vera", rate=0.5).resolved(preset).rate == 0.5


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_card(name: str) -> None:
    card = sys.modules[type(METHODS[name]).__module__].__doc__ or ""
    assert card.startswith(f"`{name}`")
    for line in ("source", "equation", "remembers", "cost", "deviations"):
        assert f"\n{line}" in card, line


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[] if one in QUICKLY else pytest.mark.slow) for one in VARIANTS],
)
def test_three_concepts_without_any_earlier_picture_then_undo(
    checkpoint: Path, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    chosen, states = VARIANTS[name], []
    for token in NOUNS:
        own = Path(shutil.copytree(folders[token], tmp_path / token))
        pipeline.learn_concept(
            replace(learn_request(checkpoint, folders, token, chosen), images=own)
        )
        shutil.rmtree(own)  # the next concept is learned without it
        states.append(stack_of(checkpoint))
    first, second, third = states
    assert list(third.tokens) == list(NOUNS)
    assert all(torch.equal(third.tokens[t], second.tokens[t]) for t in ("V1", "V2"))
    assert all(tensor.isfinite().all() for tensor in tensors_of(third).values())
    method = METHODS[chosen.method]
    assert (third.adapter is None) == (not method.adapter_kind(chosen))
    assert len(third.fishers) == (3 if keeps_fisher(method) else 0)
    assert third.tau is not None
    if third.adapter:
        grown = 3 if chosen.c_lora_variant == "published" else 1
        assert first.adapter
        if (
            isinstance(method, ClosedForm) and third.rank and first.rank
        ):  # its energy rule may ask for more
            grown = third.rank / first.rank
        assert sum(t.numel() for t in third.adapter.values()) == grown * sum(
            t.numel() for t in first.adapter.values()
        )
        assert any(not torch.equal(t, first.adapter[k]) for k, t in third.adapter.items())
    assert not list(checkpoint.parent.glob("*.snapshot"))
    for before in (second, first):
        pipeline.undo(requests.UndoRequest(checkpoint))
        assert same_stack(stack_of(checkpoint), before)


LORA_KIND = [
    name
    for name, chosen in VARIANTS.items()
    if METHODS[chosen.method].adapter_kind(chosen) == "lora"
    and "vera" not in name
    and "published" not in name
]
LORA_KIND.remove("retention")  # holds ordinary prompts from the first concept on


@pytest.mark.parametrize("name", LORA_KIND)
def test_without_memory_every_lora_method_is_plain_lora(
    learned: Callable[..., Path], name: str
) -> None:
    ours, theirs = (stack_of(learned(VARIANTS[one], "V1")) for one in (name, "lora"))
    assert ours.records[0].method == VARIANTS[name].method
    assert ours.adapter
    assert theirs.adapter
    assert all(torch.equal(t, theirs.adapter[k]) for k, t in ours.adapter.items())
    assert torch.equal(ours.tokens["V1"], theirs.tokens["V1"])


def _penalties(name: str, stack: store.ConceptStack) -> dict[str, Penalty]:
    backbone = SimpleNamespace(device=torch.device("cpu"))
    session: Any = SimpleNamespace(stack=stack, backbone=backbone)
    return METHODS[name].penalties(session, VARIANTS[name].resolved("mini"), None)


@pytest.mark.parametrize("name", METHODS)
def test_no_penalty_on_an_empty_stack(name: str) -> None:
    assert _penalties(name, store.ConceptStack("f")) == {}


@pytest.mark.parametrize("name", [name for name in METHODS if keeps_fisher(METHODS[name])])
def test_the_penalty_is_zero_where_the_next_concept_starts(
    learned: Callable[..., Path], name: str
) -> None:
    stack = stack_of(learned(VARIANTS[name], "V1"))
    penalty = _penalties(name, stack)["ewc"]
    assert stack.adapter
    assert penalty(Step(stack.adapter)) == 0
    assert penalty(Step({k: v + 0.1 for k, v in stack.adapter.items()})) > 0


@pytest.mark.parametrize("stage", ["learn", "consolidate", "fisher"])
def test_a_run_stopped_in_any_stage_ends_as_an_undisturbed_one(
    learned: Callable[..., Path], folders: dict[str, Path], stage: str
) -> None:
    checkpoint, other = learned(QUICK, "V1", "V2"), learned(QUICK, "V1")

    def stop(progress: Progress) -> None:
        if progress.stage == stage and progress.step == 1:
            raise Cancelled

    before = store.stack_path(other).read_bytes()
    with pytest.raises(Cancelled):
        pipeline.learn_concept(learn_request(other, folders, "V2", QUICK), stop)
    assert store.stack_path(other).read_bytes() == before
    seen: list[tuple[str, int]] = []
    pipeline.learn_concept(
        learn_request(other, folders, "V2", QUICK), lambda p: seen.append((p.stage, p.step))
    )
    assert ("learn", 1) not in seen
    assert (("consolidate", 1) in seen) == (stage == "learn")
    one, two = stack_of(checkpoint), stack_of(other)
    assert one.adapter
    assert two.adapter
    assert all(torch.equal(t, two.adapter[k]) for k, t in one.adapter.items())
    fishers = [s.fishers[s.records[-1].id] for s in (one, two)]
    assert all(torch.equal(t, fishers[1][k]) for k, t in fishers[0].items())


def test_a_run_stopped_while_calibrating_has_learned(
    checkpoint: Path, folders: dict[str, Path]
) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "calibrate":
            raise Cancelled

    with pytest.raises(Cancelled):
        pipeline.learn_concept(learn_request(checkpoint, folders, "V1", QUICK), stop)
    assert not store.stack_path(checkpoint).exists()
    seen: list[str] = []
    pipeline.learn_concept(
        learn_request(checkpoint, folders, "V1", QUICK), lambda p: seen.append(p.stage)
    )
    assert "learn" not in seen
    assert stack_of(checkpoint).tau


def test_consolidate_by_itself(learned: Callable[..., Path], folders: dict[str, Path]) -> None:
    checkpoint = learned(VARIANTS["lora_ewc"], "V1", "V2")
    before = stack_of(checkpoint)
    wanted = TrainSettings(batch=3, size=64, fisher_samples=3, dsc_steps=3)
    done = pipeline.consolidate(
        requests.ConsolidateRequest(checkpoint, folders["V2"], wanted, device="cpu")
    )
    after, (one, two) = stack_of(checkpoint), before.records
    assert len(done.losses) == 3
    wanted_digest = requests.ConsolidateRequest(
        checkpoint, folders["V2"], wanted, device="cpu"
    ).digest
    assert done.record == replace(two, consolidated=wanted_digest)
    assert after.records == [one, done.record]
    assert after.adapter
    assert before.adapter
    assert any(not torch.equal(t, before.adapter[k]) for k, t in after.adapter.items())
    assert all(torch.equal(t, before.pool[one.id][k]) for k, t in after.pool[one.id].items())
    unconsolidated = consolidation.as_of(after, 2, consolidated=False).adapter
    assert unconsolidated
    assert all(torch.equal(t, before.adapter[k]) for k, t in unconsolidated.items())
    assert any(
        not torch.equal(t, before.fishers[two.id][k]) for k, t in after.fishers[two.id].items()
    )
    assert pipeline.undo(requests.UndoRequest(checkpoint)).change == f"consolidated {two.name}"
    unchanged = stack_of(checkpoint)
    assert unchanged.records == before.records
    assert all(
        torch.equal(t, before.fishers[two.id][k]) for k, t in unchanged.fishers[two.id].items()
    )
    assert pipeline.undo(requests.UndoRequest(checkpoint)).change == f"learned {two.name}"
    with pytest.raises(store.StackError, match="nothing to consolidate"):
        pipeline.consolidate(
            requests.ConsolidateRequest(checkpoint, folders["V1"], wanted, device="cpu")
        )


@pytest.mark.parametrize(("name", "own", "other"), [("size", 64, 72), ("flip", True, False)])
def test_consolidating_takes_the_pictures_as_the_concept_was_learned(
    learned: Callable[..., Path], folders: dict[str, Path], name: str, own: Any, other: Any
) -> None:
    """Not at the checkpoint's size, at which the net's errors, and so the temperature, are others; and
    mirrored or not, whatever is usual with the checkpoint.
    """
    checkpoint = learned(replace(VARIANTS["lora_ewc"], **{name: own}), "V1", "V2")
    few = TrainSettings(batch=3, size=64, fisher_samples=3, dsc_steps=3)
    losses = []
    for value in (None, own, other):
        wanted = replace(few, **{name: value})
        request = requests.ConsolidateRequest(checkpoint, folders["V2"], wanted, device="cpu")
        losses.append(pipeline.consolidate(request).losses)
        pipeline.undo(requests.UndoRequest(checkpoint))
    assert losses[0] == losses[1] != losses[2]


def test_consolidating_with_other_pictures_is_told(
    learned: Callable[..., Path], folders: dict[str, Path]
) -> None:
    checkpoint = learned(VARIANTS["lora_ewc"], "V1", "V2")
    wanted = TrainSettings(batch=3, size=64, fisher_samples=3, dsc_steps=1)
    notes = {}
    for of in ("V1", "V2"):
        seen: list[str] = []
        request = requests.ConsolidateRequest(checkpoint, folders[of], wanted, device="cpu")
        pipeline.consolidate(request, lambda p, seen=seen: seen.append(p.note))
        notes[of] = " ".join(seen)
    assert "None of these is one of the pictures that V2 was learned from" in notes["V1"]
    assert "None of these" not in notes["V2"]


def test_consolidating_another_adapter_resumes_no_snapshot(
    learned: Callable[..., Path], folders: dict[str, Path]
) -> None:
    """The newest concept is learned again between a stopped run and the same request: the student
    would be that of the adapter before.
    """
    checkpoint = learned(VARIANTS["lora"], "V1", "V2")
    wanted = TrainSettings(batch=3, size=64, dsc_steps=3, snapshot_every=1)
    request = requests.ConsolidateRequest(checkpoint, folders["V2"], wanted, device="cpu")

    def stop(progress: Progress) -> None:
        if (progress.stage, progress.step) == ("consolidate", 2):
            raise Cancelled

    with pytest.raises(Cancelled):
        pipeline.consolidate(request, stop)
    seen: list[str] = []
    pipeline.consolidate(request, lambda p: seen.append(p.note))
    assert "Resuming from step 2 of 3." in seen
    pipeline.undo(requests.UndoRequest(checkpoint))
    with pytest.raises(Cancelled):
        pipeline.consolidate(request, stop)
    other = replace(VARIANTS["lora"], seed=7)
    pipeline.learn_concept(replace(learn_request(checkpoint, folders, "V2", other), replace=True))
    seen.clear()
    pipeline.consolidate(request, lambda p: seen.append(p.note))
    assert not any("Resuming" in note for note in seen)
    told = next(note for note in seen if "It differs in the stack it started from" in note)
    assert "go back to the version of the stack it started from (`restore`)" in told


def test_what_another_program_just_did_is_not_done_again(
    learned: Callable[..., Path], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same request, which ended there between the first look at the stack here and its lock."""
    checkpoint = learned(VARIANTS["lora"], "V1")
    learn = learn_request(checkpoint, folders, "V2", VARIANTS["lora"])
    wanted = TrainSettings(batch=3, size=64, dsc_steps=2)
    distil = requests.ConsolidateRequest(checkpoint, folders["V2"], wanted, device="cpu")
    writing = session.writing
    for operation, request in ((pipeline.learn_concept, learn), (pipeline.consolidate, distil)):

        def late(path: Path, operation: Any = operation, request: Any = request) -> Any:
            monkeypatch.setattr(session, "writing", writing)
            assert not operation(request).again
            return writing(path)

        monkeypatch.setattr(session, "writing", late)
        assert operation(request).again
    assert len(versions.versions(store.stack_path(checkpoint))) == 3


def test_kinds_of_adapters_do_not_mix(
    learned: Callable[..., Path], folders: dict[str, Path]
) -> None:
    checkpoint = learned(VARIANTS["custom_diffusion"], "V1")
    with pytest.raises(
        SettingError, match="trains an adapter of the kind lora, but this stack's is full"
    ):
        pipeline.learn_concept(learn_request(checkpoint, folders, "V2", VARIANTS["lora"]))
    pipeline.learn_concept(
        learn_request(checkpoint, folders, "V2", VARIANTS["textual_inversion"])
    )  # changes no adapter
    with pytest.raises(SettingError, match="c_lora can't learn with the adapter vera"):
        pipeline.learn_concept(
            learn_request(
                checkpoint, folders, "V3", replace(QUICK, method="c_lora", adapter="vera")
            )
        )


@pytest.mark.parametrize("how", ["replace", "forget", "undo"])
def test_where_words_alone_are_left_any_rank_can_be_learned(
    learned: Callable[..., Path], folders: dict[str, Path], how: str
) -> None:
    checkpoint = learned(VARIANTS["textual_inversion"], "V1")
    settings = replace(VARIANTS["lora"], rank=3)
    pipeline.learn_concept(learn_request(checkpoint, folders, "V2", settings))
    other = replace(settings, rank=2)
    if how == "forget":
        pipeline.forget(requests.ForgetRequest(checkpoint, "V2", device="cpu"))
    if how == "undo":
        pipeline.undo(requests.UndoRequest(checkpoint))
    asked = learn_request(checkpoint, folders, "V2", other)
    pipeline.learn_concept(replace(asked, replace=how == "replace"))
    assert pipeline.info(requests.InfoRequest(checkpoint)).rank == 2


@pytest.mark.parametrize("spaces", [("factors", "delta"), ("delta", "factors")])
def test_ewc_goes_on_after_concepts_measured_in_different_spaces(
    learned: Callable[..., Path], folders: dict[str, Path], spaces: tuple[str, str]
) -> None:
    first, second = (replace(VARIANTS["lora_ewc"], fisher_space=one) for one in spaces)
    checkpoint = learned(first, "V1")
    pipeline.learn_concept(learn_request(checkpoint, folders, "V2", second))
    pipeline.learn_concept(learn_request(checkpoint, folders, "V3", first))
    assert list(stack_of(checkpoint).tokens) == ["V1", "V2", "V3"]


def test_a_lora_that_has_grown_does_not_go_with_ewc(
    learned: Callable[..., Path], folders: dict[str, Path]
) -> None:
    checkpoint = learned(VARIANTS["c_lora published"], "V1", "V2")
    with pytest.raises(SettingError, match="this stack's LoRA has grown"):
        pipeline.learn_concept(learn_request(checkpoint, folders, "V3", VARIANTS["lora_ewc"]))


def test_c_loras_penalty_by_hand() -> None:
    factors = {
        "l.A": torch.tensor([[1.0, 2.0]]),
        "l.B": torch.tensor([[3.0], [0.5]]),
    }  # B A = [[3, 6], [0.5, 1]]
    past = {"l": torch.tensor([[1.0, 0.0], [-2.0, 4.0]])}
    assert float(hadamard_penalty(factors, past)) == pytest.approx(3**2 + 0 + 1**2 + 4**2)
    nothing = {**factors, "l.B": torch.zeros(2, 1)}
    assert hadamard_penalty(nothing, past) == 0  # the degenerate minimum
    added = {"l": torch.tensor([[2.0, 6.0], [0.0, 1.0]])}  # B A has [[1, 0], [0.5, 0]] beyond it
    assert float(hadamard_penalty(factors, past, added)) == pytest.approx(1**2 + 1**2)


def changes_of(adapter: Adapter | None) -> dict[str, torch.Tensor]:
    """B A of every layer."""
    return {layer: one["B"] @ one["A"] for layer, one in layers_of(adapter or {}).items()}


def overlap(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """|| first (Hadamard) second ||^2 over all layers."""
    return sum(float((first[layer] * second[layer]).square().sum()) for layer in first)


@pytest.mark.parametrize("tokens", [("V1", "V2"), ("V1", "V2", "V3")])
@pytest.mark.parametrize("variant", ["published", "sequential"])
def test_a_c_lora_is_consolidated_with_the_penalty_it_was_learned_with(
    learned: Callable[..., Path],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    tokens: tuple[str, ...],
) -> None:
    """Of a sum of LoRAs it is on the newest alone, not on what the earlier ones do."""
    chosen = replace(QUICK, method="c_lora", c_lora_variant=variant, c_lora_weight=10.0, rate=0.01)
    checkpoint = learned(chosen, *tokens)
    stack, found = stack_of(checkpoint), []

    def distilled(concept: LearnedConcept, *_: Any, **__: Any) -> Any:
        found.append(concept)
        raise Cancelled

    monkeypatch.setattr(pipeline, "distilled", distilled)
    request = requests.ConsolidateRequest(checkpoint, folders[tokens[-1]], device="cpu")
    with pytest.raises(Cancelled):
        pipeline.consolidate(request)
    (concept,) = found
    assert concept.settings.c_lora_variant == variant
    assert stack.adapter
    now = changes_of(stack.adapter)
    past = [changes_of(stack.pool[record.id]) for record in stack.records[:-1]]
    if variant == "published":
        now = {layer: one - past[-1][layer] for layer, one in now.items()}
        past = past[-1:]
    summed = {layer: torch.stack([one[layer] for one in past]).sum(0) for layer in now}
    expected = 10.0 * overlap(summed, now)
    assert expected > 0
    assert float(concept.penalties["c_lora"](Step(stack.adapter))) == pytest.approx(
        expected, rel=1e-3
    )
    if variant == "published":  # as while it was learned, above the frozen ones
        newest = {
            name: one[-4:] if name.endswith(".A") else one[:, -4:]
            for name, one in stack.adapter.items()
        }
        while_learned = Step(newest, frozen=stack.pool[stack.records[-2].id])
        assert float(concept.penalties["c_lora"](while_learned)) == pytest.approx(
            expected, rel=1e-3
        )


def test_each_c_lora_as_published_starts_from_draws_of_its_own(
    learned: Callable[..., Path],
) -> None:
    """The same A again would leave the sum of LoRAs the rank of one."""
    stack = stack_of(learned(VARIANTS["c_lora published"], "V1", "V2"))
    assert stack.adapter
    pairs = [one.chunk(2) for name, one in stack.adapter.items() if name.endswith(".A")]
    for first, second in [*pairs, tuple(stack.words.values())]:
        assert torch.cosine_similarity(first, second).abs().max() < 0.6


@pytest.mark.parametrize("words", ["V2", "V1", "V3", "V2 V3"])
def test_c_lora_does_not_count_a_lora_again_for_a_word_learned_after_it(
    learned: Callable[..., Path], folders: dict[str, Path], words: str
) -> None:
    chosen = {
        token: VARIANTS["textual_inversion" if token in words.split() else "lora"]
        for token in NOUNS
    }
    checkpoint = learned(chosen["V1"], "V1")
    for token in ("V2", "V3"):
        pipeline.learn_concept(learn_request(checkpoint, folders, token, chosen[token]))
    stack = stack_of(checkpoint)
    own = [stack.adapter_after(one.id) for one in stack.records if one.token not in words.split()]
    penalty = _penalties("c_lora", stack)["c_lora"]
    assert isinstance(penalty, Hadamard)
    for layer, past in penalty.past.items():
        assert torch.allclose(past, torch.stack([changes_of(one)[layer] for one in own]).sum(0))


@pytest.mark.parametrize("tokens", [("V1", "V2"), ("V1", "V2", "V3")])
def test_a_lora_above_frozen_ones_leaves_earlier_prompts_at_what_these_do(
    learned: Callable[..., Path], folders: dict[str, Path], tokens: tuple[str, ...]
) -> None:
    """It does not do the same once more."""
    quick = replace(QUICK, rate=0.01, steps=5)
    published = replace(quick, method="c_lora", c_lora_variant="published", c_lora_weight=0.0)
    checkpoint = learned(published, *tokens[:-1])
    holding = replace(published, retention_weight=1000.0, retention_ordinary=0.0)
    pipeline.learn_concept(learn_request(checkpoint, folders, tokens[-1], holding))
    stack = stack_of(checkpoint)
    assert stack.adapter
    for record in stack.records[:-1]:
        rows = stack.prompts[record.id].alone.float()
        before = targets.Target(record.token, rows, stack.pool[stack.records[-2].id])
        assert targets.relative_drift(stack.adapter, before) < 0.3


def test_scores_name_pictures_and_count_what_is_right(
    checkpoint: Path, folders: dict[str, Path], learned: Callable[..., Path]
) -> None:
    with pytest.raises(store.StackError, match="holds no concept yet"):
        pipeline.dc_scores(requests.ScoreRequest(checkpoint, folders["V1"], device="cpu"))
    checkpoint = learned(VARIANTS["lora"], "V1", "V2")
    wanted = settings.ScoreSettings(trials=8, size=64)
    found = pipeline.dc_scores(
        requests.ScoreRequest(checkpoint, folders["V1"].parent, wanted, device="cpu")
    ).images
    assert [one.label for one in found] == ["V1", "V1", "V2", "V2", None, None]
    names = {"V1", "V2", "another ball", "another fish", "none of these"}
    assert all(set(one.scores.names) == names for one in found)
    assert [one.right is None for one in found] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("change", ["learned without", "solved for"])
def test_ewc_does_not_go_on_where_no_fisher_protects(
    learned: Callable[..., Path], folders: dict[str, Path], change: str
) -> None:
    """It would forget V1 without a word. The refusal comes before anything is loaded."""
    if change == "learned without":
        checkpoint, words = learned(VARIANTS["lora"], "V1"), "V1"
    else:
        checkpoint, words = learned(VARIANTS["lora_ewc"], "V1", "V2"), "V1, V2"
        pipeline.consolidate_in_closed_form(requests.SolveRequest(checkpoint, device="cpu"))
    before, seen = store.stack_path(checkpoint).read_bytes(), []
    for method in ("lora_ewc", "lora_ewc_dc"):
        request = learn_request(checkpoint, folders, "V3", VARIANTS[method])
        with pytest.raises(SettingError, match=f"has none of {words}: .*retention or closed_form"):
            pipeline.learn_concept(request, seen.append)
    assert not seen
    assert store.stack_path(checkpoint).read_bytes() == before
    pipeline.learn_concept(learn_request(checkpoint, folders, "V3", VARIANTS["lora_dsc_ewc_dc"]))
