"""Adding a method and an adapter kind touches what CONTRIBUTING says and nothing else; and every
pair of methods and adapters either learns a second concept or is refused before anything is loaded.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_learn import NOUNS, QUICK, learn_request, stack_of
from safetensors.torch import load_file
from torch import Tensor

from comfy_continual_lora import pipeline, presets, requests, store
from comfy_continual_lora.adapters import PARTS
from comfy_continual_lora.adapters.adapter import KINDS, delta_weights, kind_of
from comfy_continual_lora.adapters.kind import AdapterKind
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.errors import SettingError
from comfy_continual_lora.methods import METHODS
from comfy_continual_lora.methods.method import Method
from comfy_continual_lora.penalty import Penalty, Step
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import DrawSettings


class Small(Method):
    """A toy: what is learned stays small."""

    id = "small"

    def penalties(self, session: Any, settings: Any, held: Any) -> dict[str, Penalty]:
        return {"size": self.size, **super().penalties(session, settings, held)}

    @staticmethod
    def size(step: Step) -> Tensor:
        return 1e3 * torch.stack([f.square().sum() for f in step.factors.values()]).sum()


class Pair(AdapterKind):
    """A toy: delta = p q^T."""

    name = "pair"

    def create(
        self,
        out: int,
        width: int,
        rank: int,
        generator: torch.Generator,
        preconditioner: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return {"p": torch.zeros(out), "q": torch.randn(width, generator=generator)}

    def factors(self, parts: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
        return parts["p"][:, None], parts["q"][None]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The two, in the tables where a real one would stand."""
    monkeypatch.setitem(METHODS, "small", Small())
    monkeypatch.setitem(KINDS, "pair", Pair())
    monkeypatch.setitem(PARTS, "pair", {"p": ("out",), "q": ("width",)})
    presets.METHODS.append("small")
    presets.ADAPTERS.append("pair")
    yield
    presets.METHODS.remove("small")
    presets.ADAPTERS.remove("pair")


@pytest.mark.usefixtures("toys")
def test_a_method_of_a_few_lines_learns(checkpoint: Path, folders: dict[str, Path]) -> None:
    terms: list[dict[str, float]] = []
    quick = replace(QUICK, method="small", steps=6, rate=1e-2)
    for token in ("V1", "V2"):
        request = learn_request(checkpoint, folders, token, quick)
        pipeline.learn_concept(request, lambda progress: terms.append(progress.parts))
    ours = stack_of(checkpoint)
    assert [record.method for record in ours.records] == ["small", "small"]
    assert {"denoising", "size"} in [set(parts) for parts in terms]
    plain = Path(shutil.copy(checkpoint, checkpoint.with_name("plain.safetensors")))
    pipeline.learn_concept(learn_request(plain, folders, "V1", replace(quick, method="lora")))
    theirs = stack_of(plain)
    assert ours.adapter
    assert theirs.adapter
    size = [sum(float(t.square().sum()) for t in one.adapter.values()) for one in (ours, theirs)]  # type: ignore[union-attr]
    assert size[0] < size[1]


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("method", ["lora", "lora_dsc_ewc_dc"])
def test_an_adapter_kind_of_a_few_lines_learns_is_stored_drawn_and_exported(
    checkpoint: Path, folders: dict[str, Path], backbone: Backbone, tmp_path: Path, method: str
) -> None:
    quick = replace(QUICK, method=method, adapter="pair", rate=1e-2)
    for token in ("V1", "V2"):
        assert pipeline.plan(learn_request(checkpoint, folders, token, quick)).learned > 0
        pipeline.learn_concept(learn_request(checkpoint, folders, token, quick))
    stack = stack_of(checkpoint)
    assert stack.adapter
    assert kind_of(stack.adapter).name == "pair"
    drawing = requests.DrawRequest(
        checkpoint, ["a V1 ball"], DrawSettings(steps=1, size=64), device="cpu"
    )
    assert len(pipeline.draw(drawing).pictures) == 1
    lora = pipeline.export(requests.ExportRequest(checkpoint, tmp_path / "out")).lora
    assert lora
    tensors = load_file(lora)
    for layer, change in delta_weights(backbone, stack.adapter).items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        product = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        assert torch.allclose(product.float(), change, atol=2e-3)
    assert pipeline.undo(requests.UndoRequest(checkpoint)).tokens == ["V1"]


