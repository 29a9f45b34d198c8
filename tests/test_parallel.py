"""A batch taken in parts, one after the other or by several processes, is the same batch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfy_continual_lora import parallel, pipeline, requests, store
from comfy_continual_lora.adapters.adapter import Adapter
from comfy_continual_lora.errors import SettingError, TrainingError
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.session import explain_oom
from comfy_continual_lora.settings import LearnSettings

ROOT = Path(__file__).parents[1]
# `retention` has a penalty and `lora_dsc_ewc_dc` consolidates: both are taken in parts too
QUICK = LearnSettings(
    method="lora",
    steps=4,
    batch=5,
    rank=4,
    size=64,
    dsc_steps=2,
    fisher_samples=4,
    snapshot_every=2,
)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize(("accumulate", "count"), [(1, 1), (3, 1), (2, 2), (8, 3)])
def test_shares_are_the_whole_once(
    monkeypatch: pytest.MonkeyPatch, n: int, accumulate: int, count: int
) -> None:
    values, seen, mean = torch.arange(n) + 1.0, [], 0.0
    for number in range(count):
        monkeypatch.setattr(parallel, "rank_and_world_size", lambda number=number: (number, count))
        for rows, weight in parallel.shares(n, accumulate):
            seen += values[rows].tolist()
            mean += weight * float(values[rows].mean()) / count
    assert sorted(seen) == values.tolist()
    assert mean == pytest.approx(float(values.mean()))


def _learned(
    checkpoint: Path, folder: Path, settings: LearnSettings, token: str
) -> tuple[list[float], Adapter]:
    done = pipeline.learn_concept(
        requests.LearnRequest(checkpoint, folder, token, "ball", settings, device="cpu")
    )
    adapter = store.open_stack(done.stack_file).adapter
    assert adapter
    return done.losses, adapter


def _apart(first: Adapter, second: Adapter) -> float:
    """How far B, which starts at zero, differs as a whole.

    Single numbers say little: AdamW steps as far for a small gradient.
    """
    b, other = (
        torch.cat([t.flatten() for name, t in sorted(adapter.items()) if name.endswith(".B")])
        for adapter in (first, second)
    )
    return float((b - other).norm() / other.norm())


@pytest.mark.parametrize("method", ["lora", pytest.param("retention", marks=pytest.mark.slow)])
def test_accumulating_parts_is_one_batch(
    checkpoint: Path, folders: dict[str, Path], method: str
) -> None:
    settings, found = replace(QUICK, method=method), []
    for accumulate in (1, 2, 5):
        found.append(
            _learned(checkpoint, folders["V1"], replace(settings, accumulate=accumulate), "V1")
        )
        pipeline.undo(requests.UndoRequest(checkpoint))
    for losses, adapter in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-4)
        assert _apart(adapter, found[0][1]) < 0.02
    losses, adapter = _learned(checkpoint, folders["V1"], replace(settings, batch=2), "V1")
    assert losses != pytest.approx(found[0][0], rel=1e-3)
    assert _apart(adapter, found[0][1]) > 0.2


def test_a_fisher_of_accumulated_parts_is_that_of_whole_batches(
    checkpoint: Path, folders: dict[str, Path]
) -> None:
    settings = replace(QUICK, method="lora_ewc_dc", steps=1, batch=8, fisher_samples=7)
    found = []
    for accumulate in (1, 2):
        _learned(checkpoint, folders["V1"], replace(settings, accumulate=accumulate), "V1")
        (fisher,) = store.open_stack(store.stack_path(checkpoint)).fishers.values()
        found.append(torch.cat([t.flatten() for _, t in sorted(fisher.items())]))
        pipeline.undo(requests.UndoRequest(checkpoint))
    whole, in_parts = found
    assert (in_parts - whole).norm() < 0.01 * whole.norm()


def _launch(
    launcher: list[str], checkpoint: Path, folder: Path, token: str
) -> subprocess.CompletedProcess[str]:
    learn = [
        "learn",
        "--checkpoint",
        checkpoint,
        "--images",
        folder,
        "--token",
        token,
        "--noun",
        "ball",
        "--device",
        "cpu",
        "--json",
    ]
    given = {
        "steps": 4,
        "batch": 5,
        "rank": 4,
        "size": 64,
        "dsc-steps": 2,
        "fisher-samples": 4,
        "method": "lora_dsc_ewc_dc",
    }
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", "comfy_continual_lora", *map(str, [*learn, *flags])]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=environment
    )


LAUNCHERS = {
    "torchrun": [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    ],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_learn_what_one_does(
    checkpoint: Path, folders: dict[str, Path], tmp_path: Path, launcher: str
) -> None:
    """Two concepts with everything in between: learning, consolidation, Fisher."""
    if launcher == "accelerate" and importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    settings = replace(QUICK, method="lora_dsc_ewc_dc")
    alone = tmp_path / "alone" / checkpoint.name
    alone.parent.mkdir()
    alone.write_bytes(checkpoint.read_bytes())
    for token in ("V1", "V2"):
        _, wanted = _learned(alone, folders[token], settings, token)
        done = _launch(LAUNCHERS[launcher], checkpoint, folders[token], token)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"token"') == 1
    both = store.open_stack(store.stack_path(checkpoint))
    assert both.adapter
    assert _apart(both.adapter, wanted) < 0.02
    assert not list(checkpoint.parent.glob("*.snapshot"))


# --- memory runs out
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 9 bytes."
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "mps", "python"],
)
def test_too_little_memory_says_what_to_lower_and_the_run_goes_on_with_less(
    checkpoint: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from comfy_continual_lora import learn

    request = requests.LearnRequest(
        checkpoint, pictures, "V1", "ball", replace(QUICK, steps=5), device="cpu"
    )
    noised, calls = learn.noised, []

    def short(*args: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise error
        return noised(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(learn, "noised", short)
    with pytest.raises(
        TrainingError,
        match=r"Out of memory.*checkpointing.*accumulate.*precision.*batch.*resumes from its "
        r"snapshot",
    ):
        pipeline.learn_concept(request)
    assert not store.stack_path(checkpoint).exists()
    steps: list[Progress] = []
    less = replace(request, settings=replace(request.settings, checkpointing=True, accumulate=2))
    pipeline.learn_concept(less, lambda p: steps.append(p) if p.stage == "learn" else None)
    assert steps[0].step == 4


def test_nothing_is_to_be_lowered_that_is_as_low_as_it_gets(
    checkpoint: Path, pictures: Path
) -> None:
    least = replace(QUICK, checkpointing=True, accumulate=256, precision="fp8", size=64, batch=1)
    for settings, ways in (
        (replace(least, checkpointing=False), "turn on checkpointing"),
        (replace(least, batch=4, size=128), "reduce size, or reduce batch"),
        (least, "close other programs"),
    ):
        request = requests.LearnRequest(checkpoint, pictures, "V1", "ball", settings)
        with pytest.raises(TrainingError, match=f"To use less, {ways}. The"), explain_oom(request):
            raise MemoryError


def test_another_runtime_error_is_not_taken_for_it(
    checkpoint: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "comfy_continual_lora.learn.noised",
        lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not agree")),
    )
    with pytest.raises(RuntimeError, match="shapes do not agree"):
        pipeline.learn_concept(
            requests.LearnRequest(checkpoint, pictures, "V1", "ball", QUICK, device="cpu")
        )


def test_an_optimizer_that_is_not_there_is_named(
    checkpoint: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    request = requests.LearnRequest(
        checkpoint, pictures, "V1", "ball", replace(QUICK, optimizer="adamw8bit"), device="cpu"
    )
    with pytest.raises(SettingError, match="adamw8bit needs bitsandbytes"):
        pipeline.learn_concept(request)
