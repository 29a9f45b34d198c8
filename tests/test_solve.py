"""The closed form: it is the least-squares solution it says it is, and consolidating, forgetting,
merging and importing do what their names say.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_learn import NOUNS, QUICK, learn_request, random_adapter, same_stack, stack_of
from safetensors.torch import load_file, save_file

from comfy_continual_lora import (
    cli,
    consolidation,
    foreign,
    language,
    pipeline,
    requests,
    solve,
    store,
    targets,
    textspace,
)
from comfy_continual_lora.adapters.adapter import Adapter, delta_weights, layers_of, rank_of
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import SettingError, StackError
from comfy_continual_lora.settings import SolveSettings, TrainSettings

QUICKER = replace(QUICK, method="lora", rate=0.02, steps=4)
MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
EXACT = SolveSettings(ridge=1e-7, energy=1.0)


def _problem(
    backbone: Backbone, kind: str = "lora"
) -> tuple[list[torch.Tensor], list[Adapter | None], list[solve.Target]]:
    """Features (n, d) of three concepts, of which the last asks for nothing."""
    generator, width = torch.Generator().manual_seed(5), backbone.word_width
    features = [
        torch.randn(300, width, generator=generator)
        @ torch.randn(width, width, generator=generator)
        / width**0.5
        for _ in range(3)
    ]
    adapters = [
        random_adapter(backbone, kind, 1, rank=3),
        random_adapter(backbone, kind, 2, rank=3),
        None,
    ]
    return (
        features,
        adapters,
        [
            solve.Target(str(i), f / len(f) ** 0.5, a)
            for i, (f, a) in enumerate(zip(features, adapters, strict=True))
        ],
    )


@pytest.fixture
def two(learned: Callable[..., Path]) -> Path:
    """A checkpoint that learned two concepts, the second at a rate that spoils the first."""
    return learned(QUICKER, "V1", "V2")


def test_what_all_prompts_share_does_not_raise_the_ridge() -> None:
    """The start token's feature is tens of times longer than any other in some encoders."""
    generator = torch.Generator().manual_seed(0)
    start = torch.eye(32)[0]
    rows = [torch.randn(200, 32, generator=generator) for _ in range(2)]
    adapters = [random_layer(generator, to_nothing=start) for _ in rows]
    lost = []
    for times in (1, 50):
        shared = times**2 * torch.outer(start, start)
        wanted = [
            solve.Target(f"V{n}", solve.rows_of(own.T @ own / len(own) + shared), adapter)
            for n, (own, adapter) in enumerate(zip(rows, adapters, strict=True), 1)
        ]
        solved, _ = solve.solve(wanted, SolveSettings(ridge=0.03, energy=1.0))
        lost.append([targets.relative_drift(solved, target) for target in wanted])
    assert lost[1] == pytest.approx(lost[0], rel=0.1)


def random_layer(generator: torch.Generator, to_nothing: torch.Tensor) -> Adapter:
    """A LoRA of one layer that does nothing to one feature."""
    a, b = (torch.randn(*shape, generator=generator) for shape in ((2, 32), (8, 2)))
    return {"l.A": a - torch.outer(a @ to_nothing, to_nothing), "l.B": b}


@pytest.mark.parametrize("ordinary", [-9 * torch.eye(32), torch.full((32, 32), float("nan"))])
def test_what_has_no_solution_is_said(ordinary: torch.Tensor) -> None:
    adapter = random_layer(torch.Generator().manual_seed(0), torch.zeros(32))
    with pytest.raises(StackError, match=r"no solution .*unchanged\. Increase ridge"):
        solve.solve([solve.Target("V1", torch.eye(32), adapter)], EXACT, ordinary=ordinary)


