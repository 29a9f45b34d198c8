"""The rivals of `retention` in its benchmark do what their papers say, on the thin mini-SD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_learn import NOUNS, random_adapter
from jobs import Job
from learning import learn
from rivals import RIVALS, Own
from rivals.cidm import shares
from rivals.custom_diffusion_merge import constrained_map
from rivals.features import feature_rows, target_rows
from rivals.gradient_fusion import fuse
from rivals.learning import Lesson, learn_next, stack_of
from rivals.orthogonal_adaptation import OrthogonalAdaptation
from rivals.rival import Rival
from torch import Tensor

from comfy_continual_lora.adapters.adapter import (
    Adapter,
    attached,
    delta_weights,
    layers_of,
    new_adapter,
    rank_of,
)
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.concepts import name_of, prompts_for
from comfy_continual_lora.mini import trainset, world
from comfy_continual_lora.penalty import Step
from comfy_continual_lora.presets import TEMPLATES
from comfy_continual_lora.settings import LearnSettings, ResolvedSettings, SolveSettings
from comfy_continual_lora.solve import Target, solve
from comfy_continual_lora.textspace import ordinary_prompts

pytestmark = pytest.mark.slow
BY_PEFT = ("plain_sum", "ties", "dare", "magnitude")
SUMMING = ("orthogonal_adaptation", "o_lora", "merge_reinit")
RANK = 4


@pytest.fixture(scope="module")
def owns(backbone: Backbone) -> list[Own]:
    """Two concepts with random LoRAs."""
    return [own_of(backbone, number, token) for number, token in enumerate(("V1", "V2"))]


def own_of(backbone: Backbone, number: int, token: str) -> Own:
    noun = NOUNS[token]
    generator = torch.Generator().manual_seed(number)
    word = torch.randn(2, backbone.word_width, generator=generator)
    adapter = random_adapter(backbone, "lora", number, RANK)
    prompts = prompts_for(token, noun, TEMPLATES, None)
    return Own(token, name_of(token, noun), noun, word, adapter, prompts)


def changes(backbone: Backbone, adapter: Adapter) -> dict[str, Tensor]:
    return {layer: one.double() for layer, one in delta_weights(backbone, adapter).items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def on_prompts(backbone: Backbone, concept: Own, **options: Any) -> Tensor:
    words = {concept.token: concept.word}
    return feature_rows(backbone, concept.prompts, words, **{"padding": True, **options})


# --- every rival ----------------------------------------------------------------------------------


def test_the_table_holds_every_rival_by_its_name() -> None:
    assert all(rival.id == name for name, rival in RIVALS.items())
    assert {name for name, rival in RIVALS.items() if rival.sequential} == {
        "o_lora",
        "merge_reinit",
    }
    own_learning = {name for name, rival in RIVALS.items() if rival.own_learning}
    assert own_learning == {*SUMMING, "cidm"}


@pytest.mark.parametrize("name", RIVALS)
def test_an_option_that_a_rival_does_not_have_is_refused(
    name: str, backbone: Backbone, owns: list[Own]
) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        RIVALS[name].merged(backbone, owns, {"nonsense": 1.0})


@pytest.mark.parametrize("name", [*BY_PEFT, *SUMMING, "solve"])
def test_one_concept_alone_is_left_as_it_is(name: str, backbone: Backbone, owns: list[Own]) -> None:
    merged = changes(backbone, RIVALS[name].merged(backbone, owns[:1], {}))
    for layer, change in changes(backbone, owns[0].adapter).items():
        assert relative(merged[layer], change) < 1e-6


def test_gradient_fusion_leaves_one_alone_on_its_own_prompts_only(
    backbone: Backbone, owns: list[Own]
) -> None:
    options = {"iterations": 60}
    merged = changes(backbone, RIVALS["gradient_fusion"].merged(backbone, owns[:1], options))
    own = on_prompts(backbone, owns[0])
    for layer, change in changes(backbone, owns[0].adapter).items():
        assert relative(merged[layer] @ own.T, change @ own.T) < 0.1
        assert relative(merged[layer], change) > 0.1


def test_custom_diffusion_merge_leaves_one_alone_at_its_target_words_only(
    backbone: Backbone, owns: list[Own]
) -> None:
    merged = changes(backbone, RIVALS["custom_diffusion_merge"].merged(backbone, owns[:1], {}))
    targets, everything = target_rows(backbone, owns[0]), on_prompts(backbone, owns[0])
    for layer, change in changes(backbone, owns[0].adapter).items():
        assert relative(merged[layer] @ targets.T, change @ targets.T) < 1e-4
        assert relative(merged[layer] @ everything.T, change @ everything.T) > 0.1


# --- merging by peft ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain_sum", *SUMMING])
def test_a_sum_is_the_sum_of_the_changes(name: str, backbone: Backbone, owns: list[Own]) -> None:
    merged = RIVALS[name].merged(backbone, owns, {})
    assert rank_of(merged) == 2 * RANK
    first, second = (changes(backbone, own.adapter) for own in owns)
    for layer, change in changes(backbone, merged).items():
        assert relative(change, first[layer] + second[layer]) < 1e-6


def largest(change: Tensor, density: float) -> Tensor:
    """The change with all but its largest entries set to 0."""
    kept = int(density * change.numel())
    return change * (change.abs() >= change.abs().flatten().sort().values[-kept])


def test_ties_trims_elects_signs_and_averages(backbone: Backbone, owns: list[Own]) -> None:
    options = {"density": 0.3, "weight": 2.0, "rank": 64}
    merged = changes(backbone, RIVALS["ties"].merged(backbone, owns, options))
    both = [changes(backbone, own.adapter) for own in owns]
    for layer, change in merged.items():
        trimmed = torch.stack([largest(one[layer], 0.3) for one in both])
        agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
        mean = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
        assert relative(change, 2.0 * mean) < 1e-4


def test_magnitude_trims_and_adds(backbone: Backbone, owns: list[Own]) -> None:
    options = {"density": 0.3, "rank": 64}
    merged = changes(backbone, RIVALS["magnitude"].merged(backbone, owns, options))
    both = [changes(backbone, own.adapter) for own in owns]
    for layer, change in merged.items():
        assert relative(change, sum(largest(one[layer], 0.3) for one in both)) < 1e-4


def test_dare_drops_at_random_and_rescales(backbone: Backbone, owns: list[Own]) -> None:
    options = {"density": 0.4, "rank": 64}
    before = torch.get_rng_state()
    adapter = RIVALS["dare"].merged(backbone, owns, options)
    assert torch.equal(torch.get_rng_state(), before)
    again = RIVALS["dare"].merged(backbone, owns, options)
    assert all(torch.equal(again[name], tensor) for name, tensor in adapter.items())
    other = RIVALS["dare"].merged(backbone, owns, {**options, "seed": 1})
    assert not all(torch.equal(other[name], tensor) for name, tensor in adapter.items())
    first, second = (changes(backbone, own.adapter) for own in owns)
    kept = []
    for layer, change in changes(backbone, adapter).items():
        one, two = first[layer] / 0.4, second[layer] / 0.4
        outcomes = torch.stack([torch.zeros_like(one), one, two, one + two])
        distance, which = (outcomes - change).abs().min(0)
        assert distance.max() < 1e-4
        kept += [(which == 1) | (which == 3), (which == 2) | (which == 3)]
    assert np.mean([one.double().mean() for one in kept]) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("name", ["ties", "dare", "magnitude"])
def test_the_rank_is_that_of_the_sum_unless_given(
    name: str, backbone: Backbone, owns: list[Own]
) -> None:
    assert rank_of(RIVALS[name].merged(backbone, owns, {})) == 2 * RANK
    assert rank_of(RIVALS[name].merged(backbone, owns, {"rank": 3})) == 3


@pytest.mark.parametrize("name", BY_PEFT)
def test_peft_leaves_the_net_as_it_was(name: str, backbone: Backbone, owns: list[Own]) -> None:
    before = {key: tensor.clone() for key, tensor in backbone.unet.state_dict().items()}
    modules = dict(backbone.unet.named_modules())
    attributes = set(vars(backbone.unet))
    RIVALS[name].merged(backbone, owns, {})
    after = backbone.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    now = dict(backbone.unet.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[key] is module for key, module in modules.items())
    assert set(vars(backbone.unet)) == attributes
    assert not any(module.training for module in now.values())
    assert not any(parameter.requires_grad for parameter in backbone.unet.parameters())


def test_peft_leaves_the_net_as_it_was_when_merging_fails(
    backbone: Backbone, owns: list[Own]
) -> None:
    broken = replace(owns[1], adapter={k: t[:, :3] for k, t in owns[1].adapter.items()})
    modules = dict(backbone.unet.named_modules())
    with pytest.raises(RuntimeError):
        RIVALS["plain_sum"].merged(backbone, [owns[0], broken], {})
    assert dict(backbone.unet.named_modules()) == modules


# --- merging in text space ------------------------------------------------------------------------


def test_custom_diffusion_merge_meets_every_constraint(backbone: Backbone, owns: list[Own]) -> None:
    merged = RIVALS["custom_diffusion_merge"].merged(backbone, owns, {})
    rows = [target_rows(backbone, own) for own in owns]
    assert rank_of(merged) == sum(map(len, rows))
    change = changes(backbone, merged)
    for own, targets in zip(owns, rows, strict=True):
        for layer, wanted in changes(backbone, own.adapter).items():
            assert relative(change[layer] @ targets.T, wanted @ targets.T) < 1e-3


def test_custom_diffusion_merge_changes_ordinary_captions_least(
    backbone: Backbone, owns: list[Own]
) -> None:
    """Whatever else meets the constraints changes them more, in both directions."""
    targets = torch.cat([target_rows(backbone, own) for own in owns])
    ordinary = feature_rows(backbone, ordinary_prompts(["ball"]), {}, padding=False)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, len(targets), generator=generator, dtype=torch.float64)
    change = values @ constrained_map(targets, ordinary, 0.0)
    assert relative(change @ targets.T, values) < 1e-6
    least = (change @ ordinary.T).norm()
    basis, _ = torch.linalg.qr(targets.T)
    for _ in range(5):
        other = torch.randn(change.shape, generator=generator, dtype=torch.float64)
        other = other - (other @ basis) @ basis.T  # changes nothing at the target words
        other = 0.01 * other * least / (other @ ordinary.T).norm()
        assert ((change + other) @ ordinary.T).norm() > least
        assert ((change - other) @ ordinary.T).norm() > least


def test_target_words_are_the_word_the_noun_and_the_end(
    backbone: Backbone, owns: list[Own]
) -> None:
    rows = target_rows(backbone, owns[0])
    features = backbone.encode_prompts([owns[0].name], {"V1": owns[0].word})[0].double()
    _, slots = backbone.tokenize(owns[0].name, {"V1": owns[0].word})
    assert slots[1:3] == [0, 1]  # after the start token
    assert torch.equal(rows[:4], features[1:5])  # two vectors, "ball", the end
    assert len(rows) == 8
    assert not backbone.padding([owns[0].name], {"V1": owns[0].word})[0, 4]
    assert backbone.padding([owns[0].name], {"V1": owns[0].word})[0, 5]


def fusion_loss(wanted: Sequence[Tensor], rows: Sequence[Tensor], change: Tensor) -> float:
    pairs = zip(wanted, rows, strict=True)
    return float(sum(((one - change) @ x.T).square().sum() for one, x in pairs))


def least_squares(wanted: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    outputs = torch.cat([x @ one.T for one, x in zip(wanted, rows, strict=True)])
    return torch.linalg.lstsq(torch.cat(list(rows)), outputs, driver="gelsd").solution.T


def test_fusing_reaches_the_least_squares_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(40, 16, generator=generator, dtype=torch.float64) for _ in range(3)]
    wanted = [torch.randn(5, 16, generator=generator, dtype=torch.float64) for _ in range(3)]
    best = least_squares(wanted, rows)
    moments = [x.T @ x for x in rows]
    assert relative(fuse(wanted, moments, 200), best) < 1e-6
    assert relative(fuse(wanted, moments, 2), best) > 1e-3


def test_gradient_fusion_nears_the_least_squares_optimum(
    backbone: Backbone, owns: list[Own]
) -> None:
    """Text features are so alike that L-BFGS ends a little before it."""
    fused = RIVALS["gradient_fusion"].merged(backbone, owns, {"iterations": 60})
    rows = [on_prompts(backbone, own) for own in owns]
    for layer in backbone.kv_layers:
        wanted = [changes(backbone, own.adapter)[layer] for own in owns]
        least = fusion_loss(wanted, rows, least_squares(wanted, rows))
        start = fusion_loss(wanted, rows, torch.zeros_like(wanted[0]))
        assert least < 0.7 * start
        assert fusion_loss(wanted, rows, fused[f"{layer}.D"].double()) - least < 0.05 * start


def test_solve_is_the_closed_form_over_ordinary_prompts_too(
    backbone: Backbone, owns: list[Own]
) -> None:
    """Without a weight on ordinary prompts it does more of what the LoRAs do to their prompts."""
    options = {"language": 0.0}
    held = RIVALS["solve"].merged(backbone, owns, options)
    free = RIVALS["solve"].merged(backbone, owns, {**options, "ordinary_weight": 0.0})
    ordinary = feature_rows(backbone, ordinary_prompts(["ball", "fish"]), {}, padding=True)

    def lost(adapter: Adapter, own: Own) -> float:
        rows = on_prompts(backbone, own)
        now, wanted = changes(backbone, adapter), changes(backbone, own.adapter)
        return float(sum(((now[k] - wanted[k]) @ rows.T).square().sum() for k in wanted))

    def leaked(adapter: Adapter) -> float:
        return float(
            sum((one @ ordinary.T).square().sum() for one in changes(backbone, adapter).values())
        )

    assert sum(lost(free, own) for own in owns) < sum(lost(held, own) for own in owns)
    assert leaked(held) < leaked(free)
    assert rank_of(held) >= RANK
    targets = [Target(own.token, torch.eye(64), own.adapter) for own in owns]
    assert not torch.equal(
        free[next(iter(free))], solve(targets, SolveSettings())[0][next(iter(free))]
    )


# --- own learning ---------------------------------------------------------------------------------

SETTINGS: ResolvedSettings = LearnSettings(
    method="lora", steps=2, batch=2, rank=RANK, vectors=1, warmup=0, precision="fp32"
).resolved("mini")


def lesson(token: str, number: int) -> Lesson:
    concept = world.concepts("development")[number]
    pictures = np.stack(list(world.concept_pictures(concept, 2)))
    return Lesson(token, NOUNS[token], trainset.to_tensor(pictures))


LESSONS = [lesson(token, number) for number, token in enumerate(NOUNS)]


def learned(
    rival: Rival, backbone: Backbone, folder: Path, count: int, **options: float
) -> list[Own]:
    folder.mkdir(exist_ok=True)
    owns: list[Own] = []
    for number, one in enumerate(LESSONS[:count]):
        file = folder / f"{number}.snapshot"
        owns.append(learn_next(rival, backbone, one, owns, SETTINGS, options, file))
    return owns


def moved(now: Adapter, before: Adapter, part: str) -> float:
    return max(float((now[k] - before[k]).abs().max()) for k in now if k.endswith(f".{part}"))


def test_learning_alone_trains_both_factors_and_the_word(
    backbone: Backbone, tmp_path: Path
) -> None:
    own = learn_next(Rival(), backbone, LESSONS[0], [], SETTINGS, {}, tmp_path / "a.snapshot")
    other = learn_next(Rival(), backbone, LESSONS[1], [], SETTINGS, {}, tmp_path / "b.snapshot")
    again = learn_next(Rival(), backbone, LESSONS[0], [], SETTINGS, {}, tmp_path / "c.snapshot")
    resumed = learn_next(Rival(), backbone, LESSONS[0], [], SETTINGS, {}, tmp_path / "a.snapshot")
    start = new_adapter(backbone, RANK, torch.Generator())
    assert (own.name, own.noun, own.token) == ("V1 ball", "ball", "V1")
    assert "a photo of a V1 ball" in own.prompts
    assert own.adapter.keys() == start.keys()
    assert all(own.adapter[name].shape == tensor.shape for name, tensor in start.items())
    assert all(tensor.any() for name, tensor in own.adapter.items() if name.endswith(".B"))
    assert own.word.shape == (1, backbone.word_width)
    for same in (again, resumed):
        assert torch.equal(same.word, own.word)
        assert all(torch.equal(same.adapter[k], tensor) for k, tensor in own.adapter.items())
    # each concept's start is its own
    a = next(name for name in start if name.endswith(".A"))
    assert relative(own.adapter[a], other.adapter[a]) > 0.5


class Watched(OrthogonalAdaptation):
    """Remembers what each concept started from."""

    def __init__(self) -> None:
        self.starts: list[Adapter] = []

    def start(self, *arguments: Any) -> Adapter:
        self.starts.append(super().start(*arguments))
        return {name: tensor.clone() for name, tensor in self.starts[-1].items()}


def test_orthogonal_adaptation_learns_in_orthogonal_directions_that_never_move(
    backbone: Backbone, tmp_path: Path
) -> None:
    rival = Watched()
    owns = learned(rival, backbone, tmp_path, 3)
    for own, start in zip(owns, rival.starts, strict=True):
        assert moved(own.adapter, start, "A") == 0
        assert moved(own.adapter, start, "B") > 0
    for name in (name for name in owns[0].adapter if name.endswith(".A")):
        rows = torch.cat([own.adapter[name].double() for own in owns])
        gram = rows @ rows.T * RANK / rows.shape[1]
        assert torch.allclose(gram, torch.eye(3 * RANK, dtype=torch.float64), atol=1e-5)


def test_orthogonal_adaptation_goes_on_when_there_is_no_room(backbone: Backbone) -> None:
    rival, past = RIVALS["orthogonal_adaptation"], list[Adapter]()
    generator = torch.Generator().manual_seed(0)
    for _ in range(64 // RANK + 1):
        past.append(rival.start(backbone, past, RANK, generator))
    name = next(name for name in past[0] if name.endswith(".A"))
    rows = [adapter[name].double() for adapter in past]
    full = torch.cat(rows[:-1])
    scale = 64 / RANK
    assert torch.allclose(full @ full.T / scale, torch.eye(64, dtype=torch.float64), atol=1e-4)
    last = rows[-1] @ rows[-1].T / scale
    assert torch.allclose(last, torch.eye(RANK, dtype=torch.float64), atol=1e-5)
    assert rows[-1].isfinite().all()


def test_o_lora_penalises_what_is_not_orthogonal(backbone: Backbone) -> None:
    free = RIVALS["orthogonal_adaptation"]
    generator = torch.Generator().manual_seed(0)
    past: list[Adapter] = []
    for _ in range(3):
        past.append(free.start(backbone, past, RANK, generator))
    new = random_adapter(backbone, "lora", 5, RANK)
    device = torch.device("cpu")
    assert RIVALS["o_lora"].penalties([], {}, device) == {}
    penalty = RIVALS["o_lora"].penalties(past[:2], {"weight": 3.0}, device)["o_lora"]
    assert float(penalty(Step(past[2]))) == pytest.approx(0, abs=1e-2)
    squares = RIVALS["o_lora"].penalties(past[:2], {"weight": 3.0, "power": 2}, device)["o_lora"]
    by_hand = [
        earlier[name] @ new[name].T for earlier in past[:2] for name in new if name.endswith(".A")
    ]
    assert float(penalty(Step(new))) == pytest.approx(
        3.0 * sum(float(one.abs().sum()) for one in by_hand), rel=1e-5
    )
    assert float(squares(Step(new))) == pytest.approx(
        3.0 * sum(float(one.square().sum()) for one in by_hand), rel=1e-5
    )


def test_the_gradient_of_o_lora_acts_on_the_new_a_alone(backbone: Backbone) -> None:
    past = [random_adapter(backbone, "lora", seed, RANK) for seed in (1, 2)]
    new = random_adapter(backbone, "lora", 3, RANK)
    for tensor in (*new.values(), *past[0].values(), *past[1].values()):
        tensor.requires_grad_()
    penalties = RIVALS["o_lora"].penalties(
        [{k: t.detach() for k, t in one.items()} for one in past], {}, torch.device("cpu")
    )
    penalties["o_lora"](Step(new)).backward()
    for name, tensor in new.items():
        assert (tensor.grad is not None) == name.endswith(".A")
    assert all(t.grad is None for one in past for t in one.values())


def test_o_lora_learns_a_more_orthogonal_a(backbone: Backbone, tmp_path: Path) -> None:
    def overlap(owns: Sequence[Own]) -> float:
        first, second = (layers_of(own.adapter) for own in owns)
        return float(sum((first[k]["A"] @ second[k]["A"].T).abs().sum() for k in first))

    held = learned(RIVALS["o_lora"], backbone, tmp_path / "held", 2, weight=100.0)
    free = learned(RIVALS["o_lora"], backbone, tmp_path / "free", 2, weight=0.0)
    assert overlap(held) < overlap(free)


@pytest.mark.parametrize("name", ["merge_reinit", "o_lora"])
def test_the_sequential_ones_learn_on_top_of_earlier_ones_and_leave_them(
    name: str, backbone: Backbone, tmp_path: Path
) -> None:
    rival = RIVALS[name]
    options = {"weight": 0.0} if name == "o_lora" else {}
    first, second = learned(rival, backbone, tmp_path, 2, **options)
    merged = rival.merged(backbone, [first, second], {})
    # the earlier one is in the sum as it was
    assert all(
        torch.equal(merged[k][:RANK] if k.endswith(".A") else merged[k][:, :RANK], tensor)
        for k, tensor in first.adapter.items()
    )
    assert all(second.adapter[k].shape == tensor.shape for k, tensor in first.adapter.items())
    # the new one starts afresh
    a = next(k for k in first.adapter if k.endswith(".A"))
    assert relative(second.adapter[a], first.adapter[a]) > 0.5
    # and has seen the earlier one: alone, it would have learned something else
    alone = learn_next(rival, backbone, LESSONS[1], [], SETTINGS, {}, tmp_path / "alone.snapshot")
    assert moved(alone.adapter, second.adapter, "B") > 0


def test_cidm_keeps_a_new_b_apart_from_earlier_ones(backbone: Backbone) -> None:
    past = [random_adapter(backbone, "lora", seed, RANK) for seed in (1, 2)]
    new = random_adapter(backbone, "lora", 3, RANK)
    device = torch.device("cpu")
    assert RIVALS["cidm"].penalties([], {}, device) == {}
    penalty = RIVALS["cidm"].penalties(past, {"weight": 3.0}, device)["cidm"]
    layers = [name for name in new if name.endswith(".B")]
    apart = [float((new[k] @ one[k].T).abs().mean()) for one in past for k in layers]
    pull = [float((new[k] - 1).square().mean()) for k in layers]
    by_hand = 3.0 * (np.mean(apart) + np.mean(pull))
    assert float(penalty(Step(new))) == pytest.approx(by_hand, rel=1e-5)


def test_cidm_weighs_every_lora_by_how_near_its_word_is(
    backbone: Backbone, owns: list[Own]
) -> None:
    rival, both = RIVALS["cidm"], [changes(backbone, own.adapter) for own in owns]
    for drawn in owns:
        share = shares(backbone, owns, drawn, 8.0)
        assert float(share.sum()) == pytest.approx(1)
        assert owns[int(share.argmax())] is drawn
        options = {"alpha": 0.5, "power": 8.0}
        merged = changes(backbone, rival.merged(backbone, owns, options, drawn=drawn))
        for layer, change in merged.items():
            wanted = 0.5 * (share[0] * both[0][layer] + share[1] * both[1][layer])
            assert relative(change, wanted) < 1e-6
    assert shares(backbone, owns, owns[0], 0.0).tolist() == [0.5, 0.5]
    assert shares(backbone, owns[:1], owns[0], 4.0).tolist() == [1.0]


def test_each_concept_is_drawn_with_a_mean_of_its_own_by_cidm_alone(tmp_path: Path) -> None:
    common = ("batch=2", "rank=4", "vectors=1")
    for name, count in (("cidm", 3), ("merge_reinit", 2)):
        learned = learn(Job(name, 0, 2, 2, tmp_path / name, steps=2, common=common))
        assert set(learned.stacks) == {(0, 0), (1, 0), (1, 1)}
        assert len({id(stack) for stack in learned.stacks.values()}) == count
        assert len(learned.stacks[1, 0].records) == 2


def test_a_stack_draws_with_the_adapter_and_every_word(backbone: Backbone, owns: list[Own]) -> None:
    merged = RIVALS["plain_sum"].merged(backbone, owns, {})
    stack = stack_of(backbone, owns, merged)
    assert list(stack.tokens) == ["V1", "V2"]
    assert [record.name for record in stack.records] == ["V1 ball", "V2 fish"]
    assert all(torch.equal(stack.tokens[own.token], own.word) for own in owns)
    assert stack.rank == 2 * RANK
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    features = backbone.encode_prompts(["a V1 ball"], stack.tokens)
    full = RIVALS["gradient_fusion"].merged(backbone, owns, {"iterations": 2})
    for adapter in (stack.adapter, stack_of(backbone, owns, full).adapter):
        with torch.no_grad(), attached(backbone, adapter):
            drawn = backbone.predict(noise, torch.tensor([300]), features)
        assert drawn.isfinite().all()
    assert stack_of(backbone, owns, full).rank is None
