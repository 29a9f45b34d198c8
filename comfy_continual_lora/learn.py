"""Stage 3: the one training loop.

    minimise over LoRA_n and V_n   E || eps - eps_theta(z_t, t, prompt with V_n) ||^2        (Jha et al. 2025; METHOD: `methods/`)

in: a backbone, the concept's pictures, where the adapter and the word start - out: `Learned`.
Every draw is a function of (seed, step), so a run that was stopped and goes on from its snapshot ends bit for bit where an undisturbed one ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .checkpoint.backbone import Backbone
from .concepts import ConceptImages, prompts_for
from .diffusion import TIMESTEPS, add_noise, alphas_cumprod, loss_per_example
from .errors import TrainingError
from .lora import Adapter, attached
from .methods import METHODS
from .progress import OnProgress, Progress
from .settings import TEMPLATES, LearnSettings
from .store import write_whole


@dataclass(frozen=True)
class Learned:
    """What a run ends with: the adapter (None if the method has none and none was there), the word's vector, the loss of every step."""

    adapter: Adapter | None
    word: Tensor
    losses: list[float]


def learn(
    backbone: Backbone,
    concept: ConceptImages,
    token: str,
    noun: str,
    words: Mapping[str, Tensor],
    adapter: Adapter | None,
    word: Tensor,
    settings: LearnSettings,
    snapshot: Path,
    on_progress: OnProgress,
) -> Learned:
    """Learn one concept. `words` are the earlier ones (frozen), `adapter` and `word` the starting point; `settings` are resolved.

    Stopped by `on_progress`, it leaves a snapshot and lets the exception through. The net stays in the number format it learned with.
    Errors: TrainingError when the loss is not a number or memory runs out.
    """
    method = METHODS[settings.method]
    prompts = [prompts_for(token, noun, TEMPLATES, caption) for caption in concept.captions]
    images = torch.cat([concept.images, concept.images.flip(-1)]) if settings.flip else concept.images
    latents, alphas = backbone.encode_images(images), alphas_cumprod().to(backbone.device)
    dtype = _number_format(backbone.device, settings.precision)  # factors, optimizer and loss stay in float32
    nn.Module.to(backbone.unet, dtype)
    with _checkpointing(backbone, settings.checkpointing), attached(backbone, adapter, trainable=method.trains_adapter) as factors:
        vector = nn.Parameter(word.to(backbone.device, torch.float32, copy=True))
        groups = [{"params": [vector], "lr": settings.token_rate, "weight_decay": 0.0}]
        if method.trains_adapter:
            groups.append({"params": list(factors.values()), "lr": settings.rate, "weight_decay": 0.01})
        trained = {"word": vector, **(factors if method.trains_adapter else {})}
        run = _Run(trained, torch.optim.AdamW(groups), settings, snapshot, _identity(backbone, concept, token, noun, settings, adapter))

        def loss(step: int) -> Tensor:
            pick, timestep, noise, chosen = _batch(latents, prompts, settings, step)
            pick, timestep, noise = (x.to(backbone.device) for x in (pick, timestep, noise))
            noisy = add_noise(latents[pick], noise, timestep, alphas)
            with torch.autocast(backbone.device.type, dtype, enabled=dtype != torch.float32):
                features = _features(backbone, chosen, {**words, token: vector})
                return loss_per_example(backbone.predict(noisy, timestep, features), noise).mean()

        try:
            run.train(loss, on_progress, scale=1024.0 if dtype == torch.float16 else 1.0)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"{backbone.device} ran out of memory at step {run.step} ({error}). Take a smaller batch or size, or gradient checkpointing; "
                "the same command then goes on from the last snapshot where the settings are the same."
            ) from None
        kept = {k: v.detach().cpu().clone() for k, v in factors.items()} if factors else adapter
        return Learned(kept, vector.detach().cpu().clone(), run.losses)