@pytest.mark.parametrize("share", [0.9, 0.99, 1.0])
def test_rows_have_the_moment_they_are_of(share: float) -> None:
    """Or as much of it as is asked for, in as few rows as that takes."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(500, 24, generator=generator) * torch.linspace(4, 0.05, 24)
    moment = features.T @ features / 500
    rows = solve.rows_of(moment, share)
    values = torch.linalg.eigvalsh(moment).flip(0)
    kept = torch.linalg.eigvalsh(rows.T @ rows).flip(0)
    assert torch.allclose(kept[: len(rows)], values[: len(rows)], rtol=1e-3)
    assert float(kept[1:].sum() / values[1:].sum()) >= share - 1e-5
    if share < 1:
        assert float(kept[1 : len(rows) - 1].sum() / values[1:].sum()) < share
        assert len(rows) < 24


@pytest.mark.parametrize(("out", "width"), [(2, 4), (8, 4)])
def test_a_layer_that_nothing_changes_stays_as_it_is(out: int, width: int) -> None:
    nothing = {"l.A": torch.ones(9, width), "l.B": torch.zeros(out, 9)}
    found, _ = solve.solve([solve.Target("V1", torch.eye(width), nothing)], EXACT)
    assert not (found["l.B"] @ found["l.A"]).any()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_is_the_least_squares_solution(backbone: Backbone, kind: str) -> None:
    """Against lstsq over all features, each row by itself, without any moment."""
    features, adapters, goals = _problem(backbone, kind)
    found, _ = solve.solve(goals, EXACT)
    changes = [delta_weights(backbone, a) if a else {} for a in adapters]
    rows = torch.cat([f / len(f) ** 0.5 for f in features]).double()
    for layer, change in list(delta_weights(backbone, found).items())[:4]:
        wanted = [
            (f / len(f) ** 0.5).double() @ c.get(layer, torch.zeros_like(change)).T.double()
            for f, c in zip(features, changes, strict=True)
        ]
        expected = torch.linalg.lstsq(rows, torch.cat(wanted)).solution.T
        assert torch.allclose(change.double(), expected, atol=1e-4)


def test_a_small_rank_is_the_best_of_its_rank(backbone: Backbone) -> None:
    """Gradient descent from it, and from the plain SVD's cut, finds nothing better; the energy rule
    says how much is lost.
    """
    features, adapters, goals = _problem(backbone)
    best, _ = solve.solve(goals, replace(EXACT, rank=2))
    whole, _ = solve.solve(goals, EXACT)
    layer = next(iter(layers_of(best)))

    def error(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        changes = [
            delta_weights(backbone, a)[layer] if a else torch.zeros(len(left), right.shape[1])
            for a in adapters
        ]
        return sum(
            (
                ((left @ right - c) @ f.T).square().sum() / f.shape[0]
                for f, c in zip(features, changes, strict=True)
            ),
            torch.tensor(0.0),
        )

    reached = float(error(best[f"{layer}.B"], best[f"{layer}.A"]))
    u, s, v = torch.linalg.svd(delta_weights(backbone, whole)[layer])
    cut = (u[:, :2] * s[:2], v[:2])
    assert reached < float(error(*cut))
    for start in ((best[f"{layer}.B"], best[f"{layer}.A"]), cut):
        pair = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in start]
        optimizer = torch.optim.LBFGS(pair, max_iter=300, line_search_fn="strong_wolfe")

        def closure(
            pair: list[torch.Tensor] = pair, optimizer: torch.optim.Optimizer = optimizer
        ) -> float:
            optimizer.zero_grad()
            value = error(*pair)
            value.backward()
            return float(value.detach())

        optimizer.step(closure)
        assert float(error(*pair).detach()) > reached * (1 - 1e-3)


def test_what_is_lost_is_a_share_of_all_layers_together(backbone: Backbone) -> None:
    """By hand; a layer that is asked for next to nothing does not make next to all of it."""
    wish = _problem(backbone)[2][0]
    assert wish.adapter
    layer = next(iter(layers_of(wish.adapter)))
    faint = replace(
        wish,
        adapter={name: t * 1e-3 if name == f"{layer}.B" else t for name, t in wish.adapter.items()},
    )
    done, asked = (
        {k: (d @ wish.moment * d).sum() for k, d in delta_weights(backbone, a or {}).items()}
        for a in (wish.adapter, faint.adapter)
    )
    assert targets.relative_drift(wish.adapter, faint) == pytest.approx(
        float(done[layer] * 0.999**2 / sum(asked.values())), rel=1e-4
    )
    assert targets.relative_drift(wish.adapter, faint) < 1 < 100 < float(done[layer] / asked[layer])


def test_the_energy_rule_and_the_least_rank(backbone: Backbone) -> None:
    _, _, goals = _problem(backbone)
    one, rank = solve.solve(goals[:1], replace(EXACT, energy=0.9999))
    assert rank == 3  # one wish, of rank 3, without contradiction
    padded, again = solve.solve(goals[:1], replace(EXACT, energy=0.9999), least_rank=5)
    assert (again, rank_of(padded)) == (3, 5)
    for layer, change in delta_weights(backbone, one).items():
        assert torch.allclose(delta_weights(backbone, padded)[layer], change, atol=1e-6)
    assert targets.relative_drift(one, goals[0]) < 1e-4
    assert all(
        float(t[3:].abs().sum()) > 0 for name, t in padded.items() if name.endswith("A")
    )  # rows that can learn
    whole, rank = solve.solve(goals, EXACT)
    low, few = solve.solve(goals, replace(EXACT, energy=0.6))
    assert few < rank
    assert rank_of(low) == few
    ample, again = solve.solve(
        goals, replace(EXACT, energy=0.6), least_rank=rank
    )  # room that is there is used
    assert again == few
    for layer, change in delta_weights(backbone, whole).items():
        assert torch.allclose(delta_weights(backbone, ample)[layer], change, atol=1e-5)
    said, two = solve.solve(goals, replace(EXACT, rank=2), least_rank=rank)  # unless a rank is said
    assert (two, rank_of(said)) == (2, rank)
    assert all(
        int(torch.linalg.matrix_rank(change, rtol=1e-4)) == 2
        for change in delta_weights(backbone, said).values()
    )


@pytest.mark.parametrize("part", ["up_blocks", "to_v", "mid_block.attentions.0"])
def test_layers_that_nothing_changes_have_no_say_in_the_rank(backbone: Backbone, part: str) -> None:
    """As of LoRAs that were imported and change some blocks alone, nearly all of it with one row."""
    goals = _problem(backbone)[2][:2]
    faint = torch.tensor([[1.0, 1e-4, 1e-4]])
    for number, goal in enumerate(goals):
        assert goal.adapter
        some = {
            name: tensor * (faint if part in name else 0.0) if name.endswith(".B") else tensor
            for name, tensor in goal.adapter.items()
        }
        goals[number] = replace(goal, adapter=some)
    one, rank = solve.solve(goals[:1], SolveSettings())
    assert (rank, rank_of(one)) == (1, 1)
    two, rank = solve.solve(goals, SolveSettings())
    assert (rank, rank_of(two)) == (2, 2)
    for layer, change in delta_weights(backbone, two).items():
        assert bool(change.any()) == (part in layer)
    every, rank = solve.solve(goals, EXACT)  # no more than the two have together
    assert rank == rank_of(every) == 6


def test_vera_is_refused(learned: Callable[..., Path]) -> None:
    """By whatever has to write the solution into the stack."""
    checkpoint = learned(replace(QUICKER, adapter="vera"), "V1", "V2")
    with pytest.raises(StackError, match="can't be written as vera"):
        pipeline.consolidate_in_closed_form(requests.SolveRequest(checkpoint, device="cpu"))
    with pytest.raises(StackError, match="can't be written as vera"):
        pipeline.select(requests.SelectRequest(checkpoint, only=["V1"], device="cpu"))
    with pytest.raises(StackError, match="can't be written as vera"):
        pipeline.forget(requests.ForgetRequest(checkpoint, "V1", device="cpu"))
    assert list(stack_of(checkpoint).tokens) == ["V1", "V2"]


def test_consolidating_brings_back_what_was_lost(
    two: Path, folders: dict[str, Path], backbone: Backbone
) -> None:
    before = stack_of(two)
    found = pipeline.consolidate_in_closed_form(requests.SolveRequest(two, device="cpu"))
    assert found.before["V1"] > 0.3
    assert found.before["V2"] == pytest.approx(0, abs=1e-4)  # its target is in eight bits
    assert found.after["V1"] < found.before["V1"] / 3
    after = stack_of(two)
    assert after.rank == max(4, found.rank)
    assert after.unconsolidated is not None
    now, then = (
        delta_weights(backbone, consolidation.as_of(stack, 1).adapter) for stack in (after, before)
    )
    assert all(torch.equal(now[layer], change) for layer, change in then.items())
    again = pipeline.consolidate_in_closed_form(requests.SolveRequest(two, device="cpu"))
    assert again.after == pytest.approx(found.after)
    assert same_stack(stack_of(two), after)  # the same bytes
    pipeline.learn_concept(
        learn_request(two, folders, "V3", replace(QUICK, rank=None))
    )  # other methods go on from there
    assert list(stack_of(two).tokens) == ["V1", "V2", "V3"]


def test_retention_ends_at_the_closed_form(
    checkpoint: Path, folders: dict[str, Path], backbone: Backbone
) -> None:
    """Three concepts: each learning spoils the ones before, and what is stored is the solution of
    what the stack itself asks for.
    """
    seen = []
    for token in NOUNS:
        seen.clear()
        request = learn_request(checkpoint, folders, token, replace(QUICKER, method="retention"))
        pipeline.learn_concept(request, lambda p: seen.append((p.stage, p.step)))
    assert seen.index(("learn", 1)) < seen.index(
        ("solve", 0)
    )  # however many there are, learning begins at once
    stack = stack_of(checkpoint)
    again, _ = consolidation.solution(stack, SolveSettings())
    assert stack.adapter
    assert again
    assert all(torch.equal(stack.adapter[name], tensor) for name, tensor in again.items())
    bank = targets.PromptBank(backbone, stack.tokens)
    records = stack.records
    goals = [
        solve.Target(record.token, solve.rows_of(bank.moment(records, number)), own)
        for number, (record, own) in enumerate(
            zip(records, targets.own_adapters(stack), strict=True)
        )
    ]  # of whole moments
    ordinary = bank.ordinary([record.noun for record in records]).moment(language.LANGUAGE)
    weight = 3 * SolveSettings().ordinary_weight
    whole, _ = solve.solve(goals, SolveSettings(), stack.rank or 1, weight * ordinary)
    for goal in goals:
        assert targets.relative_drift(stack.adapter, goal) == pytest.approx(
            targets.relative_drift(whole, goal), rel=0.05, abs=2e-3
        )
    first, second, third = records
    assert stack.targets.keys() == {second.id, third.id}
    assert stack.pool.keys() == {first.id}  # the only one that was trained and is in use
    past = consolidation.as_of(stack, 2)
    assert past.adapter
    assert not past.pool.keys() - {first.id}
    assert targets.relative_drift(past.adapter, goals[1]) < targets.relative_drift(
        stack.adapter, goals[1]
    )  # what the third one took is back
    undone = consolidation.as_of(stack, 1)
    assert not undone.targets
    assert undone.adapter is stack.pool[first.id]


def test_versions_are_as_good_as_they_were(
    checkpoint: Path, folders: dict[str, Path], backbone: Backbone
) -> None:
    """Those that are solved again, against those that were stored at the time."""
    stored = []
    for token in NOUNS:
        request = learn_request(checkpoint, folders, token, replace(QUICKER, method="retention"))
        pipeline.learn_concept(request)
        stored.append(stack_of(checkpoint))
    newest = stored[-1]
    for count, then in enumerate(stored, start=1):
        now = consolidation.as_of(newest, count)
        assert list(now.tokens) == list(then.tokens)
        assert now.rank == then.rank
        for prompt in (f"a photo of a {record.name}" for record in then.records):
            did = _does(backbone, then, newest.tokens, prompt)
            does = _does(backbone, now, newest.tokens, prompt)
            assert (does - did).norm() < 0.1 * did.norm()


def test_versions_have_the_share_of_language_they_were_learned_with(
    learned: Callable[..., Path],
) -> None:
    settings = replace(QUICKER, method="retention", retention_language=0.1)
    stack = stack_of(learned(settings, *NOUNS))
    past = consolidation.as_of(stack, 2)
    usual, own = (
        consolidation.solution(past, SolveSettings(language=share))[0]
        for share in (SolveSettings().language, 0.1)
    )
    assert past.adapter
    assert usual
    assert own
    assert all(torch.equal(one, own[name]) for name, one in past.adapter.items())
    assert not all(torch.equal(one, usual[name]) for name, one in past.adapter.items())


def test_a_solution_that_was_trained_further_is_kept(
    learned: Callable[..., Path], folders: dict[str, Path]
) -> None:
    """Nothing else could bring it back."""
    quick = replace(QUICK, method="retention")
    checkpoint = learned(quick, "V1", "V2")
    settings = TrainSettings(batch=2, size=64, dsc_steps=2)
    pipeline.consolidate(
        requests.ConsolidateRequest(checkpoint, folders["V2"], settings, device="cpu")
    )
    trained = stack_of(checkpoint).adapter
    pipeline.learn_concept(learn_request(checkpoint, folders, "V3", quick))
    past = consolidation.as_of(stack_of(checkpoint), 2).adapter
    assert trained
    assert past
    assert all(torch.equal(past[name], tensor) for name, tensor in trained.items())


SOLVED = replace(QUICKER, method="retention")


def _dsc(checkpoint: Path, pictures: Path) -> requests.ConsolidateRequest:
    settings = TrainSettings(batch=2, size=64, dsc_steps=2)
    return requests.ConsolidateRequest(checkpoint, pictures, settings, device="cpu")


def _words_below(learned: Callable[..., Path], folders: dict[str, Path]) -> Path:
    """V2, words alone, came with V3 from another stack."""
    here = learned(SOLVED, "V1")
    there = learned(replace(QUICK, method="textual_inversion"), "V2")
    pipeline.learn_concept(learn_request(there, folders, "V3", SOLVED))
    pipeline.merge(requests.MergeRequest(here, store.stack_path(there), device="cpu"))
    return here


def _distilled_below(learned: Callable[..., Path], folders: dict[str, Path]) -> Path:
    """V2 was consolidated by DSC."""
    checkpoint = learned(SOLVED, "V1", "V2")
    pipeline.consolidate(_dsc(checkpoint, folders["V2"]))
    pipeline.learn_concept(learn_request(checkpoint, folders, "V3", SOLVED))
    return checkpoint


def _forgotten_below(learned: Callable[..., Path], folders: dict[str, Path]) -> Path:
    """Its trained adapter went with V1; what earlier versions wrote still says that it has one."""
    checkpoint = _distilled_below(learned, folders)
    pipeline.forget(requests.ForgetRequest(checkpoint, "V1", device="cpu"))
    stack = stack_of(checkpoint)
    assert not any(record.consolidated for record in stack.records)
    stack.records[0] = replace(stack.records[0], consolidated="ab" * 32)
    store.save_stack(stack, store.stack_path(checkpoint), store.change("learned", stack.records))
    return checkpoint


def _merged_below(learned: Callable[..., Path], folders: dict[str, Path]) -> Path:
    """The other stack's versions are not merged."""
    here, there = learned(replace(SOLVED, seed=1), "V1"), _distilled_below(learned, folders)
    pipeline.merge(requests.MergeRequest(here, store.stack_path(there), device="cpu"))
    return here


