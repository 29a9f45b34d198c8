"""Stage 3: the training loop, whatever is minimised: steps, gradients, snapshots.

Every draw is a function of (seed, step), so a run that resumes from its snapshot ends with the same
bits as an uninterrupted one.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checkpoint.backbone import Backbone
from .checkpoint.narrow import dtype_for, recast
from .errors import SettingError, TrainingError
from .files import replace, set_aside
from .lossscale import LossScale
from .parallel import average, is_first, shares
from .progress import OnProgress, Progress
from .settings import EXECUTION_SETTINGS, ResolvedSettings, TrainSettings
from .snapshot import DamagedSnapshot, Snapshot, identity, is_like, read_snapshot, write_snapshot

# A loss that grew by this factor is not noise
MOST_GROWTH = 10.0


@contextmanager
def compute_dtype(backbone: Backbone, settings: ResolvedSettings) -> Iterator[None]:
    """Convert the frozen net to the dtype of `settings`, which it keeps; inside the block, also use
    checkpointing, compilation and channels-last if set.

    Factors, optimizer and loss stay in float32. Checkpointing needs training mode; the net has no
    dropout.
    """
    recast(backbone.unet, dtype_for(settings.precision, backbone.device))
    if settings.checkpointing:
        backbone.unet.enable_gradient_checkpointing()
        backbone.unet.train()
    if settings.channels_last:
        nn.Module.to(backbone.unet, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if settings.compile:
        backbone.unet.compile()
    try:
        yield
    finally:
        backbone.unet._compiled_call_impl = None
        if settings.channels_last:
            nn.Module.to(backbone.unet, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        if settings.checkpointing:
            backbone.unet.disable_gradient_checkpointing()
            backbone.unet.eval()


class Watcher(Protocol):
    """Looks at a run, if it is to be watched (`learn`)."""

    @property
    def done(self) -> bool: ...
    def look(self, step: int, steps: int) -> str: ...
    def state(self) -> dict[str, Tensor]: ...
    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None: ...


class Run:
    """Parameters, optimizer, step and losses of one run, and their snapshot on disk."""

    def __init__(
        self,
        stage: str,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        settings: ResolvedSettings,
        steps: int,
        scale: LossScale,
        path: Path,
        asked: dict[str, Any],
    ) -> None:
        self.stage, self.settings = stage, settings
        self.parameters, self.optimizer = parameters, optimizer
        self.steps, self.scale, self.path = steps, scale, path
        self.asked, self.identity = asked, identity(asked)
        self.step, self.losses = 0, []
        self.between_steps = True  # parameters, optimizer and losses are of the same step
        self.watch: Watcher | None = None

    def train(
        self, terms: Callable[[int, slice], dict[str, Tensor]], n: int, on_progress: OnProgress
    ) -> None:
        """Resume from the snapshot and train to the last step, minimising the sum of
        `terms(step, rows)`, means over these of the step's n images.

        Whatever stops it between two steps, even running out of memory, leaves a snapshot. Errors:
        TrainingError if learning diverges.
        """
        note = self.resume()
        self._check_converging()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        started, first = time.monotonic(), self.step
        try:
            self._look()  # a run that stopped in the middle of one does it now
            while not self._is_over:
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * min(1.0, (self.step + 1) / max(1, self.settings.warmup))
                parts = self.update(terms, n)
                self._check_converging()
                seen = self._look()
                if self.step % self.settings.snapshot_every == 0 or self._is_over:
                    self.save()
                pace = (time.monotonic() - started) / (self.step - first)
                progress = Progress(
                    self.stage,
                    self.step,
                    self.steps,
                    self.losses[-1],
                    self.optimizer.param_groups[-1]["lr"],
                    pace * (self.steps - self.step),
                    parts if len(parts) > 1 else {},
                    note=" ".join(filter(None, [note, seen])),
                )
                note = ""
                on_progress(progress)
        except TrainingError:
            raise
        except BaseException:
            if self.between_steps:
                self.save()
            raise

    def update(self, terms: Callable[[int, slice], dict[str, Tensor]], n: int) -> dict[str, float]:
        """One optimizer step, in `settings.accumulate` parts one after the other; returns the terms
        of its loss.

        Gradients that overflow in fp16 leave the parameters as they are (`LossScale`). Errors:
        TrainingError for a loss or gradients that are not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        parameters = list(self.parameters.values())
        total, parts = 0.0, dict[str, float]()
        for rows, share in shares(n, self.settings.accumulate):
            means = terms(self.step, rows)
            loss = torch.stack(list(means.values())).sum()
            total += share * loss.item()
            if not math.isfinite(total):
                raise TrainingError(
                    f"The loss became {total} at step {self.step + 1}, so learning stopped; "
                    "nothing was stored. A lower `rate` or `precision` fp32 usually helps."
                )
            (loss * share * self.scale.value).backward()
            for name, mean in means.items():
                parts[name] = parts.get(name, 0.0) + share * float(mean.detach())
        for p in parameters:
            p.grad = None if p.grad is None else p.grad / self.scale.value
        total = average(parameters, total)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.between_steps = False
        if self.scale.fits(norm):
            self.optimizer.step()
        self.step += 1
        self.losses.append(total)
        self.between_steps = True
        return parts

    @property
    def _is_over(self) -> bool:
        return self.step >= self.steps or bool(self.watch and self.watch.done)

    def _look(self) -> str:
        return self.watch.look(self.step, self.steps) if self.watch else ""

    def _check_converging(self) -> None:
        """Errors: TrainingError if the loss is far above that of the first step, or of a net that
        predicts nothing, which is about 1.

        Judged by the mean of the last tenth of the steps, but of ten at least.
        """
        window = max(10, self.steps // 10)
        if self.step < min(window, self.steps) or not self.losses:
            return
        recent = self.losses[-window:]
        mean, most = sum(recent) / len(recent), MOST_GROWTH * max(1.0, self.losses[0])
        if mean > most:
            if is_first():
                self.path.unlink(missing_ok=True)  # the same run would diverge again
            raise TrainingError(
                f"Learning diverged: at step {self.step} the mean loss of {len(recent)} steps is "
                f"{mean:.3g}, while the first step's was {self.losses[0]:.3g}. Nothing was stored, "
                f"and the stack is unchanged. Use a lower `rate` (it was {self.settings.rate:g}) or "
                "leave it out."
            )

    def save(self) -> None:
        if not is_first():
            return
        scale = torch.tensor([self.scale.value, self.scale.steps], dtype=torch.float64)
        tensors = {"scale": scale}
        tensors |= {f"value.{name}": p.detach().cpu() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"state.{key}.{name}"] = (
                    value.cpu() if isinstance(value, Tensor) else torch.tensor(value)
                )
        if self.watch:
            tensors |= self.watch.state()
        try:
            write_snapshot(
                self.path, Snapshot(self.identity, self.step, self.losses, self.asked, tensors)
            )
        except OSError as error:
            raise TrainingError(
                f"The snapshot {self.path} can't be written ({error.strerror or error}): no room "
                f"or no permission there. It stopped at step {self.step}; the stored concepts are "
                "untouched. Free some space, then run the same again."
            ) from None

    def resume(self) -> str:
        """Load the snapshot if there is one of this run; returns a note for the user.

        One that is damaged, or of another run, is renamed to keep it. Errors: TrainingError for one
        that this user may not read.
        """
        if not self.path.exists():
            return ""
        try:
            snapshot = read_snapshot(self.path)
            if snapshot.identity != self.identity:
                other = self.path.with_name(f"{self.path.name}.{snapshot.identity[:12]}")
                return (
                    f"The snapshot found here is another run's, at step {snapshot.step}. It is now "
                    f"{self._moved(other).name}."
                )
            self._restore(snapshot)
        except OSError as error:
            raise TrainingError(
                f"The snapshot {self.path} can't be read ({error.strerror or error}), and starting "
                "from scratch would overwrite it. Make it readable, or move it away."
            ) from None
        except DamagedSnapshot as error:
            return (
                f"The snapshot {self.path.name} is damaged ({error}). It is now "
                f"{self._moved().name}, and the run starts from step 1."
            )
        return f"Resuming from step {self.step} of {self.steps}."

    def _moved(self, target: Path | None = None) -> Path:
        """Move the unusable snapshot (in one process only); returns its new path."""
        if is_first():
            if target is None:
                return set_aside(self.path)
            replace(self.path, target)
        return target or self.path

    def _restore(self, snapshot: Snapshot) -> None:
        """Errors: DamagedSnapshot, with nothing changed, if it does not fit this run."""
        tensors, states = snapshot.tensors, {}
        if not 0 <= snapshot.step <= self.steps:
            raise DamagedSnapshot("its step is not one of this run")
        for name, p in self.parameters.items():
            if not is_like(tensors.get(f"value.{name}"), p):
                raise DamagedSnapshot(f"its values of {name} do not fit this run")
            states[name] = _state_in(snapshot, name, p, self.optimizer)
        scale = LossScale.checked(tensors["scale"]) if "scale" in tensors else None
        if self.watch:
            self.watch.restore(tensors, snapshot.step)
        self.step, self.losses = snapshot.step, snapshot.losses
        if scale:
            self.scale.value, self.scale.steps = scale
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"value.{name}"])
                self.optimizer.state[p] = {
                    key: _as_it_was(key, value, p.device) for key, value in states[name].items()
                }


