"""The training loop that every stage of the mini-SD's recipe shares.

in: a model and its loss as a function of the step - out: the trained model, and in the run's folder
a snapshot to resume from and lines of log.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

# step -> the loss, and the parts of it to log
Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Run:
    """Where a stage reads and writes, and where it computes."""

    out: Path
    device: torch.device

    def log(self, **row: object) -> None:
        """Print a row, and append it to log.jsonl."""
        row = {"time": time.strftime("%H:%M:%S"), **row}
        print(json.dumps(row), flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, name: str, model: nn.Module) -> None:
        """Write a finished part, in the first process."""
        if rank():
            return
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, self.out / f"{name}.safetensors")

    def autocast(self) -> torch.autocast:
        """bfloat16, but on a CPU that would emulate it: three to ten times slower than float32."""
        emulated = self.device.type == "cpu" and not _multiplies_bfloat16()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not emulated)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it, which AVX-512 alone does not bring; where an older
    torch can't tell, AVX-512 counts.
    """
    if known := getattr(torch.cpu, "_is_avx512_bf16_supported", None):
        return known()
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def rank() -> int:
    """The rank of this process; 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def in_processes(train: Callable[[], None], count: int, folder: Path, seed: int) -> None:
    """Train in several one-thread processes that see different pictures and average their weights.

    This is faster than one process with several threads. They meet in a file in `folder`.
    """
    if count == 1:
        return train()
    (folder / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(_process, (train, count, folder, seed), count)


def _process(rank: int, train: Callable[[], None], count: int, folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # every process starts from the same weights
    rendezvous = f"file://{(folder / 'rendezvous').absolute()}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
    train()


def fit(
    run: Run,
    name: str,
    model: nn.Module,
    loss: Loss,
    *,
    steps: int,
    rate: float,
    ema: float = 0.0,
    average_every: int = 0,
    snapshot_every: int = 250,
    weight_decay: float = 0.01,
) -> None:
    """Train `model` in place with AdamW, from its snapshot if there is one.

    With `ema`, the decay of an exponential moving average of the parameters, the model ends with
    that average. Several processes (torch.distributed is initialised) average their parameters every
    `average_every` steps.
    """
    model = model.to(run.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
    )
    snapshot = run.out / f"{name}.snapshot.pt"
    step, averaged = _resume(snapshot, model, optimizer, run.device)
    if ema and averaged is None:
        averaged = [p.detach().clone() for p in model.parameters()]
    log = _Log(run, name, step, steps)
    model.train()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(step, steps)
        value, loss_parts = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if dist.is_initialized() and (step % average_every == 0 or step == steps):
            _average_over_processes(list(model.parameters()))
        if averaged is not None and step % 4 == 0:
            decay = min(ema, (1 + step) / (10 + step)) ** 4
            torch._foreach_lerp_(averaged, [p.detach() for p in model.parameters()], 1 - decay)
        log.add(step, {"loss": float(value.detach()), **loss_parts})
        if step % snapshot_every == 0:
            _save(snapshot, model, optimizer, step, averaged)
    _save(snapshot, model, optimizer, step, averaged)
    if averaged is not None:
        with torch.no_grad():
            for parameter, average in zip(model.parameters(), averaged, strict=True):
                parameter.copy_(average)
    model.to("cpu").eval()


def _schedule(step: int, steps: int) -> float:
    """Warm-up over 100 steps, constant, linear decay over the last two fifths."""
    return min((step + 1) / 100, 1.0, max(0.02, (steps - step) / (0.4 * steps)))


class _Log:
    """The means of the losses over every 100 steps, written by the first process."""

    def __init__(self, run: Run, stage: str, first: int, steps: int) -> None:
        self.run, self.stage, self.first, self.steps = run, stage, first, steps
        self.started = time.time()
        self.values: dict[str, list[float]] = {}

    def add(self, step: int, losses: dict[str, float]) -> None:
        for key, value in losses.items():
            self.values.setdefault(key, []).append(value)
        if step % 100 == 0 and rank() == 0:
            means = {key: round(float(np.mean(v)), 4) for key, v in self.values.items()}
            pace = round((time.time() - self.started) / (step - self.first), 3)
            self.run.log(stage=self.stage, step=step, of=self.steps, **means, seconds_per_step=pace)
            self.values = {}


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, list[Tensor] | None]:
    """Load the snapshot; its step and averaged parameters, or 0 and None if there is none."""
    if not path.exists():
        return 0, None
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["averaged"]


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    averaged: list[Tensor] | None,
) -> None:
    """Write the snapshot, in the first process."""
    if rank():
        return
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "averaged": averaged,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


@torch.no_grad()
def _average_over_processes(parameters: list[nn.Parameter]) -> None:
    """Give every process the mean of all processes' parameters."""
    flat = torch.cat([p.reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    means = (flat / dist.get_world_size()).split([p.numel() for p in parameters])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.copy_(mean.view(parameter.shape))