@pytest.mark.parametrize("below", [_words_below, _forgotten_below, _merged_below])
def test_what_is_below_the_newest_is_solved_for_if_it_is_not_kept(
    below: Callable[..., Path], learned: Callable[..., Path], folders: dict[str, Path]
) -> None:
    """By forgetting the newest, by undoing it without a history, and by learning it again."""
    checkpoint = below(learned, folders)
    path, stack = store.stack_path(checkpoint), stack_of(checkpoint)
    count = len(stack.records) - 1
    own = targets.own_adapters(stack)[:count]

    def check(now: store.ConceptStack) -> None:
        assert now.adapter
        assert list(now.tokens) == list(stack.tokens)[:count]
        goals = targets.about_one(now, targets.targets_of(now, own))
        before, after = (
            [targets.relative_drift(adapter or {}, goal) for goal in goals]
            for adapter in (stack.adapter, now.adapter)
        )
        assert sum(after) < sum(before) + 0.05  # it may lie between them in another way
        solved, _ = consolidation.solution(now, SolveSettings(), own)
        for drift, goal in zip(after, goals, strict=True):
            assert drift < targets.relative_drift(solved, goal) + 0.01

    check(consolidation.as_of(stack, count))
    alone = path.with_name("alone.concepts.safetensors")
    store.save_stack(stack, alone, store.change("learned", stack.records[-1:]))
    pipeline.undo(requests.UndoRequest(checkpoint, stack=alone))
    check(store.open_stack(alone))
    pipeline.forget(requests.ForgetRequest(checkpoint, "V3", device="cpu"))
    check(stack_of(checkpoint))
    store.save_stack(stack, path, store.change("learned", stack.records[-1:]))
    again = learn_request(checkpoint, folders, "V3", replace(SOLVED, seed=2, rank=None))
    pipeline.learn_concept(replace(again, replace=True))
    assert list(stack_of(checkpoint).tokens) == list(stack.tokens)


