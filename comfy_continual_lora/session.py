"""What an operation works with: the checkpoint, its stack and the stack's path, the callback."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapters import DENSE, PARTS, kind_with
from .adapters.adapter import layers_of
from .errors import SettingError, StackError, TrainingError
from .files import (
    cache_folder,
    check_names,
    real_file,
    snapshot_path,
    snapshots_of,
    stamp_of,
)
from .keeping import writing
from .moments import clear_moments
from .parallel import is_first
from .presets import CLIP_SKIP_PRESETS, FLOW_PRESETS, PREDICTION_NAMES, PREDICTIONS
from .progress import OnProgress, Progress
from .requests import Request
from .settings import ResolvedSettings, TrainSettings
from .snapshot import identity, other_runs
from .stack import CheckpointInfo, ConceptRecord, ConceptStack
from .store import change, check_checkpoint, load_stack, open_stack, save_stack
from .targets import PromptBank

if TYPE_CHECKING:
    from .checkpoint.backbone import Backbone
    from .concept import Concept

_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_LESS_MEMORY = {  # by setting: the value that needs least, and how to get there
    "checkpointing": (True, "turn on `checkpointing`"),
    "accumulate": (256, "increase `accumulate` (at most to `batch`)"),
    "precision": ("fp8", "set `precision` to fp8"),
    "size": (64, "reduce `size`"),
    "batch": (1, "reduce `batch`"),
    "rows": (1, "reduce `rows`"),
}


@dataclass
class Session:
    """An open checkpoint and its stack; while `writes`, no other program can change the stack."""

    path: Path  # of the stack
    request: Request
    stack: ConceptStack
    on_progress: OnProgress
    writes: bool
    precision: str = "auto"
    loaded: Backbone | None = None
    read: tuple[int, int] | None = None  # `stamp_of` the file that the stack was read from

    @property
    def backbone(self) -> Backbone:
        """The checkpoint, loaded when it is first needed.

        Errors: CheckpointError; StackError if the stack is not this checkpoint's.
        """
        if self.loaded is None:
            backbone = _load(self.request, self.precision, self.on_progress)
            check_checkpoint(self.stack, self.path, backbone.fingerprint)
            self.use(backbone)
        assert self.loaded
        return self.loaded

    def use(self, backbone: Backbone) -> None:
        """Work with this checkpoint, as the request and the stack want it.

        Errors: StackError, SettingError if they differ.
        """
        request, preset = self.request, backbone.preset
        check_fits(self.stack, self.path, backbone)
        learned = self.stack.checkpoint if self.stack.records else None
        prediction = prediction_of(request, preset, backbone.prediction, learned, self.path)
        backbone = replace(backbone, prediction=prediction)
        backbone = backbone.with_clip_skip(clip_skip_of(request, preset, learned))
        self.stack.checkpoint = replace(
            self.stack.checkpoint,
            preset=backbone.preset,
            prediction=backbone.prediction,
            word_widths=backbone.word_widths,
            clip_skip=backbone.clip_skip,
        )
        # not `self.tell`: the checkpoint would wait for the garbage collector, with its gigabytes
        backbone.tell = partial(_tell, self.on_progress)
        backbone.try_out()
        self.loaded = backbone

    def bank(self, stack: ConceptStack, share: float | None = None) -> PromptBank:
        """What encodes prompts that name the concepts of this stack; `share` as in
        `textspace.moment`, if it is not the stack's.
        """
        if share is None and stack.ordinary is not None:
            share = stack.ordinary.share
        cache = cache_folder(real_file(self.path))
        return PromptBank(self.backbone, stack.tokens, share, cache, self.on_progress)

    def load(self, path: Path) -> ConceptStack:
        """Another stack of the same checkpoint, to be merged with this one. Errors: StackError."""
        other = load_stack(path, self.backbone.fingerprint)
        check_fits(other, path, self.backbone)
        learned, own = other.checkpoint, self.stack.checkpoint
        for name, theirs, ours in (
            ("clip_skip", learned.clip_skip, own.clip_skip),
            ("prediction", PREDICTION_NAMES[learned.prediction], PREDICTION_NAMES[own.prediction]),
        ):
            if self.stack.records and theirs != ours:
                raise StackError(
                    f"The concepts of {path} were learned with `{name}` {theirs}, those of {self.path} "
                    f"with {ours}; one stack has one. Keep them apart, or learn the others again."
                )
        if other.records:
            prediction_of(self.request, self.backbone.preset, "", learned, path)
        return other

    def tell(self, note: str) -> None:
        """Report a sentence for the user."""
        _tell(self.on_progress, note)

    def commit(self, stack: ConceptStack, kind: str, records: Sequence[ConceptRecord]) -> None:
        """Make this the stack's newest version; `kind` is a key of `stackschema.CHANGES`."""
        assert self.writes
        if stamp_of(self.path) not in (None, self.read):  # by a program that takes no lock
            kept = "goes into the history (`restore`)" if stack.history else "is overwritten"
            self.tell(
                f"Another program replaced {self.path} while this ran. What it put there {kept}: the "
                "stack is the one from before, with this change."
            )
        save_stack(stack, self.path, change(kind, records))
        self.stack, self.read = stack, stamp_of(self.path)
        if stack.ordinary is not None:
            clear_moments(cache_folder(real_file(self.path)))  # the stack has them now


