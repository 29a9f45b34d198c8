"""Text space: the drift is the mean over features it says it is, and what the prompts ask for is
there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers_learn import QUICK, learn_request, random_adapter, stack_of

from comfy_continual_lora import language, pipeline, store, targets, textspace
from comfy_continual_lora.adapters.adapter import Adapter, delta_weights, factored, layers_of
from comfy_continual_lora.adapters.lora import joined
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.methods import method as base_method
from comfy_continual_lora.penalty import Step
from comfy_continual_lora.settings import LearnSettings


@pytest.mark.parametrize("kind", ["lora", "vera", "full"])
def test_drift_is_the_mean_over_all_features(backbone: Backbone, kind: str) -> None:
    """The quadratic form against the sum it stands for: every prompt, position and layer one by
    one.
    """
    prompts = ["", "a red ball on grass", "a photo of a fish"]
    text = FrozenText(backbone, {})
    features = text(prompts).flatten(0, 1)
    own, anchor = random_adapter(backbone, kind, 1), random_adapter(backbone, kind, 2)
    plain = {name: layer.weight for name, layer in backbone.kv_layers.items()}
    sizes = {name: (features @ w.T).square().sum(1).mean() for name, w in plain.items()}
    changed, before = delta_weights(backbone, own), delta_weights(backbone, anchor)
    for fixed, target in ((anchor, before), (None, {name: 0 * w for name, w in plain.items()})):
        expected = [
            (features @ (changed[n] - target[n]).T).square().sum(1).mean() / sizes[n] for n in plain
        ]
        found = textspace.drift(own, fixed, textspace.moment(backbone, {}, prompts), sizes)
        assert float(found) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert float(
        textspace.drift(anchor, anchor, textspace.moment(backbone, {}, prompts), sizes)
    ) == pytest.approx(0, abs=1e-5)


def test_words_and_padding_count_as_weighted(backbone: Backbone) -> None:
    prompts = ["", "a red ball on grass", "a photo of a fish"]
    behind, features = (
        backbone.padding(prompts, {}).flatten(),
        backbone.encode_prompts(prompts).flatten(0, 1),
    )
    assert behind.sum() == 3 * 77 - (2 + 7 + 7)
    for share in (0.25, 1.0):
        weight = torch.where(behind, (1 - share) / behind.sum(), share / (~behind).sum())
        assert torch.allclose(
            textspace.moment(backbone, {}, prompts, share),
            (features * weight[:, None]).T @ features,
            atol=1e-4,
        )


@pytest.mark.parametrize("kind", ["lora", "vera", "full"])
def test_factors_multiply_to_the_change(backbone: Backbone, kind: str) -> None:
    adapter = random_adapter(backbone, kind, 3)
    for layer, change in delta_weights(backbone, adapter).items():
        left, right = factored(layers_of(adapter)[layer], change.shape[1])
        assert torch.allclose(left @ right, change, atol=1e-6)


def test_ordinary_prompts_name_no_concept_and_concept_prompts_do(
    backbone: Backbone, checkpoint: Path, folders: dict[str, Path]
) -> None:
    pipeline.learn_concept(learn_request(checkpoint, folders, "V1", replace(QUICK, method="lora")))
    stack = stack_of(checkpoint)
    named, ordinary = (
        textspace.single_prompts(stack.records[0]),
        textspace.ordinary_prompts(["ball", "fish"]),
    )
    assert all(p.count("V1 ball") == 1 for p in named)
    assert "" in ordinary
    assert not any("V1" in p for p in ordinary)
    end = int(backbone.tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
    # some as long as users write them, none longer than the encoder reads
    for prompts in (named, ordinary):
        lengths = [backbone.tokenize(prompt, stack.tokens)[0].index(end) for prompt in prompts]
        assert sum(length > 25 for length in lengths) > len(prompts) / 20
        assert max(lengths) < backbone.tokenizer.model_max_length - 1


@pytest.mark.slow
def test_it_holds_the_earlier_concepts_and_the_empty_prompt(
    backbone: Backbone, checkpoint: Path, folders: dict[str, Path]
) -> None:
    """Some steps at a high rate, with and without the penalty: K and V of the first concept's and
    the empty prompt move less with it.
    """
    moved = {}
    for weight in (0.0, 30.0):
        chosen = replace(QUICK, method="lora", retention_weight=weight, steps=12, rate=0.01)
        stack_file = checkpoint.with_name(f"weight{weight}.concepts.safetensors")
        for token in ("V1", "V2"):
            pipeline.learn_concept(
                replace(learn_request(checkpoint, folders, token, chosen), stack=stack_file)
            )
        held = store.open_stack(stack_file)
        first = held.pool[held.records[0].id]
        sizes = {name: torch.tensor(1.0) for name in backbone.kv_layers}
        assert held.adapter
        moved[weight] = (
            float(
                textspace.drift(
                    held.adapter,
                    first,
                    textspace.moment(backbone, held.tokens, ["a photo of a V1 ball"]),
                    sizes,
                )
            ),
            float(
                textspace.drift(
                    held.adapter, None, textspace.moment(backbone, held.tokens, [""]), sizes
                )
            ),
        )
    assert moved[30.0][0] < moved[0.0][0] / 2
    assert moved[30.0][1] < moved[0.0][1] / 2


@pytest.mark.parametrize("kind", ["lora", "vera", "full"])
def test_each_concept_is_held_at_its_own_adapter(backbone: Backbone, kind: str) -> None:
    """Against the sum over concepts: between any two changes of K and V the penalty differs by what
    that sum does.
    """
    stack = store.ConceptStack(backbone.fingerprint, rank=4)
    for number, noun in enumerate(("ball", "fish", "mug"), start=1):
        word = backbone.word_start(noun, torch.Generator().manual_seed(number))
        record = store.ConceptRecord(
            f"{number}",
            f"V{number}",
            noun,
            "lora",
            3,
            10,
            0,
            [],
            [],
            "2026-01-01T00:00:00+00:00",
            0.1,
            "",
            {},
        )
        stack = stack.learned(record, word, random_adapter(backbone, kind, number))
    stack = targets.with_prompts(targets.PromptBank(backbone, stack.tokens), stack, ["cat"])
    assert stack.ordinary
    assert set(stack.ordinary.nouns) == {"ball", "fish", "mug", "cat"}
    plain = stack.ordinary.moment(language.LANGUAGE)
    goals = targets.targets_of(stack, targets.own_adapters(stack))
    settings = LearnSettings(retention_ordinary=0.5)
    held = targets.retention_penalty(backbone, plain, goals, settings, weight=2.0)
    ordinary = textspace.shrunk(plain)
    sizes = textspace.sizes(backbone, ordinary)

    def expected(factors: Adapter) -> float:
        own = [textspace.drift(factors, w.adapter, w.moment, sizes) for w in goals]
        return float(
            2.0
            * (
                targets.MAX_EARLIER_WEIGHT * torch.stack(own).mean()
                + 0.5 * textspace.drift(factors, None, ordinary, sizes)
            )
        )

    one, other = random_adapter(backbone, kind, 7), random_adapter(backbone, kind, 2)
    assert float(held(Step(one)) - held(Step(other))) == pytest.approx(
        expected(one) - expected(other), rel=0.02
    )
    assert abs(float(held(Step(one)) - held(Step(other)))) > 0.05 * expected(one)


def test_ordinary_prompts_have_the_weight_of_the_setting(backbone: Backbone) -> None:
    """Without an earlier concept they are all there is, so the penalty is in proportion."""
    penalties, factors = [], random_adapter(backbone, "lora", 4)
    for share in (1.0, 0.25):
        settings = replace(QUICK, method="retention", retention_ordinary=share)
        penalty = targets.retention_penalty(
            backbone,
            targets.PromptBank(backbone, {}).ordinary(["ball"]).moment(language.LANGUAGE),
            [],
            settings,
            weight=1.0,
        )
        penalties.append(float(penalty(Step(factors))))
    assert penalties[1] == pytest.approx(penalties[0] / 4, rel=1e-5)
    assert penalties[0] > 0


def test_behind_the_end_of_its_prompts_nothing_may_change(backbone: Backbone) -> None:
    """Prompt by prompt and position by position, for a word of three vectors; so the parts of a step
    add up to the step.
    """
    words = {"V1": backbone.word_start("mug", torch.Generator().manual_seed(0), 3)}
    held = targets.retention_penalty(
        backbone,
        targets.PromptBank(backbone, {}).ordinary(["mug"]).moment(language.LANGUAGE),
        [],
        LearnSettings(),
        weight=2.0,
    )
    prompts = {
        "a photo of a V1 mug": 1 + 4 + 3 + 1 + 1,
        "V1 mug on grass": 1 + 3 + 1 + 2 + 1,
        "red " * 90: 77,
    }
    features, own = (
        backbone.encode_prompts(list(prompts), words),
        random_adapter(backbone, "lora", 2),
    )
    drifts = []
    for rows, end in list(zip(features, prompts.values(), strict=True))[:2]:  # the last has none
        for layer, change in delta_weights(backbone, own).items():
            drifts.append((rows[end:] @ change.T).square().sum(1).mean() / held.sizes[layer])
    apart = textspace.PaddingPenalty(backbone, 0.5, held.sizes)
    whole = float(apart(Step(own, words, list(prompts), features)))
    assert whole == pytest.approx(0.5 * 2 / 3 * float(torch.stack(drifts).mean()), rel=1e-3)
    parts = [
        float(apart(Step(own, words, [prompt], features[number : number + 1])))
        for number, prompt in enumerate(prompts)
    ]
    assert sum(parts) / 3 == pytest.approx(whole, rel=1e-5)
    assert parts[2] == 0  # no padding


@pytest.mark.parametrize("rank", [4, 8])  # of what is frozen, which grows with every concept
def test_the_penalties_are_on_all_that_acts_a_frozen_lora_too(
    backbone: Backbone, rank: int
) -> None:
    own, frozen = random_adapter(backbone, "lora", 2), random_adapter(backbone, "lora", 3, rank)
    prompts = ["a photo of a V1 mug"]
    words = {"V1": backbone.word_start("mug", torch.Generator().manual_seed(0), 1)}
    features = backbone.encode_prompts(prompts, words)
    moment = textspace.moment(backbone, {}, ["", "a red ball on grass"])
    sizes = textspace.sizes(backbone, moment)
    apart = textspace.PaddingPenalty(backbone, 0.5, sizes)
    for anchor in ({}, frozen, random_adapter(backbone, "lora", 4)):
        for penalty in (textspace.RetentionPenalty(2.0, moment, anchor, sizes), apart):
            above = float(penalty(Step(own, words, prompts, features, frozen)))
            together = penalty(Step(joined(frozen, own), words, prompts, features))
            assert above == pytest.approx(float(together), rel=1e-5)
            assert above != pytest.approx(float(penalty(Step(own, words, prompts, features))))
    starts = {name: 0 * one if name.endswith(".B") else one for name, one in own.items()}
    held = textspace.RetentionPenalty(2.0, moment, frozen, sizes)
    assert float(held(Step(starts, frozen=frozen))) == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_learning_leaves_the_padding_alone(
    backbone: Backbone, checkpoint: Path, folders: dict[str, Path]
) -> None:
    """With the penalty the adapter does less to the padding of a prompt about two, beside what it
    does to the word.
    """
    shares = []
    for weight in (0.0, 30.0):
        stack_file = checkpoint.with_name(f"apart{weight}.concepts.safetensors")
        chosen = replace(
            QUICK, method="retention", vectors=4, retention_apart=weight, steps=12, rate=0.01
        )
        pipeline.learn_concept(
            replace(learn_request(checkpoint, folders, "V1", chosen), stack=stack_file)
        )
        stack = store.open_stack(stack_file)
        assert stack.adapter
        features = backbone.encode_prompts(
            ["a photo of a V1 ball and a red mug on grass"], stack.tokens
        )[0]
        word, padding = features[5 : 5 + len(stack.tokens["V1"])], features[-30:]
        changes = delta_weights(backbone, stack.adapter).values()
        shares.append(
            sum((padding @ c.T).square().mean() for c in changes)
            / sum((word @ c.T).square().mean() for c in changes)
        )
    assert shares[1] < 0.7 * shares[0]


def test_in_the_coordinates_of_a_moment_its_spread_is_the_root() -> None:
    features = (
        torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 8)
        + 3.0
    )
    moment = features.T @ features / len(features)
    space = textspace.coordinates(moment, ridge=0.0)
    before, turned = torch.linalg.eigvalsh(moment), torch.linalg.eigvalsh(space @ moment @ space)
    assert torch.allclose(turned / turned[-1], (before / before[-1]).sqrt(), rtol=0.05)
    # all but the largest direction keep their size
    assert turned[:-1].sum() == pytest.approx(float(before[:-1].sum()), rel=1e-3)
    assert torch.allclose(space, space.T)
    # the ridge bounds it where there is nothing
    two_directions = torch.diag(torch.tensor([1.0, 0.3, 0.0, 0.0]))
    flat = torch.linalg.eigvalsh(textspace.coordinates(two_directions, ridge=0.01))
    assert float(flat[-1] / flat[0]) == pytest.approx((1.001 / 0.001) ** 0.25, rel=1e-3)
    one_direction = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert textspace.coordinates(one_direction).isfinite().all()


def test_where_nothing_is_protected_it_learns_as_plain_lora(
    checkpoint: Path, folders: dict[str, Path]
) -> None:
    assert torch.equal(textspace.coordinates(torch.zeros(4, 4)), torch.eye(4))
    found = []
    for method in ("retention", "lora"):
        settings = replace(QUICK, method=method, retention_ordinary=0.0, rate=1e-3)
        stack_file = checkpoint.with_name(f"{method}.concepts.safetensors")
        request = learn_request(checkpoint, folders, "V1", settings)
        pipeline.learn_concept(replace(request, stack=stack_file))
        found.append(store.open_stack(stack_file).adapter or {})
    held, plain = found
    assert all(torch.allclose(one, plain[name], atol=1e-5) for name, one in held.items())


@pytest.mark.parametrize("times", [10, 50])
def test_a_start_token_with_a_long_feature_changes_no_other_direction(
    mini: Backbone, times: int
) -> None:
    """Encoders of SDXL have one."""
    prompts = textspace.ordinary_prompts(["mug"])[:64]
    moment = textspace.moment(mini, {}, prompts)
    start = mini.context(mini.encode_prompts([""])).float()[0, 0]
    longer = moment + (times**2 - 1) / 77 * torch.outer(start, start)
    across = torch.eye(len(start)) - torch.outer(start, start) / start.square().sum()
    plain, outlier = (across @ textspace.coordinates(m) @ across for m in (moment, longer))
    assert float(outlier.norm() / plain.norm()) == pytest.approx(1, abs=0.25)
    assert float(F.cosine_similarity(plain.flatten(), outlier.flatten(), 0)) > 0.98


@pytest.mark.slow
def test_an_adapter_is_drawn_and_learned_in_these_coordinates(
    checkpoint: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they leave out half of text space, so does A; without a hold in text space nothing is
    turned.
    """
    monkeypatch.setattr(
        base_method,
        "coordinates",
        lambda moment: torch.diag((torch.arange(len(moment)) % 2).float()),
    )
    for method, left_out in (("retention", True), ("lora", False)):
        stack_file = checkpoint.with_name(f"{method}.concepts.safetensors")
        pipeline.learn_concept(
            replace(
                learn_request(checkpoint, folders, "V1", replace(QUICK, method=method)),
                stack=stack_file,
            )
        )
        adapter = store.open_stack(stack_file).adapter
        assert adapter
        for name, tensor in adapter.items():
            if name.endswith("A"):
                assert bool((tensor[:, ::2] == 0).all()) is left_out
            assert tensor.abs().max() > 0
