"""Stage 4: per-sample gradients without a loop equal the loop's; the Fisher is right where it is
known; EWC equals a second implementation.
"""

from __future__ import annotations

from math import sqrt
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comfy_continual_lora import fisher as fishers
from comfy_continual_lora.adapters.adapter import (
    KINDS,
    Adapter,
    ChangedLayer,
    attached,
    new_adapter,
)
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.diffusion import generator_for
from comfy_continual_lora.errors import TrainingError
from comfy_continual_lora.ewc import Ewc, ewc, ewc_penalty
from comfy_continual_lora.lossscale import LossScale
from comfy_continual_lora.penalty import Step
from comfy_continual_lora.progress import ignore
from comfy_continual_lora.settings import LearnSettings
from comfy_continual_lora.stack import ConceptStack

SETTINGS = LearnSettings(batch=6, fisher_samples=4).resolved("mini")


def _adapter(backbone: Backbone, kind: str = "lora") -> Adapter:
    generator = torch.Generator().manual_seed(3)
    return {
        name: t + torch.randn(t.shape, generator=generator) * 0.05
        for name, t in new_adapter(backbone, 4, generator, kind).items()
    }


def _target(tau: float | None, n: int = 4) -> fishers.FisherInputs:
    latents = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return fishers.FisherInputs(latents, "red mug", "mug", ["blue star", "cat"], tau)


def _by_loop(
    backbone: Backbone, factors: dict, target: fishers.FisherInputs, numbers: list[tuple[int, int]]
) -> dict[str, Tensor]:
    """Reference: gradients of one sample's loss after the other through autograd, squared,
    averaged.
    """
    text, total, count = FrozenText(backbone, {}), {}, 0
    for number, n in numbers:
        for sample in range(n):
            loss = fishers._loss_of_batch(
                backbone,
                target,
                text,
                SETTINGS.subset,
                n,
                generator_for(SETTINGS.seed, "fisher", number),
            )
            gradients = torch.autograd.grad(loss()[sample], list(factors.values()))
            total = {
                name: total.get(name, 0) + g.square()
                for name, g in zip(factors, gradients, strict=True)
            }
            count += 1
    return {name: t / count for name, t in total.items()}