def _tell(on_progress: OnProgress, note: str) -> None:
    on_progress(Progress("load", 1, 1, note=note))


@contextmanager
def open_session(
    request: Request,
    on_progress: OnProgress,
    *,
    precision: str = "auto",
    writes: bool = False,
    at_once: bool = True,
) -> Iterator[Session]:
    """`at_once` false: the checkpoint is loaded when it is first used, if there is a stack.

    Gradients are on in the block, whatever the caller's are; ComfyUI's nodes run in inference mode.
    Errors: CheckpointError, StackError; TrainingError if memory runs out, also in the block.
    """
    request.check()
    path = request.stack_file
    if writes:
        check_names(path)
    with explain_oom(request), torch.inference_mode(False), torch.enable_grad():
        later = not at_once and real_file(path).exists()
        with writing(path) if writes and is_first() else nullcontext():
            backbone = None if later else _load(request, precision, on_progress)
            read = stamp_of(path)
            stack = load_stack(path, backbone.fingerprint) if backbone else open_stack(path)
            session = Session(path, request, stack, on_progress, writes, precision, read=read)
            if backbone:
                session.use(backbone)
            yield session


def _load(request: Request, precision: str, on_progress: OnProgress) -> Backbone:
    on_progress(Progress("load", 0, 1))
    from .checkpoint.load import load_backbone  # takes seconds

    return load_backbone(request.checkpoint, device=request.device, precision=precision)


def prediction_of(
    request: Request, preset: str, own: str, learned: CheckpointInfo | None, path: Path
) -> str:
    """What the net predicts: as asked for, as the concepts of the stack at this path were `learned`
    if it has any, or as the files say (`own`).

    Errors: StackError if the stack was learned by another, SettingError for a checkpoint that is
    known to be a flow.
    """
    asked = PREDICTIONS.get(request.prediction)
    if preset in FLOW_PRESETS and asked not in (None, PREDICTIONS["flow"]):
        raise SettingError(
            f"`prediction` is {request.prediction}, but {request.checkpoint.name} is always a flow. "
            "Leave it out."
        )
    if learned is None:
        return asked or own
    if asked not in (None, learned.prediction):
        raise StackError(
            f"The concepts of {path} were learned with `prediction` "
            f"{PREDICTION_NAMES[learned.prediction]}, not {request.prediction}. Leave it out, or start "
            "another `stack`."
        )
    return learned.prediction


