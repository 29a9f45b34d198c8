"""What this project does, from end to end: READ THIS FIRST. Front ends call these functions and nothing else.

    checkpoint ->  concept images  ->  learn  ->  store  ->  draw
    checkpoint/    concepts.py         learn.py   store.py   sample.py

Every function takes one request, reports through `on_progress`, and raises a `ContinualLoraError` a user can act on; a failed or cancelled call
leaves the concept stack as it was.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from . import concepts, sample, store
from .checkpoint.backbone import Backbone
from .checkpoint.load import load_backbone
from .errors import SettingError
from .learn import Learned, learn
from .lora import attached, new_adapter
from .methods import METHODS
from .progress import OnProgress, Progress, ignore
from .settings import TEMPLATES, DrawSettings, LearnSettings


@dataclass(frozen=True)
class LearnRequest:
    """Teach one concept: `images` is a folder or a list of files, `stack` a file other than the one beside the checkpoint."""

    checkpoint: Path
    images: Path | list[Path]
    token: str
    noun: str
    settings: LearnSettings = field(default_factory=LearnSettings)
    stack: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class DrawRequest:
    """Draw prompts; learned tokens stand for their concepts.."""

    checkpoint: Path
    prompts: list[str]
    settings: DrawSettings = field(default_factory=DrawSettings)
    stack: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class LearnResult:
    record: store.ConceptRecord
    losses: list[float]
    stack_file: Path


@dataclass(frozen=True)
class Drawn:
    prompt: str
    seed: int
    image: Image.Image


def learn_concept(request: LearnRequest, on_progress: OnProgress = ignore) -> LearnResult:
    """Teach the checkpoint one more concept and put it on its stack. A stopped run goes on when the same request comes again."""
    request.settings.check()
    concepts.find_images(request.images)  # the cheapest mistakes first, before a checkpoint is loaded
    path = request.stack or store.stack_path(request.checkpoint)
    backbone = _load(request.checkpoint, request.device, on_progress)
    with store.writing(path):
        stack = store.load_stack(path, backbone.fingerprint)
        concepts.check_token(request.token, stack.tokens, backbone.is_known_word)
        if not request.noun.strip():
            raise SettingError("The class noun is empty. Say in one or two words what the thing is, such as teapot or cat.")
        settings = _with_rank_of(stack, request.settings).resolved(backbone.preset)
        pictures = concepts.load_images(request.images, settings.size or backbone.size, fit=settings.fit)
        learned = _run(backbone, pictures, request, settings, stack, path, on_progress)
        record = _record(request, settings, pictures, learned, stack)
        stack.add(record, learned.word, learned.adapter)
        stack.rank = settings.rank if learned.adapter is not None else stack.rank
        store.save_stack(stack, path)
        _snapshot(path, request.token).unlink(missing_ok=True)
    return LearnResult(record, learned.losses, path)


def draw(request: DrawRequest, on_progress: OnProgress = ignore) -> list[Drawn]:
    """Draw every prompt `settings.count` times."""
    request.settings.check()
    backbone = _load(request.checkpoint, request.device, on_progress)
    stack = store.load_stack(request.stack or store.stack_path(request.checkpoint), backbone.fingerprint)
    settings = request.settings.resolved(backbone.preset)
    prompts = [prompt for prompt in request.prompts for _ in range(settings.count)]
    seeds = [settings.seed + i for _ in request.prompts for i in range(settings.count)]
    with attached(backbone, stack.adapter):
        pictures = sample.draw(backbone, stack.tokens, prompts, seeds, settings, on_progress)
    return [Drawn(prompt, seed, concepts.to_pil(picture)) for prompt, seed, picture in zip(prompts, seeds, pictures, strict=True)]


def info(checkpoint: Path, stack: Path | None = None) -> dict[str, Any]:
    """What a checkpoint has learned, read from the stack's header alone; the checkpoint is loaded only where there is no stack yet."""
    path = stack or store.stack_path(checkpoint)
    if not path.exists():
        return {
            "concepts": [],
            "stack_file": str(path),
            "fingerprint": load_backbone(checkpoint).fingerprint,
            "rank": None,
            "trainable_parameters": 0,
        }
    header = store.read_header(path)
    with safe_open(path, framework="pt") as file:
        sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a dict
    newest = f"word.{header['concepts'][-1]['id']}" if header["concepts"] else ""
    trainable = sum(int(torch.Size(size).numel()) for key, size in sizes.items() if key.startswith("adapter.") or key == newest)
    return {
        "concepts": header["concepts"], "stack_file": str(path), "fingerprint": header["fingerprint"], "rank": header["rank"],
        "trainable_parameters": trainable,
    }  # fmt: skip


def undo(checkpoint: Path, stack: Path | None = None) -> store.ConceptRecord:
    """Take the newest concept off the stack; the earlier ones are again exactly what they were before it was learned."""
    path = stack or store.stack_path(checkpoint)
    with store.writing(path):
        if not path.exists():
            raise store.StackError(f"There is nothing to undo: no concept stack at {path}.")
        held = store.load_stack(path, store.read_header(path)["fingerprint"])
        record = held.undo()
        store.save_stack(held, path)
    return record


def _load(checkpoint: Path, device: str, on_progress: OnProgress) -> Backbone:
    on_progress(Progress("load", 0, 1))
    return load_backbone(checkpoint, device=device)


def _with_rank_of(stack: store.ConceptStack, settings: LearnSettings) -> LearnSettings:
    if stack.rank is None or settings.rank == stack.rank:
        return settings
    if settings.rank is not None:
        raise SettingError(
            f"rank is {settings.rank}, but the concepts of this stack were learned with rank {stack.rank}. Leave rank out, or start another stack."
        )
    return LearnSettings(**{**asdict(settings), "rank": stack.rank})


def _snapshot(path: Path, token: str) -> Path:
    """Where an unfinished run of this token waits; the ending keeps it out of the hosts' checkpoint lists."""
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.{token}.snapshot")


def _run(
    backbone: Backbone, pictures: concepts.ConceptImages, request: LearnRequest, settings: LearnSettings,
    stack: store.ConceptStack, path: Path, on_progress: OnProgress,
) -> Learned:  # fmt: skip
    """Sequential initialisation: the adapter starts from the stack's, the word from its class noun."""
    generator = torch.Generator().manual_seed(settings.seed)
    word = backbone.word_start(request.noun, generator)
    adapter = stack.adapter
    if adapter is None and METHODS[settings.method].trains_adapter:
        assert settings.rank
        adapter = new_adapter(backbone, settings.rank, generator)
    return learn(backbone, pictures, request.token, request.noun, stack.tokens, adapter, word, settings, _snapshot(path, request.token), on_progress)


def _record(
    request: LearnRequest, settings: LearnSettings, pictures: concepts.ConceptImages, learned: Learned, stack: store.ConceptStack
) -> store.ConceptRecord:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    identity = hashlib.sha256(f"{stack.fingerprint}/{request.token}/{now}/{len(stack.records)}".encode()).hexdigest()[:12]
    tail = learned.losses[-max(1, len(learned.losses) // 10) :]
    prompts = [p for caption in dict.fromkeys(pictures.captions) for p in concepts.prompts_for(request.token, request.noun, TEMPLATES, caption)]
    assert settings.steps
    return store.ConceptRecord(
        id=identity, token=request.token, noun=request.noun, method=settings.method, images=len(pictures.images), steps=settings.steps,
        seed=settings.seed, prompts=prompts, hashes=list(pictures.hashes), learned=now, loss=sum(tail) / len(tail), preview=pictures.preview,
        settings=asdict(settings),
    )  # fmt: skip