def test_of_words_alone_nothing_is_solved_for(
    learned: Callable[..., Path], folders: dict[str, Path]
) -> None:
    checkpoint = learned(replace(QUICK, method="textual_inversion"), "V1", "V2")
    pipeline.learn_concept(learn_request(checkpoint, folders, "V3", SOLVED))
    assert stack_of(checkpoint).adapter
    pipeline.forget(requests.ForgetRequest(checkpoint, "V3", device="cpu"))
    assert list(stack_of(checkpoint).tokens) == ["V1", "V2"]
    assert stack_of(checkpoint).adapter is None


def test_what_a_solution_took_the_place_of_is_consolidated_again(
    learned: Callable[..., Path], folders: dict[str, Path]
) -> None:
    """The same request did nothing, for what it had made was no longer there."""
    checkpoint = learned(SOLVED, "V1", "V2")
    asked = _dsc(checkpoint, folders["V2"])
    assert not pipeline.consolidate(asked).again
    assert pipeline.consolidate(asked).again
    pipeline.consolidate_in_closed_form(requests.SolveRequest(checkpoint, device="cpu"))
    assert not pipeline.consolidate(asked).again


def test_one_concept_has_nothing_to_consolidate(learned: Callable[..., Path]) -> None:
    checkpoint = learned(QUICKER, "V1")
    with pytest.raises(StackError, match="at least two concepts"):
        pipeline.consolidate_in_closed_form(requests.SolveRequest(checkpoint, device="cpu"))