@pytest.mark.usefixtures("toys")
def test_what_can_not_be_solved_for_is_refused_by_the_methods_that_solve(
    checkpoint: Path, folders: dict[str, Path]
) -> None:
    with pytest.raises(SettingError, match="retention can't learn with the adapter pair"):
        pipeline.learn_concept(
            learn_request(
                checkpoint, folders, "V1", replace(QUICK, method="retention", adapter="pair")
            )
        )


# --- every pair ----------------------------------------------------------------------------------

CHOICES = {
    f"{method} {adapter}": replace(QUICK, method=method, adapter=adapter, steps=1, dsc_steps=1)
    for method, adapter in itertools.product(presets.METHODS, presets.ADAPTERS)
} | {"c_lora published": replace(QUICK, method="c_lora", c_lora_variant="published", steps=1)}
# what a stack can hold when a second concept comes
FIRST = (
    "textual_inversion lora",
    "custom_diffusion lora",
    "lora lora",
    "lora_dsc_ewc_dc lora",
    "lora_ewc vera",
    "retention lora",
    "c_lora published",
)


def _outcome(checkpoint: Path, folders: dict[str, Path], token: str, choice: str) -> str:
    """ "learned", or the error that came before the checkpoint was loaded."""
    seen: list[Progress] = []
    before = stack_of(checkpoint).records if store.stack_path(checkpoint).exists() else []
    try:
        request = learn_request(checkpoint, folders, token, CHOICES[choice])
        pipeline.learn_concept(request, seen.append)
    except SettingError as error:
        assert not seen
        assert not before or stack_of(checkpoint).records == before
        return str(error)
    assert len(stack_of(checkpoint).records) == len(before) + 1
    return "learned"


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if not method.takes("vera")]
)
def test_a_first_concept_is_refused_before_anything_is_loaded(
    checkpoint: Path, folders: dict[str, Path], method: str
) -> None:
    """Those that are not refused learn in test_methods."""
    outcome = _outcome(checkpoint, folders, "V1", f"{method} vera")
    assert f"{method} can't learn with the adapter vera" in outcome


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_a_second_concept_is_learned_or_refused(
    learned: Callable[..., Path], folders: dict[str, Path], tmp_path: Path, first: str
) -> None:
    """And a third, by the default method, where that goes with the stack."""
    start = learned(CHOICES[first], "V1")
    outcomes: dict[str, str] = {}
    for choice in CHOICES:
        own = Path(shutil.copy(start, tmp_path / "own.safetensors"))
        shutil.copy(store.stack_path(start), store.stack_path(own))
        outcomes[choice] = _outcome(own, folders, "V2", choice)
        if outcomes[choice] == "learned":
            _outcome(own, folders, "V3", "retention lora")
        shutil.rmtree(store.stack_path(own).with_name("own.concepts.history"), ignore_errors=True)
    adapter = stack_of(start).adapter
    kind = kind_of(adapter).name if adapter else ""
    unprotected = bool(kind) and not stack_of(start).fishers
    for choice, outcome in outcomes.items():
        settings = CHOICES[choice]
        method = METHODS[settings.method]
        wanted = method.adapter_kind(settings)
        if not method.takes(settings.adapter) or (kind and wanted and wanted != kind):
            assert outcome != "learned", choice
        elif unprotected and getattr(method, "only_ewc", False):
            assert "has none of V1" in outcome or first == "c_lora published", (choice, outcome)
        elif first != "c_lora published":
            assert outcome == "learned", (choice, outcome)
    assert len(NOUNS) == 3