def _batch(latents: Tensor, prompts: Sequence[Sequence[str]], settings: LearnSettings, step: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """What a step learns from, a function of seed and step: which latents (n,), timesteps (n,), noise (n, 4, h, w), prompts."""
    generator = torch.Generator().manual_seed(_seed(settings.seed, step))
    n = settings.batch or 1
    pick = torch.randint(len(latents), (n,), generator=generator)
    chosen = [_one_of(prompts[int(i) % len(prompts)], generator) for i in pick]
    timestep = torch.randint(TIMESTEPS, (n,), generator=generator)
    return pick, timestep, torch.randn((n, *latents.shape[1:]), generator=generator), chosen


@contextmanager
def _checkpointing(backbone: Backbone, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing inside the block. It asks for training mode; there is no dropout in the net."""
    if not wanted:
        yield
        return
    backbone.unet.enable_gradient_checkpointing()
    backbone.unet.train()
    try:
        yield
    finally:
        backbone.unet.disable_gradient_checkpointing()
        backbone.unet.eval()


class _Run:
    """Parameters, optimizer, step and losses of one run, and their snapshot on disk."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, settings: LearnSettings, path: Path, identity: str
    ) -> None:
        self.parameters, self.optimizer, self.settings, self.path, self.identity = parameters, optimizer, settings, path, identity
        self.step, self.losses, self.whole = 0, [], True

    def train(self, loss: Callable[[int], Tensor], on_progress: OnProgress, *, scale: float) -> None:
        """Go on from the snapshot to the last step; whatever stops it between two steps leaves a snapshot behind."""
        self.resume()
        steps, rates = self.settings.steps or 1, [group["lr"] for group in self.optimizer.param_groups]
        started, first = time.monotonic(), self.step
        try:
            while self.step < steps:
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * min(1.0, (self.step + 1) / max(1, self.settings.warmup))
                self.update(loss(self.step), scale)
                if self.step % self.settings.snapshot_every == 0 and self.step < steps:
                    self.save()
                left = (time.monotonic() - started) / (self.step - first) * (steps - self.step)
                on_progress(Progress("learn", self.step, steps, self.losses[-1], self.optimizer.param_groups[-1]["lr"], left))
        except (TrainingError, torch.OutOfMemoryError):
            raise
        except BaseException:
            if self.whole:
                self.save()
            raise

    def update(self, loss: Tensor, scale: float) -> None:
        """One optimizer step; the gradient travels `scale` times larger, so that fp16 does not lose it.

        Errors: TrainingError for a loss that is not a number.
        """
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss became {value} at step {self.step + 1}, so learning stopped; nothing was stored. "
                "A lower --lr or --precision fp32 usually helps."
            )
        self.optimizer.zero_grad(set_to_none=True)
        (loss * scale).backward()
        for p in self.parameters.values():
            p.grad = None if p.grad is None else p.grad / scale
        nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        self.whole = False
        self.optimizer.step()
        self.step += 1
        self.losses.append(value)
        self.whole = True

    def save(self) -> None:
        tensors = {f"value.{name}": p.detach().cpu() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"state.{key}.{name}"] = value.cpu() if isinstance(value, Tensor) else torch.tensor(value)
        header = {"identity": self.identity, "step": str(self.step), "losses": json.dumps(self.losses)}
        try:
            write_whole(self.path, save({k: v.contiguous() for k, v in tensors.items()}, header))
        except OSError as error:
            raise TrainingError(
                f"The snapshot {self.path} can't be written ({error.strerror or error}): no room or no permission there. "
                f"Learning stopped at step {self.step}; the concepts stored before are untouched. Make room and give the same command again."
            ) from None

    def resume(self) -> None:
        """Go on from the snapshot if there is a readable one of this very run."""
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("identity") != self.identity:
                    return
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError):
            return
        self.step, self.losses = int(header["step"]), json.loads(header["losses"])
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"value.{name}"])
                state = {k.split(".", 2)[1]: v for k, v in tensors.items() if k.startswith("state.") and k.split(".", 2)[2] == name}
                self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}


def _identity(backbone: Backbone, concept: ConceptImages, token: str, noun: str, settings: LearnSettings, adapter: Adapter | None) -> str:
    """A hash of all that decides how a run goes; a snapshot is used only by the very run that wrote it."""
    choices = {k: v for k, v in asdict(settings).items() if k != "snapshot_every"}
    digest = hashlib.sha256(json.dumps([backbone.fingerprint, concept.hashes, concept.captions, token, noun, choices]).encode())
    for name, tensor in sorted((adapter or {}).items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "little") >> 1


def _one_of(choices: Sequence[str], generator: torch.Generator) -> str:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def _features(backbone: Backbone, prompts: Sequence[str], words: Mapping[str, Tensor]) -> Tensor:
    """Text features with gradients into the words; each distinct prompt is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    features = backbone.encode_prompts(distinct, words)
    return features[[distinct.index(p) for p in prompts]]


def _number_format(device: torch.device, precision: str) -> torch.dtype:
    """The format of the frozen net: "auto" is bf16 on a GPU that has it, fp16 on one that has not, fp32 elsewhere."""
    if precision == "auto":
        precision = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