def _state_in(
    snapshot: Snapshot, name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimizer's state of a parameter; empty if it had made no step.

    Errors: DamagedSnapshot for one that this optimizer would not write.
    """
    like = nn.Parameter(torch.zeros_like(parameter))
    like.grad = torch.zeros_like(parameter)
    kind: Any = type(optimizer)
    fresh = kind([like])  # a step of its own shows what belongs to the state
    fresh.step()
    expected = fresh.state[like]
    given = {key: snapshot.tensors.get(f"state.{key}.{name}") for key in expected}
    state = {key: value for key, value in given.items() if value is not None}
    if not state:
        return {}
    fits = all(is_like(given[key], value) for key, value in expected.items())
    if not fits or not 0 <= state["step"] <= snapshot.step:
        raise DamagedSnapshot(f"its optimizer's state of {name} does not fit this run")
    if "exp_avg_sq" in state and (state["exp_avg_sq"] < 0).any():  # a mean of squares
        raise DamagedSnapshot(f"its optimizer's state of {name} is below 0")
    return state


def _as_it_was(name: str, value: Tensor, device: torch.device) -> Tensor | int:
    """A value of the optimizer's state from a snapshot: AdamW counts steps in a tensor on the CPU,
    bitsandbytes in an int.
    """
    if name != "step":
        return value.to(device)
    return value if value.is_floating_point() else int(value)


def optimizer_for(
    groups: list[dict[str, Any]], settings: ResolvedSettings
) -> torch.optim.Optimizer:
    """Errors: SettingError as `check_optimizer`."""
    return (_adamw_8bit() if settings.optimizer == "adamw8bit" else torch.optim.AdamW)(groups)


def check_optimizer(settings: TrainSettings) -> None:
    """Errors: SettingError if bitsandbytes is chosen and missing."""
    if settings.optimizer == "adamw8bit":
        _adamw_8bit()


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SettingError(
            f"`optimizer` adamw8bit needs bitsandbytes ({error}). Install it for {sys.executable}, "
            "or use adamw."
        ) from None
    return AdamW8bit


def precondition(
    preconditioner: Tensor, optimizer: torch.optim.Optimizer, rows: Sequence[nn.Parameter]
) -> None:
    """Train these (k, d) parameters in other coordinates: with p = p' P, P (d, d) symmetric, each
    optimizer step is taken on p'.

    AdamW's step does not depend on the parameter's value, so p' itself is not needed: the step
    starts from 0, which leaves out weight decay.
    """
    values: list[Tensor] = []

    @torch.no_grad()
    def to_coordinates(*_: object) -> None:
        values[:] = [p.clone() for p in rows]
        for p in rows:
            assert p.grad is not None
            p.grad = p.grad @ preconditioner
            p.zero_()

    @torch.no_grad()
    def from_coordinates(*_: object) -> None:
        for p, value in zip(rows, values, strict=True):
            p.copy_(value + p @ preconditioner)

    optimizer.register_step_pre_hook(to_coordinates)
    optimizer.register_step_post_hook(from_coordinates)


def asked_for(
    backbone: Backbone,
    settings: ResolvedSettings,
    source: Mapping[str, Any],
    prompts: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """What identifies a run, stored in its snapshot: `source`, the checkpoint, the prompts, and the
    settings that affect the result.
    """
    choices = {
        name: value for name, value in asdict(settings).items() if name not in EXECUTION_SETTINGS
    }
    return {
        **source,
        "checkpoint": backbone.fingerprint,
        "prediction": backbone.prediction,
        "prompts": prompts,
        "settings": choices,
    }
