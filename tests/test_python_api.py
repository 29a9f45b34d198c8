"""The Python API does what the command line does, by the same requests."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import comfy_continual_lora
from comfy_continual_lora import Cancelled, ContinualLora, ContinualLoraError, Progress
from comfy_continual_lora.operations import OPERATIONS


def test_learn_draw_and_export(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    sd = ContinualLora(checkpoint, device="cpu")
    reports: list[Progress] = []
    result = sd.learn(
        pictures, token="V1", noun="ball", method="lora", steps=2, on_progress=reports.append
    )
    assert len(result.losses) == 2
    assert any(report.stage == "learn" for report in reports)
    assert sd.learn(str(pictures), token="V1", noun="ball", method="lora", steps=2).again
    assert [one["token"] for one in sd.info().concepts] == ["V1"]
    one, other = sd.draw("a photo of a V1 ball", count=2, steps=1, seed=3)
    assert (one.seed, other.seed, one.prompt) == (3, 4, "a photo of a V1 ball")
    assert one.image.size == (128, 128)
    exported = sd.export(tmp_path / "loras")
    assert exported.lora is not None
    assert exported.lora.is_file()
    other = sd.export(tmp_path / "peft", format="peft")
    assert other.lora is not None
    names = load_file(other.lora / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in names)
    files = sorted(pictures.glob("*.png"))
    scored = sd.scores(files, trials=1)
    assert len(scored.images) == len(files)
    assert sd.evaluate(pictures=1, steps=1).names == ["V1 ball"]
    sd.run("forget", token="V1")
    assert not sd.info().concepts


def test_a_stack_elsewhere(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    sd = ContinualLora(str(checkpoint), stack=tmp_path / "other.safetensors", device="cpu")
    sd.learn(pictures, token="V1", noun="ball", method="textual_inversion", steps=1)
    assert (tmp_path / "other.safetensors").is_file()
    assert not ContinualLora(checkpoint).info().concepts


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_it_learns_where_the_caller_turned_gradients_off(
    checkpoint: Path, pictures: Path, without: Any
) -> None:
    """As notebooks do that only draw."""
    sd = ContinualLora(checkpoint, device="cpu")
    with without():
        for token, method in (("V1", "lora_ewc"), ("V2", "retention")):
            settings = {"steps": 1, "batch": 1, "fisher_samples": 1}
            sd.learn(pictures, token=token, noun="ball", method=method, **settings)
        assert not torch.is_grad_enabled()
    assert [one["token"] for one in sd.info().concepts] == ["V1", "V2"]


def test_cancelling_keeps_what_was_learned(checkpoint: Path, pictures: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "learn" and progress.step == 2:
            raise Cancelled("enough")

    sd = ContinualLora(checkpoint, device="cpu")
    given = {"token": "V1", "noun": "ball", "method": "lora", "steps": 3}
    with pytest.raises(Cancelled):
        sd.learn(pictures, on_progress=stop, **given)
    assert not sd.info().concepts
    notes: list[str] = []
    sd.learn(pictures, on_progress=lambda progress: notes.append(progress.note), **given)
    assert any("step 2" in note for note in notes)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda sd: sd.learn("nowhere", token="V1", noun="ball"), "nowhere"),
        (lambda sd: sd.learn("nowhere", token="V1", noun="ball", step=3), "step"),
        (lambda sd: sd.learn("nowhere", token="V1", noun="ball", steps="3"), "steps"),
        (lambda sd: sd.learn([], token="V1", noun="ball"), "images|pictures"),
        (lambda sd: sd.learn(3, token="V1", noun="ball"), "images"),
        (lambda sd: sd.draw([]), "prompts"),
        (lambda sd: sd.draw("a ball", only="V1"), "only"),
        (lambda sd: sd.run("teach"), "teach"),
        (lambda sd: sd.run("forget"), "token"),
        (lambda sd: sd.run("forget", token="V1", noun="ball"), "noun"),
    ],
)
def test_a_bad_call_is_refused_by_name(checkpoint: Path, call, said: str) -> None:
    with pytest.raises(ContinualLoraError, match=said):
        call(ContinualLora(checkpoint, device="cpu"))


def test_every_spelled_out_argument_is_a_field_of_the_request() -> None:
    for name, method in inspect.getmembers(ContinualLora, inspect.isfunction):
        if name not in OPERATIONS:
            continue
        own = set(inspect.signature(method).parameters) - {"self", "on_progress", "settings"}
        assert own <= OPERATIONS[name].request.__dataclass_fields__.keys(), name


def test_public_names_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, comfy_continual_lora as package; "
        "assert not {'torch', 'comfy_continual_lora.errors'} & set(sys.modules); "
        "[getattr(package, name) for name in package.__all__]; "
        "assert set(package.__all__) < set(dir(package)); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    with pytest.raises(AttributeError, match="nothing"):
        _ = comfy_continual_lora.nothing
