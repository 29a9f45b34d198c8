"""On a GPU: every method learns what it would on the CPU, in every number format; a run goes on
after a stop; nothing stays on the device.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_learn import NOUNS

from comfy_continual_lora import pipeline, requests, store
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.errors import Cancelled
from comfy_continual_lora.methods import METHODS
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import (
    DrawSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
QUICK = LearnSettings(
    steps=3,
    batch=3,
    rank=4,
    fisher_samples=4,
    dsc_steps=2,
    c_lora_weight=1.0,
    ewc_strength=10.0,
    warmup=1,
    precision="fp32",
)


def _learn(
    checkpoint: Path,
    folder: Path,
    token: str,
    settings: LearnSettings,
    device: str = "cuda",
    **more: object,
) -> pipeline.LearnResult:
    return pipeline.learn_concept(
        requests.LearnRequest(checkpoint, folder, token, NOUNS[token], settings, device=device),
        **more,
    )  # type: ignore[arg-type]


def _copy(checkpoint: Path, name: str) -> Path:
    return Path(shutil.copy(checkpoint, checkpoint.with_name(f"{name}.safetensors")))


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("method", METHODS)
def test_learns_what_the_cpu_learns(
    checkpoint: Path, folders: dict[str, Path], method: str
) -> None:
    by_device = {}
    for device in ("cpu", "cuda"):
        own = _copy(checkpoint, device)
        losses = [
            _learn(own, folders[token], token, replace(QUICK, method=method), device).losses
            for token in ("V1", "V2")
        ]
        by_device[device] = losses, store.open_stack(store.stack_path(own))
    for cpu, cuda in zip(by_device["cpu"][0], by_device["cuda"][0], strict=True):
        torch.testing.assert_close(torch.tensor(cuda), torch.tensor(cpu), rtol=1e-3, atol=1e-5)
    assert {
        t.device.type
        for t in (
            *by_device["cuda"][1].words.values(),
            *(by_device["cuda"][1].adapter or {}).values(),
        )
    } == {"cpu"}


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "fp8"},
        {"adapter": "vera"},
        {"checkpointing": True},
    ],
)
def test_learns_in_every_number_format(
    checkpoint: Path, folders: dict[str, Path], change: dict[str, object]
) -> None:
    settings = replace(QUICK, method="lora_ewc_dc", **change)  # type: ignore[arg-type]
    for token in ("V1", "V2"):
        done = _learn(checkpoint, folders[token], token, settings)
    exact = _copy(checkpoint, "exact")
    for token in ("V1", "V2"):
        wide = _learn(exact, folders[token], token, replace(settings, precision="fp32"))
    torch.testing.assert_close(
        torch.tensor(done.losses), torch.tensor(wide.losses), rtol=0.1, atol=0.01
    )


def test_goes_on_after_a_stop_as_if_there_had_been_none(
    checkpoint: Path, folders: dict[str, Path]
) -> None:
    whole = _learn(_copy(checkpoint, "whole"), folders["V1"], "V1", replace(QUICK, steps=6))

    def stop(progress: Progress) -> None:
        if progress.stage == "learn" and progress.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        _learn(checkpoint, folders["V1"], "V1", replace(QUICK, steps=6), on_progress=stop)
    resumed = _learn(checkpoint, folders["V1"], "V1", replace(QUICK, steps=6))
    torch.testing.assert_close(
        torch.tensor(resumed.losses), torch.tensor(whole.losses), rtol=1e-3, atol=1e-5
    )


def test_uses_changes_and_leaves_a_stack(
    checkpoint: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = _copy(checkpoint, "other")
    for token, file in (("V1", checkpoint), ("V2", checkpoint), ("V3", other)):
        _learn(file, folders[token], token, replace(QUICK, preview_every=2))
    scored = pipeline.dc_scores(
        requests.ScoreRequest(
            checkpoint, folders["V1"], settings=ScoreSettings(trials=4), device="cuda"
        )
    ).images
    on_cpu = pipeline.dc_scores(
        requests.ScoreRequest(
            checkpoint, folders["V1"], settings=ScoreSettings(trials=4), device="cpu"
        )
    ).images
    assert [one.scores.names for one in scored] == [one.scores.names for one in on_cpu]
    prompts = ["a photo of a V1 ball", ("a V1 ball", "a V2 fish")]
    for prompt in prompts:
        drawn = pipeline.draw(
            requests.DrawRequest(checkpoint, [prompt], DrawSettings(steps=2), device="cuda")
        ).pictures
        assert len(drawn[0].image.getcolors(1 << 20) or []) > 50
    assert pipeline.evaluate(
        requests.EvaluateRequest(
            checkpoint, settings=EvaluateSettings(pictures=2, steps=2, trials=2), device="cuda"
        )
    )
    request = requests.ConsolidateRequest(
        checkpoint, folders["V2"], replace(QUICK, dsc_steps=2), device="cuda"
    )
    pipeline.consolidate(request)
    solving = requests.SolveRequest(checkpoint, device="cuda")
    pipeline.consolidate_in_closed_form(solving)
    pipeline.merge(requests.MergeRequest(checkpoint, store.stack_path(other), device="cuda"))
    pipeline.forget(requests.ForgetRequest(checkpoint, "V1", device="cuda"))
    assert [record.token for record in store.open_stack(store.stack_path(checkpoint)).records] == [
        "V2",
        "V3",
    ]
    del scored, drawn
    assert torch.cuda.memory_allocated() < 2**26  # a work space of cuBLAS may stay


def test_the_unet_waits_in_main_memory_where_the_vae_has_no_room_beside_it(
    mini_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(mini_file, device="cuda")
    picture, encode = (
        torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)),
        backbone.vae.encode,
    )
    latent, where = backbone.encode_images([picture])[0], []

    def full(x: torch.Tensor) -> object:
        where.append(backbone.unet.device.type)
        if where[-1] == "cuda":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return encode(x)

    monkeypatch.setattr(backbone.vae, "encode", full)
    torch.testing.assert_close(backbone.encode_images([picture])[0], latent)
    assert where == ["cuda", "cpu"]
    assert backbone.unet.device.type == "cuda"