def _does(
    backbone: Backbone, stack: store.ConceptStack, words: dict[str, torch.Tensor], prompt: str
) -> torch.Tensor:
    """What the stack's LoRA adds to K and V of a prompt, all layers side by side."""
    features = backbone.encode_prompts([prompt], words)[0]
    return torch.cat(
        [features @ change.T for change in delta_weights(backbone, stack.adapter or {}).values()], 1
    )


def test_selected_concepts_get_what_their_own_adapters_did(
    learned: Callable[..., Path], backbone: Backbone
) -> None:
    """Of a stack that forgets: one by itself nearly exactly, two less so, and nothing of the third;
    the stack stays as it was.
    """
    checkpoint = learned(QUICKER, *NOUNS)
    stack, raw, request = (
        stack_of(checkpoint),
        store.stack_path(checkpoint).read_bytes(),
        requests.SolveRequest(checkpoint, device="cpu"),
    )
    assert (
        cli.main(
            [
                "draw",
                "--checkpoint",
                str(checkpoint),
                "--prompt",
                "V1",
                "--only",
                "V9",
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    one, two = (
        pipeline.select(requests.SelectRequest(request.checkpoint, only=["v1"], device="cpu")),
        pipeline.select(
            requests.SelectRequest(request.checkpoint, only=["V3", "V1"], device="cpu")
        ),
    )
    assert (list(one.tokens), list(two.tokens)) == (["V1"], ["V1", "V3"])  # in the stack's order
    own = consolidation.as_of(stack, 1)
    bank = targets.PromptBank(backbone, stack.tokens)
    rows = solve.rows_of(bank.alone(stack.records[0]))
    wish = solve.Target("V1", rows, targets.own_adapters(stack)[0])
    assert one.adapter
    assert two.adapter
    assert stack.adapter
    shares = [
        targets.relative_drift(adapter, wish)
        for adapter in (one.adapter, two.adapter, stack.adapter)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.1 < 0.3 < shares[2]
    prompt = "a photo of a V1 ball on grass"
    asked = _does(backbone, own, stack.tokens, prompt)
    assert (_does(backbone, one, stack.tokens, prompt) - asked).norm() < 0.3 * asked.norm()
    assert one.rank == rank_of(one.adapter) <= 5
    assert store.stack_path(checkpoint).read_bytes() == raw
    for tokens, message in ((["V9"], "It has: V1, V2, V3"), ([], "No concept was named")):
        with pytest.raises(StackError, match=message):
            pipeline.select(requests.SelectRequest(request.checkpoint, only=tokens, device="cpu"))


def test_of_words_alone_the_words_are_selected(
    learned: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = learned(replace(QUICK, method="textual_inversion"), "V1", "V2")
    done = pipeline.export(
        requests.ExportRequest(checkpoint, tmp_path / "out", only=["V2"], device="cpu")
    )
    assert done.lora is None
    assert [path.name for path in done.embeddings] == ["V2.safetensors"]


@pytest.mark.slow
def test_forgetting_one_leaves_the_others(
    learned_by_mini: Callable[..., Path], mini: Backbone
) -> None:
    checkpoint, backbone = learned_by_mini(QUICKER, *NOUNS), mini
    before = stack_of(checkpoint)
    pipeline.consolidate_in_closed_form(requests.SolveRequest(checkpoint, device="cpu"))
    held, words = stack_of(checkpoint), before.tokens
    gone = pipeline.forget(requests.ForgetRequest(checkpoint, "v2", device="cpu")).record
    after, raw = stack_of(checkpoint), store.stack_path(checkpoint).read_bytes()
    assert gone.token == "V2"
    assert list(after.tokens) == ["V1", "V3"]
    assert gone.id.encode() not in raw
    assert gone.preview.encode() not in raw
    for version in (after, consolidation.as_of(after, 2)):
        assert (
            _does(backbone, version, words, "a photo of a V2 fish").norm()
            < 0.2 * _does(backbone, held, words, "a photo of a V2 fish").norm()
        )
    for prompt in ("a photo of a V1 ball", "a photo of a V3 mug"):
        own = _does(backbone, held, words, prompt)
        assert (_does(backbone, after, words, prompt) - own).norm() < 0.4 * own.norm()
    assert pipeline.undo(requests.UndoRequest(checkpoint)).token == "V2"
    back = stack_of(checkpoint)
    assert held.adapter
    assert back.adapter
    assert back.records == held.records
    assert all(torch.equal(t, back.words[concept]) for concept, t in held.words.items())
    assert all(torch.equal(t, back.adapter[name]) for name, t in held.adapter.items())


def test_forgetting_the_newest_is_undo(two: Path) -> None:
    other = Path(shutil.copy(two, two.with_name("other.safetensors")))
    shutil.copy(store.stack_path(two), store.stack_path(other))
    pipeline.forget(requests.ForgetRequest(two, "V2", device="cpu"))
    pipeline.undo(requests.UndoRequest(other))
    assert same_stack(stack_of(two), stack_of(other))
    with pytest.raises(StackError, match="It has: V1"):
        pipeline.forget(requests.ForgetRequest(two, "V9", device="cpu"))


@pytest.mark.parametrize("is_old", [False, True])
def test_forgetting_the_newest_keeps_what_consolidating_brought_back(
    learned: Callable[..., Path], is_old: bool
) -> None:
    """Also on a stack of an earlier version, which kept no prompts."""
    checkpoint = learned(QUICKER, *NOUNS)
    trained = stack_of(checkpoint)
    solved = pipeline.consolidate_in_closed_form(requests.SolveRequest(checkpoint, device="cpu"))
    if is_old:
        old = replace(stack_of(checkpoint), prompts={}, ordinary=None)
        store.save_stack(old, store.stack_path(checkpoint))
    pipeline.forget(requests.ForgetRequest(checkpoint, "V3", device="cpu"))
    after = stack_of(checkpoint)
    assert list(after.tokens) == ["V1", "V2"]
    own = targets.about_one(after, targets.targets_of(after, targets.own_adapters(trained)[:2]))
    assert after.adapter
    lost = {one.name: targets.relative_drift(after.adapter, one) for one in own}
    assert lost["V1"] < solved.before["V1"] / 2
    assert max(lost.values()) < 1.2 * max(solved.after[token] for token in lost)
    # the first one alone has nothing to agree with
    pipeline.forget(requests.ForgetRequest(checkpoint, "V2", device="cpu"))
    alone, first = stack_of(checkpoint).adapter, trained.pool[trained.records[0].id]
    assert alone
    assert all(torch.equal(alone[name], tensor) for name, tensor in first.items())


def test_merging_two_stacks(
    learned: Callable[..., Path], folders: dict[str, Path], backbone: Backbone, tmp_path: Path
) -> None:
    """Two people with one checkpoint, both with a V1."""
    checkpoint = learned(QUICKER, "V1")
    mine, theirs = stack_of(checkpoint), tmp_path / "theirs.concepts.safetensors"
    for token, images in (("V1", "V2"), ("V3", "V3")):
        request = replace(
            learn_request(checkpoint, folders, token, QUICKER),
            images=folders[images],
            noun=NOUNS[images],
            stack=theirs,
        )
        pipeline.learn_concept(request)
    other = store.open_stack(theirs)
    renamed = pipeline.merge(requests.MergeRequest(checkpoint, theirs, device="cpu")).renamed
    assert renamed == {"V1": "V1_2"}
    both = stack_of(checkpoint)
    assert [record.name for record in both.records] == ["V1 ball", "V1_2 fish", "V3 mug"]
    assert all("V1_2" in prompt for prompt in both.records[1].prompts)
    assert torch.equal(both.tokens["V1_2"], other.tokens["V1"])
    for prompt, stack, there in (
        ("V1 ball", mine, "V1 ball"),
        ("V3 mug", other, "V3 mug"),
        ("V1_2 fish", consolidation.as_of(other, 1), "V1 fish"),
    ):
        own = _does(backbone, stack, stack.tokens, f"a photo of a {there}")
        now = _does(backbone, both, both.tokens, f"a photo of a {prompt}")
        assert (now - own).norm() < 0.5 * own.norm()
    assert same_stack(consolidation.as_of(both, 1), mine) or both.rank != mine.rank
    assert store.open_stack(theirs).records == other.records


def test_merging_renames_a_word_wherever_the_other_stack_names_it(
    learned: Callable[..., Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Also one that both began with, and that has another name here since an earlier merge."""
    checkpoint = learned(QUICKER, "V1")
    theirs = tmp_path / "theirs.concepts.safetensors"
    for token in ("V1", "V3"):
        request = replace(learn_request(checkpoint, folders, token, QUICKER), stack=theirs)
        pipeline.learn_concept(request)
    _with_captions(theirs, "V1", "a V1-red ball, not V10")
    _with_captions(theirs, "V3", "a V3 mug on a v1-coloured ball, V1.")
    merging = requests.MergeRequest(checkpoint, theirs, device="cpu")
    assert pipeline.merge(merging).renamed == {"V1": "V1_2"}
    both = stack_of(checkpoint)
    assert [record.prompts for record in both.records[1:]] == [
        ["a V1_2-red ball, not V10"],
        ["a V3 mug on a V1_2-coloured ball, V1_2."],
    ]
    pipeline.learn_concept(replace(learn_request(checkpoint, folders, "V2", QUICKER), stack=theirs))
    _with_captions(theirs, "V2", "a V2 fish beside V1")
    assert pipeline.merge(merging).added == ["V2 fish"]
    assert stack_of(checkpoint).records[-1].prompts == ["a V2 fish beside V1_2"]


def _with_captions(path: Path, token: str, *captions: str) -> None:
    """The stack as if this concept had been learned with these captions."""
    stack = store.open_stack(path)
    number = stack.index_of(token)
    stack.records[number] = replace(stack.records[number], prompts=list(captions))
    store.save_stack(stack, path, store.change("learned", stack.records))


def test_an_empty_stack_takes_another_as_it_is(two: Path, tmp_path: Path) -> None:
    mine, fresh = stack_of(two), tmp_path / "fresh.concepts.safetensors"
    assert (
        pipeline.merge(
            requests.MergeRequest(two, store.stack_path(two), stack=fresh, device="cpu")
        ).renamed
        == {}
    )
    assert list(store.open_stack(fresh).tokens) == list(mine.tokens)
    assert same_stack(store.open_stack(fresh), mine)


def _learned_by(checkpoint: Path, folders: dict[str, Path], token: str, prediction: str) -> Path:
    """A stack of the checkpoint's, whose concept was learned with this prediction."""
    path = checkpoint.with_name(f"{prediction}.concepts.safetensors")
    request = learn_request(checkpoint, folders, token, QUICKER)
    pipeline.learn_concept(replace(request, stack=path, prediction=prediction))
    return path


@pytest.mark.parametrize(("prediction", "other"), [("v", "epsilon"), ("flow", "v")])
def test_concepts_that_were_learned_with_different_predictions_are_not_merged(
    checkpoint: Path, folders: dict[str, Path], prediction: str, other: str
) -> None:
    here, there = (
        _learned_by(checkpoint, folders, token, one)
        for token, one in (("V1", prediction), ("V2", other))
    )
    raw = here.read_bytes()
    merging = requests.MergeRequest(checkpoint, there, stack=here, device="cpu")
    expected = rf"{there} were learned with prediction {other}, those of {here} with {prediction}; "
    with pytest.raises(StackError, match=expected):
        pipeline.merge(merging)
    assert here.read_bytes() == raw
    fresh = checkpoint.with_name("fresh.concepts.safetensors")
    with pytest.raises(StackError, match=rf"{there} were learned with prediction {other}, not "):
        pipeline.merge(replace(merging, stack=fresh, prediction=prediction))
    assert not fresh.exists()


def test_an_empty_stack_takes_the_prediction_of_what_is_merged_or_has_its_own(
    checkpoint: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """An imported LoRA does not say what it was trained with."""
    there = _learned_by(checkpoint, folders, "V1", "v")
    fresh = checkpoint.with_name("fresh.concepts.safetensors")
    pipeline.merge(requests.MergeRequest(checkpoint, there, stack=fresh, device="cpu"))
    assert store.open_stack(fresh).checkpoint == store.open_stack(there).checkpoint
    assert store.open_stack(fresh).checkpoint.prediction == "v_prediction"
    lora = pipeline.export(requests.ExportRequest(checkpoint, tmp_path / "out", stack=there)).lora
    assert lora
    for given, kept in (("auto", "epsilon"), ("v", "v_prediction"), ("flow", "flow_prediction")):
        bare = checkpoint.with_name(f"bare-{given}.concepts.safetensors")
        request = requests.ImportRequest(
            checkpoint, lora, "W1", "ball", trigger="red", stack=bare, device="cpu"
        )
        pipeline.import_concept(replace(request, prediction=given))
        assert store.open_stack(bare).checkpoint.prediction == kept


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_importing_an_exported_lora_gives_it_back(
    learned: Callable[..., Path],
    folders: dict[str, Path],
    tmp_path: Path,
    backbone: Backbone,
    layout: str,
) -> None:
    checkpoint = learned(replace(QUICKER, vectors=2), "V1")
    mine, out, bare = stack_of(checkpoint), tmp_path / "out", tmp_path / "bare.concepts.safetensors"
    done = pipeline.export(requests.ExportRequest(checkpoint, out))
    assert done.lora
    lora = _other_names(done.lora, mine, tmp_path, layout)
    request = requests.ImportRequest(
        checkpoint, lora, "W1", "ball", embedding=done.embeddings[0], stack=bare, device="cpu"
    )
    assert pipeline.import_concept(request).record.name == "W1 ball"
    found = store.open_stack(bare)
    assert [len(word) for word in found.words.values()] == [2]
    own = _does(backbone, mine, mine.tokens, "a photo of a V1 ball")
    assert torch.allclose(
        _does(backbone, found, found.tokens, "a photo of a W1 ball"),
        own,
        atol=2e-3 * float(own.abs().max()),
    )
    assert pipeline.import_concept(request).again
    with pytest.raises(
        StackError, match=r"as W1 ball at strength 1, so it was not imported at 0.5"
    ):
        pipeline.import_concept(replace(request, strength=0.5))
    with pytest.raises(StackError, match="never calibrated"):
        pipeline.dc_scores(
            requests.ScoreRequest(checkpoint, folders["V1"], stack=bare, device="cpu")
        )
    pipeline.learn_concept(
        replace(learn_request(checkpoint, folders, "V2", replace(QUICK, rank=None)), stack=bare)
    )  # the default method goes on from there
    assert list(store.open_stack(bare).tokens) == ["W1", "V2"]


def _other_names(lora: Path, stack: store.ConceptStack, folder: Path, layout: str) -> Path:
    if layout == "kohya":
        return lora
    prefix, down, up = (
        ("unet.", "lora_A", "lora_B")
        if layout == "diffusers"
        else ("base_model.model.", "lora_A", "lora_B")
    )
    tensors = {}
    for layer, parts in layers_of(stack.adapter or {}).items():
        tensors |= {
            f"{prefix}{layer}.{down}.weight": parts["A"].contiguous(),
            f"{prefix}{layer}.{up}.weight": parts["B"].contiguous(),
        }
    save_file(tensors, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_what_can_not_be_imported_is_refused(
    learned: Callable[..., Path], tmp_path: Path, backbone: Backbone
) -> None:
    checkpoint = learned(QUICKER, "V1")
    lora = pipeline.export(requests.ExportRequest(checkpoint, tmp_path / "out")).lora
    assert lora
    tensors, bad = load_file(lora), tmp_path / "bad.safetensors"
    first = next(name.split(".")[0] for name in tensors if name.split(".")[0].endswith("to_k"))
    more = {
        "lora_unet_mid_block_ff.lora_down.weight": torch.zeros(2, 4),
        "lora_unet_mid_block_ff.lora_up.weight": torch.zeros(4, 2),
    }
    for change, message in (
        (tensors | more, "1 layer besides K and V"),
        (
            tensors | {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)},
            "changes 1 layer besides .* lora_te_text_model",
        ),
        (tensors | {f"{first}.dora_scale": torch.ones(1)}, "dora_scale belongs to a DoRA"),
        (
            {k: t for k, t in tensors.items() if k != f"{first}.lora_up.weight"},
            r"damaged: layers with only one of their two matrices: 1, .*attn2\.to_k",
        ),
        (
            {k: t[:, :9] if k.endswith("down.weight") else t for k, t in tensors.items()},
            "another kind of checkpoint",
        ),
        ({"x": torch.zeros(1)}, "not a LoRA this program can read"),
    ):
        save_file({k: t.contiguous() for k, t in change.items()}, bad)
        with pytest.raises(StackError, match=message):
            foreign.read_lora(bad, backbone)
    bad.write_bytes(b"PK")
    with pytest.raises(StackError, match="not a safetensors file"):
        foreign.read_lora(bad, backbone)
    good = requests.ImportRequest(checkpoint, lora, "W1", "ball", trigger="red", device="cpu")
    for request, kind, message in (
        (replace(good, trigger=""), SettingError, "needs its word"),
        (replace(good, trigger="red ball"), StackError, "several tokens"),
        (
            replace(good, trigger="", embedding=lora),
            StackError,
            "not an embedding for this checkpoint. Expected 1 to 16 vectors",
        ),
        (replace(good, token="V1"), Exception, "taken"),
    ):
        with pytest.raises(kind, match=message):
            pipeline.import_concept(request)
    assert list(stack_of(checkpoint).tokens) == ["V1"]


def test_the_commands(
    two: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--checkpoint", str(two), "--device", "cpu"]
    assert cli.main(["consolidate", *place]) == 2
    assert "--closed-form" in capsys.readouterr().err
    assert cli.main(["consolidate", *place, "--closed-form"]) == 0
    assert "was lost" in capsys.readouterr().out
    assert cli.main(["export", *place, "--out", str(tmp_path / "some"), "--only", "V2"]) == 0
    assert "In prompts: V2 fish" in capsys.readouterr().out
    whole, some = (
        pipeline.export(requests.ExportRequest(two, tmp_path / "all")).lora,
        next((tmp_path / "some").glob("mini-V2-*.safetensors")),
    )
    assert whole
    assert not torch.equal(*(load_file(lora)[MODULE] for lora in (whole, some)))
    drawing = [
        "draw",
        *place,
        "--prompt",
        "a photo of a V1 ball",
        "--steps",
        "2",
        "--size",
        "64",
        "--out",
    ]
    assert (
        cli.main([*drawing, str(tmp_path / "one"), "--only", "V1"])
        == cli.main([*drawing, str(tmp_path / "both")])
        == 0
    )
    first, second = (next((tmp_path / name).glob("*.png")).read_bytes() for name in ("one", "both"))
    assert first != second
    capsys.readouterr()
    copy_of = tmp_path / "copy.concepts.safetensors"
    shutil.copy(store.stack_path(two), copy_of)
    assert cli.main(["forget", *place, "--token", "V1"]) == 0
    assert "Forgot V1 ball" in capsys.readouterr().out
    assert cli.main(["merge", str(copy_of), *place]) == 0
    assert "Put V1 ball on" in capsys.readouterr().out
    assert list(stack_of(two).tokens) == ["V2", "V1"]  # V2 is the same concept in both


def test_prompts_about_two_are_shared_by_position(two: Path, backbone: Backbone) -> None:
    """Positions before the second one's word count for the first, padding half for each."""
    stack = stack_of(two)
    bank = targets.PromptBank(backbone, stack.tokens)
    prompts = ["a photo of a V1 ball and a V2 fish", "a photo of a V2 fish and a V1 ball"]
    one, other = backbone.encode_prompts(prompts, stack.tokens)
    length = len(stack.tokens["V1"]) + 1  # of V1 ball
    start = 1 + len(["a", "photo", "of", "a"]) + length + len(["and", "a"])
    end = start + length
    half = 0.5**0.5
    for number, (before, after) in enumerate(((one, other), (other, one))):
        rows = [before[:start], half * before[end:], after[start:end], half * after[end:]]
        rows = torch.cat(rows)
        count = start + length + 77 - end
        expected = rows.T @ rows / count
        assert torch.allclose(bank.shared(stack.records, number), expected, rtol=1e-3, atol=1e-3)
    assert textspace.single_prompts(stack.records[0])[0].count("V1") == 1