def clip_skip_of(request: Request, preset: str, learned: CheckpointInfo | None) -> int:
    """The layer of the text encoder: as asked for, or as the stack's concepts were `learned`.

    Errors: SettingError for another than the checkpoint's own, StackError if the stack was learned
    with another.
    """
    settings = getattr(request, "settings", None)
    asked = getattr(settings, "clip_skip", None)
    if preset not in CLIP_SKIP_PRESETS:
        if asked not in (None, 1):
            before = "layer before the last (some pages call that clip skip 2)"
            family, layer = {
                "sd2": ("SD2.x", before),
                "sdxl": ("SDXL", before),
                "anima": ("Anima", "last layer"),
            }[preset]
            raise SettingError(
                f"`clip_skip` is {asked}, but {request.checkpoint.name} is {family}, which always uses the "
                f"{layer}. Leave it out."
            )
        return 1
    if learned is None:
        return asked or 1
    if asked not in (None, learned.clip_skip):
        raise StackError(
            f"The concepts of {request.stack_file} were learned with `clip_skip` {learned.clip_skip}, "
            f"not {asked}; one stack has one. Leave it out, or start another `stack`."
        )
    return learned.clip_skip


@contextmanager
def explain_oom(request: Request | None) -> Iterator[None]:
    """Turn running out of memory into a TrainingError that says which settings need less.

    `request`: whose settings those are; None if no setting helps.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_oom = isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error))
        if not is_oom:
            raise
        lines = str(error).strip().splitlines()
        settings = getattr(request, "settings", None)
        ways = [
            way
            for name, (least, way) in _LESS_MEMORY.items()
            if hasattr(settings, name) and getattr(settings, name) != least
        ]
        less = ", or ".join(ways) or "close other programs"
        message = (
            f"Out of memory ({lines[0] if lines else 'main memory'}). To use less, {less}. The "
            "stored concepts are untouched"
        )
        if isinstance(settings, TrainSettings):
            message += (
                "; learning resumes from its snapshot, also with a different `checkpointing` or "
                "`accumulate`"
            )
        raise TrainingError(f"{message}.") from None


def check_fits(stack: ConceptStack, path: Path, backbone: Backbone) -> None:
    """Errors: StackError if the stack's words or layers are not the checkpoint's, whatever its
    fingerprint says.
    """
    shapes = {name: tuple(layer.weight.shape) for name, layer in backbone.kv_layers.items()}
    rows = [*stack.words.values(), *(kept.alone for kept in stack.prompts.values())]
    fits = all(one.shape[1] == backbone.word_width for one in rows)
    for adapter in stack.adapters:
        layers = layers_of(adapter)
        fits = fits and layers.keys() == shapes.keys()
        fits = fits and all(_layer_fits(parts, *shapes[name]) for name, parts in layers.items())
    if not fits:
        raise StackError(
            f"The concept stack {path} does not fit this checkpoint, although its header names it. "
            "Get the file again, or go back to an earlier version (`restore`)."
        )


def _layer_fits(parts: Mapping[str, Tensor], out: int, width: int) -> bool:
    """Whether a layer's tensors match its numbers of outputs and inputs."""
    kind = kind_with(set(parts))
    expected = {"out": out, "width": width}
    for part, dimensions in (PARTS[kind] if kind else DENSE).items():
        for dimension, size in zip(dimensions, parts[part].shape, strict=True):
            if expected.get(dimension, size) != size:
                return False
    return True


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one run that learns or consolidates a concept."""

    stack_file: Path
    token: str
    asked: Mapping[str, object]

    @classmethod
    def of(
        cls,
        session: Session,
        concept: Concept,
        settings: ResolvedSettings,
        prompts: Sequence[Sequence[str]] = (),
    ) -> Snapshots:
        """The snapshots of the run with these settings and training prompts."""
        from .training import asked_for  # takes seconds

        asked = asked_for(session.backbone, settings, concept.source, prompts)
        return cls(real_file(session.path), concept.token, asked)

    def path(self, part: str = "") -> Path:
        return snapshot_path(self.stack_file, self.token, identity(dict(self.asked))[:12], part)

    def tell_of_others(self, on_progress: OnProgress) -> None:
        """Report other unfinished runs of the same word; their files are kept."""
        if is_first():
            own = (self.path(), self.path("dsc"))
            files = [p for p in snapshots_of(self.stack_file, self.token) if p not in own]
            for note in other_runs(files, dict(self.asked)):
                on_progress(Progress("load", 1, 1, note=note))

    def remove(self) -> None:
        """Delete them, once the result is stored; one that another program reads may stay."""
        for part in ("", "dsc"):
            with suppress(OSError):
                self.path(part).unlink(missing_ok=True)