@pytest.mark.parametrize("tau", [None, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_equal_the_loop(backbone: Backbone, kind: str, tau: float | None) -> None:
    target = _target(tau)
    # with scores four prompts per sample: a batch of six rows holds one sample
    numbers = [(0, 4)] if tau is None else [(0, 1), (1, 1), (2, 1), (3, 1)]
    with attached(backbone, _adapter(backbone, kind), trainable=True) as factors:
        by_hooks = fishers.fisher(
            backbone, factors, target, FrozenText(backbone, {}), SETTINGS, ignore
        )
        expected = _by_loop(backbone, factors, target, numbers)
    mean = torch.cat([t.flatten() for t in expected.values()]).mean()
    assert torch.cat([t.flatten() for t in by_hooks.values()]).mean() == pytest.approx(1, rel=1e-5)
    for name, value in expected.items():
        assert torch.allclose(by_hooks[name], value / mean, rtol=1e-3, atol=1e-4), name


def test_several_samples_with_several_prompts_each(backbone: Backbone) -> None:
    target, text = _target(0.01), FrozenText(backbone, {})
    with attached(backbone, _adapter(backbone), trainable=True) as factors:
        loss = fishers._loss_of_batch(backbone, target, text, 4, 3, generator_for(1))
        per_sample = {
            f"{layer}.{k}": g
            for layer, parts in fishers.per_sample_gradients(backbone, factors, loss, 3)
            for k, g in parts.items()
        }
        for sample in range(3):
            expected = torch.autograd.grad(loss()[sample], list(factors.values()))
            for name, value in zip(factors, expected, strict=True):
                assert torch.allclose(
                    per_sample[name][sample], value, rtol=1e-3, atol=1e-4 * float(value.abs().max())
                ), (name, sample)


def test_the_fisher_of_two_is_the_mean_of_the_two(backbone: Backbone) -> None:
    target, text = _target(None, n=1), FrozenText(backbone, {})
    with attached(backbone, _adapter(backbone), trainable=True) as factors:
        losses = fishers._loss_of_batch(backbone, target, text, 2, 2, generator_for(7))
        both = {
            f"{a}.{k}": g
            for a, p in fishers.per_sample_gradients(backbone, factors, losses, 2)
            for k, g in p.items()
        }
        mean_gradient = torch.autograd.grad(losses().mean(), list(factors.values()))
    first = {name: g[:1].square().mean(0) for name, g in both.items()}
    second = {name: g[1:].square().mean(0) for name, g in both.items()}
    for name, g in both.items():
        assert torch.allclose(g.square().mean(0), (first[name] + second[name]) / 2)
    classic_error = {name: g.square() for name, g in zip(factors, mean_gradient, strict=True)}
    assert any(
        not torch.allclose(both[n].square().mean(0), classic_error[n], rtol=0.1) for n in both
    )


def test_gradient_checkpointing_gives_the_same_fisher(backbone: Backbone) -> None:
    fishers_of = []
    for checkpointing in (False, True):
        with attached(backbone, _adapter(backbone), trainable=True) as factors:
            if checkpointing:
                backbone.unet.enable_gradient_checkpointing()
                backbone.unet.train()
            try:
                fishers_of.append(
                    fishers.fisher(
                        backbone, factors, _target(0.01), FrozenText(backbone, {}), SETTINGS, ignore
                    )
                )
            finally:
                backbone.unet.disable_gradient_checkpointing()
                backbone.unet.eval()
    assert all(
        torch.allclose(fishers_of[0][name], t, rtol=1e-3, atol=1e-4)
        for name, t in fishers_of[1].items()
    )


def test_a_linear_gaussian_model_in_closed_form() -> None:
    """y = W c + noise of unit variance: the Fisher of W_ij is c_j^2, whatever W."""
    generator, n = torch.Generator().manual_seed(0), 20_000
    base = nn.Linear(3, 2, bias=False)
    layer = ChangedLayer(base, {"D": nn.Parameter(torch.zeros(2, 3))}, KINDS["full"])
    toy = SimpleNamespace(unet=nn.ModuleDict({"k": layer}))
    toy.unet.dtype = torch.float32
    c = torch.tensor([0.5, -1.0, 2.0])
    y = base(c).detach() + torch.randn(n, 2, generator=generator)

    def loss() -> Tensor:
        return (layer(c.expand(n, 1, 3)).squeeze(1) - y).square().sum(1) / 2

    factors = {"k.D": layer.parts["D"]}
    ((_, gradients),) = list(fishers.per_sample_gradients(toy, factors, loss, n))  # type: ignore[arg-type]
    assert torch.allclose(gradients["D"].square().mean(0), c.square().expand(2, 3), rtol=0.05)


def test_gradients_that_overflow_in_fp16_are_taken_again_at_a_smaller_scale() -> None:
    layer = ChangedLayer(
        nn.Linear(3, 2, bias=False), {"D": nn.Parameter(torch.zeros(2, 3))}, KINDS["full"]
    )
    toy: Any = SimpleNamespace(unet=nn.ModuleDict({"k": layer}))

    def loss() -> Tensor:
        outputs = layer(torch.ones(4, 1, 3)).squeeze(1)
        return (outputs.half() * 200).float().sum(1)

    factors, scale = {"k.D": layer.parts["D"]}, LossScale(torch.float16)
    ((_, gradients),) = list(fishers.per_sample_gradients(toy, factors, loss, 4, scale))
    assert scale.value == 256
    assert torch.equal(gradients["D"], torch.full((4, 2, 3), 200.0))
    with pytest.raises(TrainingError, match="gradients became infinite"):
        list(fishers.per_sample_gradients(toy, factors, lambda: loss() * float("nan"), 4, scale))


def test_eigenvalues_from_the_gram_matrix(backbone: Backbone) -> None:
    g = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    whole = torch.linalg.eigvalsh(g.T @ g / 5).flip(0)
    assert torch.allclose(fishers.top_eigenvalues(g, 3), whole[:3], rtol=1e-4)
    layer = next(iter(backbone.kv_layers))
    with attached(backbone, _adapter(backbone), trainable=True) as factors:
        eigenvalues = fishers.spectrum(
            backbone, factors, _target(None), FrozenText(backbone, {}), SETTINGS, [layer], 4
        )
    assert eigenvalues[layer].shape == (4,)
    assert (eigenvalues[layer].diff() <= 0).all()


# --- EWC
# --------------------------------------------------------------------------------------------------


def test_the_penalty_is_zero_and_flat_at_its_anchor() -> None:
    theta = {"l.A": torch.ones(2, 3, requires_grad=True)}
    penalty = ewc_penalty(theta, {"l.A": torch.ones(2, 3)}, {"l.A": torch.rand(2, 3)})
    penalty.backward()
    assert penalty == 0
    assert theta["l.A"].grad is not None
    assert theta["l.A"].grad.abs().max() == 0


def _stack(adapters: list[Adapter], importances: list[Adapter]) -> ConceptStack:
    stack = ConceptStack("f")
    for i, (adapter, importance) in enumerate(zip(adapters, importances, strict=True)):
        stack.fishers[f"id{i}"] = importance
        record: Any = SimpleNamespace(id=f"id{i}", token=f"V{i}", settings={})
        stack = stack.learned(record, torch.zeros(1), adapter)
    return stack


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_online_and_separate_by_hand(space: str) -> None:
    def adapter(value: float) -> Adapter:
        return {"l.A": torch.full((1, 1), value), "l.B": torch.ones(1, 1)}

    def importance(value: float) -> Adapter:
        return (
            {"l.A": torch.full((1, 1), value), "l.B": torch.zeros(1, 1)}
            if space == "factors"
            else {"l.W": torch.full((1, 1), value)}
        )

    stack = _stack([adapter(1.0), adapter(2.0)], [importance(3.0), importance(5.0)])
    settings = LearnSettings(ewc_strength=0.1, ewc_decay=0.5)
    online = ewc(stack, settings, torch.device("cpu"))
    separate = ewc(stack, LearnSettings(ewc_strength=0.1, ewc_mode="separate"), torch.device("cpu"))
    assert isinstance(online, Ewc)
    assert isinstance(separate, Ewc)
    at = adapter(4.0)
    strength = 0.1 / sqrt(2 if space == "factors" else 1)  # as many parameters
    assert float(online(Step(at))) == pytest.approx(strength * (5 + 0.5 * 3) * (4 - 2) ** 2)
    in_all = 3 * (4 - 1) ** 2 + 5 * (4 - 2) ** 2
    assert float(separate(Step(at))) == pytest.approx(strength * in_all)
    assert ewc(ConceptStack("f"), settings, torch.device("cpu")) is None


def test_concepts_measured_in_different_spaces_are_each_held_in_their_own() -> None:
    """The LoRA has 3 numbers in its factors and 2 in its delta, which is A times B."""

    def adapter(value: float) -> Adapter:
        return {"l.A": torch.full((1, 2), value), "l.B": torch.full((1, 1), 3.0)}

    def of_factors(value: float) -> Adapter:
        return {"l.A": torch.full((1, 2), value), "l.B": torch.zeros(1, 1)}

    def of_delta(value: float) -> Adapter:
        return {"l.W": torch.full((1, 2), value)}

    fishers = [of_factors(5.0), of_delta(7.0), of_delta(11.0), of_factors(13.0)]
    at, moved, device = [1.0, 2.0, 4.0, 7.0], 12.0, torch.device("cpu")
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [2, 1, 0], [0, 1]):
        stack = _stack([adapter(at[i]) for i in order], [fishers[i] for i in order])
        online = ewc(stack, LearnSettings(ewc_strength=0.1, ewc_decay=0.5), device)
        separate = ewc(stack, LearnSettings(ewc_strength=0.1, ewc_mode="separate"), device)
        assert online
        assert separate
        wanted = {"online": 0.0, "separate": 0.0}
        for age, i in enumerate(reversed(order)):
            importance = float(next(iter(fishers[i].values()))[0, 0])
            scale = 3**2 / sqrt(2) if "l.W" in fishers[i] else 1 / sqrt(3)
            each = 0.1 * 2 * importance * scale  # two numbers differ
            wanted["online"] += 0.5**age * each * (moved - at[order[-1]]) ** 2
            wanted["separate"] += each * (moved - at[i]) ** 2
        assert float(online(Step(adapter(moved)))) == pytest.approx(wanted["online"])
        assert float(separate(Step(adapter(moved)))) == pytest.approx(wanted["separate"])


def test_ewc_equals_avalanches_formula_on_a_small_net() -> None:
    """Avalanche: importances += grad^2 for every batch (here of one), / batches; penalty = sum imp
    (param - saved)^2; loss += lambda penalty.
    """
    torch.manual_seed(0)
    base, x, y = nn.Linear(4, 3, bias=False), torch.randn(7, 1, 4), torch.randn(7, 3)
    layer = ChangedLayer(base, {"D": nn.Parameter(0.1 * torch.randn(3, 4))}, KINDS["full"])
    toy = SimpleNamespace(unet=nn.ModuleDict({"k": layer}))
    toy.unet.dtype = torch.float32

    def loss() -> Tensor:
        return (torch.tanh(layer(x)).squeeze(1) - y).square().mean(1)

    ((_, gradients),) = list(fishers.per_sample_gradients(toy, {"k.D": layer.parts["D"]}, loss, 7))  # type: ignore[arg-type]
    ours = gradients["D"].square().mean(0)

    weight = nn.Parameter((base.weight + layer.parts["D"]).detach().clone())
    importances = torch.zeros_like(weight)
    for i in range(len(x)):
        weight.grad = None
        (torch.tanh(x[i] @ weight.T) - y[i]).square().mean().backward()
        assert weight.grad is not None
        importances += weight.grad.clone().pow(2)
    importances /= len(x)
    assert torch.allclose(ours, importances, rtol=1e-4)
    saved, moved = weight.detach().clone(), weight.detach() + 0.3
    avalanche = 2.5 * (importances * (moved - saved).pow(2)).sum()
    assert torch.allclose(
        Ewc(2.5, [({"k.D": saved}, {"k.D": ours})])(Step({"k.D": moved})), avalanche, rtol=1e-4
    )
