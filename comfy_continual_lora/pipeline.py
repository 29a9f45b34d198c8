"""What this project does, from end to end: READ THIS FIRST. Front ends call these functions and
nothing else.

    checkpoint ->  concept images  ->  learn (consolidate)  ->  Fisher     ->  store  ->  draw,
    score, export
    checkpoint/    concepts.py         learn.py  dsc.py         fisher.py      store.py   sample.py,
    classifier.py

Every function takes one request, reports through `on_progress`, and raises a `ContinualLoraError` a
user can act on; a failed or cancelled call
leaves the concept stack as it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from . import (
    classifier,
    concepts,
    dsc,
    foreign,
    parallel,
    sample,
    solve,
    stackfile,
    store,
    textspace,
)
from . import evaluate as evaluation
from . import plan as planning
from .checkpoint.backbone import Backbone, FrozenText
from .checkpoint.load import fingerprint, load_backbone
from .errors import ConceptImagesError, SettingError, StackError, TokenError, TrainingError
from .export import Exported, export_files
from .files import STACKS, check_names, real_file, snapshot_path, snapshots_of
from .fisher import Target, fisher
from .learn import Learned, Lesson, asked_for, learn, number_format, preview
from .lora import Adapter, attached, grown, kind_of, layers_of, new_adapter, rank_of
from .methods import METHODS
from .methods.method import Penalty
from .progress import OnProgress, Progress, ignore
from .settings import (
    MEANS,
    TEMPLATES,
    ConsolidateSettings,
    DrawSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
    SolveSettings,
)
from .snapshot import identity, other_runs


@dataclass(frozen=True)
class Request:
    """What every job is about: `stack` is a file other than the one beside the checkpoint."""

    checkpoint: Path
    _: KW_ONLY
    stack: Path | None = None
    device: str = "auto"

    @property
    def stack_file(self) -> Path:
        return self.stack or store.stack_path(self.checkpoint)


@dataclass(frozen=True)
class LearnRequest(Request):
    """Teach one concept: `images` is a folder or a list of files.

    `replace`: in place of the newest concept, if that has this word.
    """

    images: Path | list[Path]
    token: str
    noun: str
    settings: LearnSettings = field(default_factory=LearnSettings)
    replace: bool = False

    @property
    def digest(self) -> str:
        """A hash of what is asked for, wherever the pictures lie; a stack remembers it."""
        return _digest(self.images, self.settings, self.token, self.noun)


@dataclass(frozen=True)
class DrawRequest(Request):
    """Draw prompts; learned tokens stand for their concepts. Several prompts in place of one are
    drawn beside each other, equally many each time.

    `only`: tokens of the concepts to solve a LoRA for, in place of the stack's own.
    """

    prompts: Sequence[str | Sequence[str]]
    settings: DrawSettings = field(default_factory=DrawSettings)
    only: Sequence[str] = ()


@dataclass(frozen=True)
class LearnResult:
    record: store.ConceptRecord
    losses: list[float]
    stack_file: Path


@dataclass(frozen=True)
class ConsolidateRequest(Request):
    """Consolidate the newest concept once more; `images` are the pictures it was learned from."""

    images: Path | list[Path]
    settings: ConsolidateSettings = field(default_factory=ConsolidateSettings)

    @property
    def digest(self) -> str:
        return _digest(self.images, self.settings)


@dataclass(frozen=True)
class SolveRequest(Request):
    """What asks for the closed form and nothing else."""

    settings: SolveSettings = field(default_factory=SolveSettings)


@dataclass(frozen=True)
class ImportRequest(Request):
    """A K/V LoRA from elsewhere as one more concept.

    Its word is an embedding's vector, or a trigger the tokenizer knows.
    """

    lora: Path
    token: str
    noun: str
    embedding: Path | None = None
    trigger: str = ""
    strength: float = 1.0
    settings: SolveSettings = field(default_factory=SolveSettings)


@dataclass(frozen=True)
class ScoreRequest(Request):
    """Which concepts do these pictures show? `images` is a folder of pictures or of folders named
    after tokens, or a list of files.
    """

    images: Path | list[Path]
    settings: ScoreSettings = field(default_factory=ScoreSettings)


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """How much is remembered? `images` may hold folders named after tokens with their pictures;
    `clip` a CLIP vision model to compare with.
    """

    images: Path | None = None
    clip: Path | None = None
    settings: EvaluateSettings = field(default_factory=EvaluateSettings)


@dataclass(frozen=True)
class Scored:
    """One picture's scores; `label` is the token its folder is named after, if it is one."""

    file: Path
    label: str | None
    scores: classifier.Scores

    @property
    def right(self) -> bool | None:
        return None if self.label is None else self.scores.best == self.label


@dataclass(frozen=True)
class Drawn:
    prompt: str
    seed: int
    image: Image.Image


@contextmanager
def _telling_memory() -> Iterator[None]:
    """Whatever wants more memory than there is says what needs less. Errors: TrainingError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search(
            r"out of memory|can't allocate memory|not enough memory", str(error), re.IGNORECASE
        ):
            raise
        said = str(error).strip().splitlines()
        raise TrainingError(
            f"Memory ran out ({said[0] if said else 'main memory'}). Less is needed with "
            "--checkpointing, with a larger --accumulate, with "
            "--precision fp8, or with a smaller --size or --batch; to draw and to score, with a "
            "smaller --size or --rows. learn --plan tells how "
            "much. What was stored is untouched, and learning goes on from its snapshot, with "
            "other --checkpointing and --accumulate too."
        ) from None


@_telling_memory()
def learn_concept(request: LearnRequest, on_progress: OnProgress = ignore) -> LearnResult:
    """Teach the checkpoint one more concept and put it on its stack.

    A stopped run goes on when the same request comes again.
    """
    with parallel.together(request.device) as device:
        return _learn_concept(replace(request, device=device), on_progress)


def _learn_concept(request: LearnRequest, on_progress: OnProgress) -> LearnResult:
    request.settings.check()
    concepts.find_images(
        request.images
    )  # the cheapest mistakes first, before a checkpoint is loaded
    path = request.stack_file
    concepts.check_spelling(request.token)
    concepts.check_noun(request.noun)
    check_names(path, request.token)
    backbone = _load(request, on_progress, request.settings.precision)
    with _writing(path):
        stack = _stack(request, backbone)
        kind = "learned"
        if request.replace and stack.find(request.token) is not None:
            stack, kind = (
                _without_newest(stack, request.token),
                "replaced",
            )  # in memory: on disk it stays until the new one is stored
        concepts.check_token(request.token, stack.tokens, backbone.is_known_word)
        if not request.noun.strip():
            raise SettingError(
                "The class noun is empty. Say in one or two words what the thing is, such as "
                "teapot or cat."
            )
        settings = _with_rank_of(stack, request.settings).resolved(backbone.preset)
        pictures = concepts.load_images(
            request.images, settings.size or backbone.size, fit=settings.fit
        )
        latents, method = _latents(backbone, pictures, settings), METHODS[settings.method]
        memory = _memory(
            backbone,
            stack,
            settings,
            request.noun,
            on_progress,
            solves=method.consolidation == "closed form",
        )
        lesson = _lesson(backbone, request, stack, settings, pictures, latents, memory)
        run = _Run(
            path, request.token, asked_for(backbone, settings, lesson.source, lesson.prompts)
        )
        run.tell_of_others(on_progress)
        learned = learn(backbone, lesson, settings, run.snapshot(), on_progress)
        record = _record(request, settings, pictures, learned, stack)
        text = FrozenText(backbone, {**stack.tokens, request.token: learned.word})
        newest = _Newest(
            backbone,
            stack,
            record,
            latents,
            text,
            lesson.penalty,
            settings,
            lesson.source,
            on_progress,
        )
        adapter = learned.adapter
        if stack.tau is None:
            stack.tau = newest.calibrated(adapter)
        if method.consolidation in ("distillation", "scores") and adapter and newest.past:
            adapter, _ = newest.consolidated(
                adapter, method.consolidation == "scores", run.snapshot("dsc")
            )
        parallel.wait()  # until all have read the stack that is to be written now
        if not parallel.is_first():
            return LearnResult(record, learned.losses, path)
        if method.importance and adapter:
            stack.fishers[record.id] = newest.fisher(adapter)
        stack.add(record, learned.word, adapter)
        stack.rank = settings.rank if adapter is not None else stack.rank
        if method.consolidation == "closed form" and len(stack.records) > 1:
            solve.consolidated(backbone, stack, SolveSettings(), on_progress, memory)
            stack.before = None  # this is how it was learned
        if settings.preview_every and stack.adapter is not learned.adapter:
            with attached(backbone, stack.adapter):
                both = preview(backbone, stack.tokens, [record.name, stack.records[0].name])
            on_progress(Progress("preview", 1, 1, preview=both))
        store.save_stack(stack, path, store.change(kind, [record]))
        run.done()
    return LearnResult(record, learned.losses, path)


@_telling_memory()
def consolidate(request: ConsolidateRequest, on_progress: OnProgress = ignore) -> LearnResult:
    """Diffusion Scores Consolidation of the newest concept with all its terms, by itself; the
    stack's newest adapter and Fisher are replaced.
    """
    request.settings.check()
    concepts.find_images(request.images)
    path = request.stack_file
    backbone = _load(request, on_progress, request.settings.precision)
    with store.writing(path):
        stack = _stack(request, backbone)
        if len(stack.records) < 2 or stack.adapter is None:
            raise StackError(
                f"There is nothing to consolidate: {path} needs a newest concept and an earlier "
                "one, both learned with a LoRA."
            )
        record, adapter, text = stack.records[-1], stack.adapter, FrozenText(backbone, stack.tokens)
        word, had_fisher = stack.words[record.id], record.id in stack.fishers
        stack.undo()  # what follows is about the stack as it was before the newest concept
        same = {
            "method": record.method,
            "adapter": record.settings.get("adapter", "lora"),
            "rank": stack.rank,
        }
        settings = LearnSettings(**{**asdict(request.settings), **same}).resolved(backbone.preset)
        pictures = concepts.load_images(
            request.images, settings.size or backbone.size, fit=settings.fit
        )
        memory = _memory(backbone, stack, settings, record.noun, on_progress)
        penalty = _penalty(backbone, stack, settings, _held(memory, stack, settings))
        source = _source(stack, request.images, token=record.token, noun=record.noun)
        newest = _Newest(
            backbone,
            stack,
            record,
            _latents(backbone, pictures, settings),
            text,
            penalty,
            settings,
            source,
            on_progress,
        )
        if not newest.past:
            raise StackError(
                f"There is nothing to consolidate: no concept before {record.token} in {path} has "
                "a LoRA."
            )
        run = _Run(path, record.token, asked_for(backbone, settings, source))
        run.tell_of_others(on_progress)
        consolidated, losses = newest.consolidated(adapter, True, run.snapshot("dsc"))
        if had_fisher:
            stack.fishers[record.id] = newest.fisher(consolidated)
        record = replace(record, consolidated=request.digest)
        stack.add(record, word, consolidated)
        stack.before, stack.rank = adapter, record.settings.get("rank", stack.rank)
        store.save_stack(stack, path, store.change("consolidated", [record]))
        run.done()
    return LearnResult(record, losses, path)


@_telling_memory()
def consolidate_in_closed_form(
    request: SolveRequest, on_progress: OnProgress = ignore
) -> solve.Consolidated:
    """Solve for the one LoRA that does to every concept's prompts what the adapter right after it
    did. No pictures, no U-Net, no chance.
    """
    with _changing(request, on_progress) as (backbone, stack, changed):
        if len(stack.records) < 2 or stack.adapter is None:
            raise StackError(
                f"There is nothing to consolidate: {request.stack_file} needs two concepts at "
                "least, learned with a LoRA."
            )
        changed("solved", stack.records)
        return solve.consolidated(backbone, stack, request.settings, on_progress)


def select(
    request: SolveRequest, tokens: Sequence[str], on_progress: OnProgress = ignore
) -> store.ConceptStack:
    """Some concepts of the stack with a LoRA solved for them alone, to draw and to export; the
    stack file stays as it is.
    """
    request.settings.check()
    backbone = _load(request, on_progress)
    return solve.selected(
        backbone, _stack(request, backbone), tokens, request.settings, on_progress
    )


def forget(
    request: SolveRequest, token: str, on_progress: OnProgress = ignore
) -> store.ConceptRecord:
    """Take any one concept off the stack, and what the adapters since then know of it."""
    with _changing(request, on_progress) as (backbone, stack, changed):
        record = solve.forgotten(backbone, stack, token, request.settings, on_progress)
        changed("forgot", [record])
        return record


def merge(request: SolveRequest, other: Path, on_progress: OnProgress = ignore) -> dict[str, str]:
    """Put the concepts of another stack of the same checkpoint on this one, but for those it has;
    returns the words that had to be renamed.
    """
    store.open_stack(other)
    with _changing(request, on_progress) as (backbone, stack, changed):
        second, known = (
            _fitting(store.load_stack(other, backbone.fingerprint), other, backbone),
            set(stack.words),
        )
        renamed = solve.merged(backbone, stack, second, request.settings, on_progress)
        if new := [record for record in stack.records if record.id not in known]:
            changed("merged", new)
        return renamed


def import_concept(request: ImportRequest, on_progress: OnProgress = ignore) -> store.ConceptRecord:
    """Put a K/V LoRA that another program made on the stack, as one concept."""
    concepts.check_noun(request.noun)
    with _changing(request, on_progress) as (backbone, stack, changed):
        concepts.check_token(request.token, stack.tokens, backbone.is_known_word)
        if bool(request.embedding) == bool(request.trigger):
            raise SettingError(
                "An imported concept needs its word: either --embedding FILE or --trigger WORD, "
                "and not both."
            )
        word = (
            foreign.read_word(request.embedding, backbone)
            if request.embedding
            else foreign.word_of_vocabulary(request.trigger, backbone)
        )
        adapter = foreign.read_lora(request.lora, backbone, request.strength)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = store.ConceptRecord(
            id=hashlib.sha256(request.lora.read_bytes() + request.token.encode()).hexdigest()[:12],
            token=request.token,
            noun=request.noun.strip(),
            method="import",
            images=0,
            steps=0,
            seed=0,
            prompts=[],
            hashes=[],
            learned=now,
            loss=0.0,
            preview="",
            settings={},
            with_noun=bool(request.noun.strip()),
        )
        second = store.ConceptStack(stack.fingerprint, rank=rank_of(adapter))
        second.add(record, word, adapter)
        solve.merged(backbone, stack, second, request.settings, on_progress)
        changed("imported", [record])
        return record


@contextmanager
def _changing(
    request: SolveRequest | ImportRequest, on_progress: OnProgress
) -> Iterator[tuple[Backbone, store.ConceptStack, _SayChange]]:
    """The checkpoint, its stack, and how to say what was changed.

    The stack is stored when the block ends well, and is as it was when it does not.
    """
    request.settings.check()
    check_names(request.stack_file)
    backbone = _load(request, on_progress)
    said: list[store.Change] = []
    with store.writing(request.stack_file):
        stack = _stack(request, backbone)
        yield backbone, stack, lambda kind, records: said.append(store.change(kind, records))
        if said:
            store.save_stack(stack, request.stack_file, said[-1])


_SayChange = Callable[[str, Sequence[store.ConceptRecord]], None]


def plan(request: LearnRequest) -> planning.Plan:
    """What learning this will take, told without loading the checkpoint."""
    request.settings.check()
    return planning.plan(request.checkpoint, request.stack_file, request.settings, request.device)


def learned_before(request: LearnRequest) -> store.ConceptRecord | None:
    """The stack's concept that this very request has taught it already: the same pictures,
    captions, words and settings.
    """
    digest = request.digest
    return next(
        (record for record in store.read_records(request.stack_file) if record.request == digest),
        None,
    )


@_telling_memory()
def dc_scores(request: ScoreRequest, on_progress: OnProgress = ignore) -> list[Scored]:
    """Which concept, or which class noun without one (c_0), each picture shows.

    A folder may hold folders: each one's name is the right answer.
    """
    request.settings.check()
    groups = _groups(request.images)
    backbone = _load(request, on_progress)
    stack = _stack(request, backbone)
    if not stack.records:
        raise StackError(
            f"{request.checkpoint} has learned no concept yet, so there is nothing to tell apart. "
            "Learn one first."
        )
    if stack.tau is None:
        raise StackError(
            "All concepts of this stack were imported, so its DC scores were never calibrated. "
            "Learn one concept here first."
        )
    settings, text = request.settings, FrozenText(backbone, stack.tokens)
    features, found = classifier.candidates(stack.records, text), []
    with attached(backbone, stack.adapter):
        for label, files in groups:
            known = next(
                (record.token for record in stack.records if record.token.lower() == label.lower()),
                None,
            )
            for file in files:
                picture = concepts.load_images(
                    [file], settings.size or backbone.size, fit=settings.fit
                )
                scores = classifier.classify(
                    backbone,
                    backbone.encode_images(picture.images)[0],
                    features,
                    stack.tau,
                    settings,
                    on_progress,
                )
                found.append(Scored(file, known, scores))
    return found


@_telling_memory()
def draw(request: DrawRequest, on_progress: OnProgress = ignore) -> list[Drawn]:
    """Draw every prompt `settings.count` times.

    Errors: SettingError where one picture shall show more beside each other than another.
    """
    request.settings.check()
    asked = [(prompt,) if isinstance(prompt, str) else tuple(prompt) for prompt in request.prompts]
    if len(counts := {len(parts) for parts in asked}) > 1:
        raise SettingError(
            "The pictures of one request show equally many prompts beside each other; these show "
            f"{sorted(counts)}. Ask for them one by one."
        )
    backbone = _load(request, on_progress)
    stack = _stack(request, backbone)
    if request.only:
        stack = solve.selected(backbone, stack, request.only, SolveSettings(), on_progress)
    settings = request.settings.resolved(backbone.preset)
    prompts = [parts for parts in asked for _ in range(settings.count)]
    seeds = [settings.seed + i for _ in request.prompts for i in range(settings.count)]
    with attached(backbone, stack.adapter):
        pictures = sample.draw(backbone, stack.tokens, prompts, seeds, settings, on_progress)
    return [
        Drawn(" | ".join(parts), seed, concepts.to_pil(picture))
        for parts, seed, picture in zip(prompts, seeds, pictures, strict=True)
    ]


@_telling_memory()
def evaluate(request: EvaluateRequest, on_progress: OnProgress = ignore) -> evaluation.Retention:
    """Draw every concept with every version of the stack since it was learned, and tell how much is
    kept.
    """
    request.settings.check()
    groups = dict(_groups(request.images)) if request.images else {}
    backbone = _load(request, on_progress)
    stack = _stack(request, backbone)
    if not stack.records:
        raise StackError(
            f"{request.checkpoint} has learned no concept yet, so there is nothing to evaluate. "
            "Learn one first."
        )
    settings = request.settings.resolved(backbone.preset)
    tokens = {token.lower(): token for token in stack.tokens}
    if groups and not tokens.keys() & {name.lower() for name in groups}:
        raise ConceptImagesError(
            f"No folder in {request.images} is named after a concept. Expected "
            f"{', '.join(stack.tokens)}; found {', '.join(groups)}."
        )
    given = {
        tokens[name.lower()]: torch.stack(
            concepts.load_images(files, settings.size or backbone.size).images
        )
        for name, files in groups.items()
        if name.lower() in tokens
    }
    return evaluation.evaluate(
        backbone, stack, given, evaluation.features(backbone, request.clip), settings, on_progress
    )


def info(checkpoint: Path, stack: Path | None = None) -> dict[str, Any]:
    """What a checkpoint has learned, read from the stack's header alone; the checkpoint is looked
    into only where there is no stack yet.
    """
    path = stack or store.stack_path(checkpoint)
    if not path.exists():
        return {
            "concepts": [],
            "stack_file": str(path),
            "fingerprint": fingerprint(checkpoint),
            "rank": None,
            "trainable_parameters": 0,
        }
    header, shapes = stackfile.read_shapes(path)
    newest = f"word.{header['concepts'][-1]['id']}" if header["concepts"] else ""
    trainable = sum(
        math.prod(shape.sizes)
        for key, shape in shapes.items()
        if key.startswith("adapter.") or key == newest
    )
    return {
        "concepts": header["concepts"],
        "stack_file": str(path),
        "fingerprint": header["fingerprint"],
        "rank": header["rank"],
        "trainable_parameters": trainable,
    }


def export(
    checkpoint: Path,
    out: Path,
    *,
    embeddings: Path | None = None,
    stack: Path | None = None,
    format: str = "kohya",
    only: Sequence[str] = (),
    remove_superseded: bool = False,
    device: str = "auto",
    on_progress: OnProgress = ignore,
) -> Exported:
    """Write the stack as one LoRA and one embedding a word; `embeddings` is the words' folder if it
    is another, `format` one of settings.FORMATS.

    `only`: tokens of the concepts to solve a LoRA for, which needs the checkpoint loaded, on
    `device`; else it is not even opened.
    `remove_superseded`: also remove this stack's earlier exports of the same concepts, which are
    listed otherwise.
    """
    request = SolveRequest(checkpoint, stack=stack, device=device)
    held = select(request, only, on_progress) if only else store.open_stack(request.stack_file)
    name = request.stack_file.name.removesuffix(STACKS).removesuffix(".safetensors")
    return export_files(held, out, embeddings or out, name, format, only, remove_superseded)


def undo(checkpoint: Path, stack: Path | None = None, version: int | None = None) -> store.Undone:
    """Take the last change of the stack back, whatever it was.

    `version`: the version that is meant, if it has to be that one.
    """
    return store.undo(stack or store.stack_path(checkpoint), version)


def history(checkpoint: Path, stack: Path | None = None) -> list[store.Version]:
    """The stack's versions that are kept, the newest first."""
    return stackfile.versions(stack or store.stack_path(checkpoint))


def restore(checkpoint: Path, number: int, stack: Path | None = None) -> store.Version:
    """Go to a version of the history; the one in use now stays in it."""
    return store.restore(stack or store.stack_path(checkpoint), number)


def keep_versions(checkpoint: Path, count: int, stack: Path | None = None) -> None:
    """How many earlier versions the stack keeps from now on."""
    store.keep_versions(stack or store.stack_path(checkpoint), count)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """`store.writing` for the one process that writes."""
    with store.writing(path) if parallel.is_first() else nullcontext():
        yield


def _load(request: Request, on_progress: OnProgress, precision: str = "auto") -> Backbone:
    on_progress(Progress("load", 0, 1))
    return load_backbone(request.checkpoint, device=request.device, precision=precision)


def _stack(request: Request, backbone: Backbone) -> store.ConceptStack:
    """The checkpoint's stack, which knows the checkpoint."""
    stack = _fitting(
        store.load_stack(request.stack_file, backbone.fingerprint), request.stack_file, backbone
    )
    stack.base = store.Base(backbone.preset, backbone.prediction, backbone.word_widths)
    return stack


def _fitting(stack: store.ConceptStack, path: Path, backbone: Backbone) -> store.ConceptStack:
    """The same stack.

    Errors: StackError where its words or layers are not those of the checkpoint, whatever its
    fingerprint says.
    """
    wrong = StackError(
        f"The concept stack {path} does not fit this checkpoint, whatever its header says. Get it "
        "again, or restore an earlier version."
    )
    if any(word.shape[1] != backbone.word_width for word in stack.words.values()):
        raise wrong
    known = {name: tuple(layer.weight.shape) for name, layer in backbone.kv_layers.items()}
    for adapter in filter(
        None,
        (
            stack.adapter,
            stack.before,
            *stack.pool.values(),
            *stack.wishes.values(),
            *stack.fishers.values(),
        ),
    ):
        layers = layers_of(adapter)
        if layers.keys() != known.keys() or not all(
            _parts_fit(parts, *known[layer]) for layer, parts in layers.items()
        ):
            raise wrong
    return stack


def _parts_fit(parts: Mapping[str, torch.Tensor], out: int, width: int) -> bool:
    """Whether a layer's matrices (r, width), (out, r), (out, width) or (out,) have the layer's
    numbers of outputs and inputs.
    """
    rows_fit = all(len(tensor) == out for letter, tensor in parts.items() if letter in "BbDW")
    return rows_fit and all(
        tensor.shape[1] == width for letter, tensor in parts.items() if letter in "ADW"
    )


def _without_newest(stack: store.ConceptStack, token: str) -> store.ConceptStack:
    """The stack as it was before its newest concept.

    Errors: TokenError where that is not the one of this word.
    """
    newest = stack.records[-1]
    if newest.token.lower() != token.lower():
        raise TokenError(
            f"{token} can't be replaced: {newest.token} was learned after it and builds on it. "
            f"Forget {token} first, or choose another word."
        )
    return stack.as_of(len(stack.records) - 1)


def _with_rank_of(stack: store.ConceptStack, settings: LearnSettings) -> LearnSettings:
    if stack.rank is None or settings.rank == stack.rank:
        return settings
    asked = {
        record.settings.get("rank") for record in stack.records
    }  # the closed form may have made more of it
    if settings.rank is not None and settings.rank not in asked:
        raise SettingError(
            f"rank is {settings.rank}, but the concepts of this stack were learned with rank "
            f"{stack.rank}. Leave rank out, or start another stack."
        )
    return LearnSettings(**{**asdict(settings), "rank": stack.rank})


@dataclass(frozen=True)
class _Run:
    """The snapshots of one run that learns or consolidates a concept."""

    stack_file: Path
    token: str
    asked: dict[str, Any]

    def snapshot(self, part: str = "") -> Path:
        return snapshot_path(
            real_file(self.stack_file), self.token, identity(self.asked)[:12], part
        )

    def tell_of_others(self, on_progress: OnProgress) -> None:
        """Unfinished runs of the same word are kept, and the user hears of them."""
        if parallel.is_first():
            own = (self.snapshot(), self.snapshot("dsc"))
            files = [
                p for p in snapshots_of(real_file(self.stack_file), self.token) if p not in own
            ]
            for note in other_runs(files, self.asked):
                on_progress(Progress("load", 1, 1, note=note))

    def done(self) -> None:
        """What was unfinished is stored."""
        for part in ("", "dsc"):
            self.snapshot(part).unlink(missing_ok=True)


def _source(stack: store.ConceptStack, images: Path | list[Path], **words: str) -> dict[str, str]:
    """What a run learns from, and where it starts: words, a hash of the files, a hash of the stack
    as it is stored.
    """
    pictures, start = hashlib.sha256(), hashlib.sha256()
    for path in concepts.find_images(images):
        pictures.update(_content(path))
    adapters = {"adapter": stack.adapter, "before": stack.before}
    adapters |= {
        f"{part}.{one}": a
        for part in ("pool", "wishes", "fishers")
        for one, a in getattr(stack, part).items()
    }
    tensors = {
        f"{part}.{name}": t
        for part, adapter in adapters.items()
        for name, t in (adapter or {}).items()
    }
    for name, tensor in sorted({**tensors, **stack.words}.items()):
        start.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {**words, "pictures": pictures.hexdigest(), "start": start.hexdigest()}


def _content(path: Path) -> bytes:
    """What a picture file, its caption and its mask say."""
    mask = concepts.mask_file(path)
    return (
        path.read_bytes()
        + (concepts.caption_of(path) or "").encode()
        + (mask.read_bytes() if mask else b"")
    )


def _latents(
    backbone: Backbone, pictures: concepts.ConceptImages, settings: ConsolidateSettings
) -> list[torch.Tensor]:
    """Latents of the pictures, and of their mirror images behind them if wanted."""
    return backbone.encode_images(_mirrored(pictures.images, settings))


def _mirrored(
    images: tuple[torch.Tensor, ...], settings: ConsolidateSettings
) -> tuple[torch.Tensor, ...]:
    return (*images, *(image.flip(-1) for image in images)) if settings.flip else images


def _lesson(
    backbone: Backbone,
    request: LearnRequest,
    stack: store.ConceptStack,
    settings: LearnSettings,
    pictures: concepts.ConceptImages,
    latents: list[torch.Tensor],
    memory: solve.Memory | None,
) -> Lesson:
    """Sequential initialisation: the adapter starts from the stack's, the word from its class noun
    - unless the method starts anew.
    """
    method, generator = METHODS[settings.method], torch.Generator().manual_seed(settings.seed)
    anew = method.starts_anew(settings)
    noun = "" if anew else request.noun
    word = backbone.word_start(noun, generator, settings.vectors or 1)
    kind = settings.adapter if method.adapter == "lora" else method.adapter
    if kind and stack.adapter is not None and kind_of(stack.adapter) != kind:
        raise SettingError(
            f"The method {settings.method} trains an adapter of the kind {kind}, but this stack's "
            f"is {kind_of(stack.adapter)}. "
            "Go on with a method of that kind, or start another stack with --stack."
        )
    compares = bool(method.importance or method.consolidation in ("distillation", "scores"))
    if compares and kind == "lora" and stack.adapter and rank_of(stack.adapter) > (stack.rank or 0):
        raise SettingError(
            f"{settings.method} compares adapters of one size, but this stack's LoRA has grown "
            "(c_lora, published). Go on with that, or start "
            "another stack with --stack."
        )
    adapter, held = stack.adapter, _held(memory, stack, settings)
    space = textspace.coordinates(held.moment.cpu()) if held and kind == "lora" else None
    if kind and (adapter is None or anew):
        assert settings.rank
        adapter = new_adapter(backbone, settings.rank, generator, kind, space)
    prompts = [
        concepts.prompts_for(request.token, noun, TEMPLATES, caption)
        for caption in pictures.captions
    ]
    penalty = _penalty(backbone, stack, settings, held)
    apart = (
        textspace.Apart(backbone, held.weight * settings.retention_apart, held.sizes)
        if held and settings.retention_apart
        else None
    )
    shown = [concepts.name_of(request.token, noun)]
    if (
        method.consolidation != "closed form"
    ):  # with it, what becomes of earlier concepts is solved for afterwards
        shown += [record.name for record in stack.records[:1]]
    weights = None
    if pictures.masks is not None:
        masks = zip(_mirrored(pictures.masks, settings), latents, strict=True)
        weights = [
            F.interpolate(mask[None], latent.shape[-2:], mode="area")[0].to(latent.device)
            for mask, latent in masks
        ]
    beneath = stack.adapter if anew else None
    source = _source(stack, request.images, token=request.token, noun=request.noun)
    return Lesson(
        latents,
        prompts,
        request.token,
        stack.tokens,
        adapter,
        word,
        penalty,
        apart,
        beneath,
        shown,
        weights,
        space,
        source,
    )


def _memory(
    backbone: Backbone,
    stack: store.ConceptStack,
    settings: LearnSettings,
    noun: str,
    on_progress: OnProgress,
    solves: bool = False,
) -> solve.Memory | None:
    """What is known of prompts without a picture; None where nothing is held at it or solved for.
    Where earlier concepts are solved for in the end,
    they need not be held meanwhile, and the memory is without them."""
    if not solves and not _hold(settings):
        return None
    return solve.memory_of(
        backbone, stack, on_progress, 0 if solves else None, [noun], settings.retention_words
    )


def _hold(settings: LearnSettings) -> float:
    """Weight of what is held in text space."""
    method = METHODS[settings.method]
    return settings.retention_weight or method.retention_weight if method.adapter else 0.0


def _held(
    memory: solve.Memory | None, stack: store.ConceptStack, settings: LearnSettings
) -> textspace.Retention | None:
    """What is held while something is learned."""
    weight = _hold(settings)
    return solve.retention(memory, stack, settings, weight) if memory and weight else None


def _penalty(
    backbone: Backbone,
    stack: store.ConceptStack,
    settings: LearnSettings,
    held: textspace.Retention | None,
) -> Penalty | None:
    """What the method adds to the loss, and what text space adds."""
    own = METHODS[settings.method].penalty(stack, settings, backbone.device)
    return (
        own
        if held is None
        else held
        if own is None
        else lambda factors: own(factors) + held(factors)
    )


@dataclass(frozen=True)
class _Newest:
    """What the stages after learning do with the newest concept, which is not on the stack yet."""

    backbone: Backbone
    stack: store.ConceptStack
    record: store.ConceptRecord
    latents: list[torch.Tensor]
    text: FrozenText
    penalty: Penalty | None
    settings: LearnSettings
    source: Mapping[str, str]
    on_progress: OnProgress

    @property
    def past(self) -> list[tuple[str, Adapter]]:
        """The teachers of DSC: how prompts name each concept so far, and the adapter as it was
        then.
        """
        known = [
            (record.name, self.stack.adapter_after(record.id)) for record in self.stack.records
        ]
        return [(name, adapter) for name, adapter in known if adapter is not None]

    @property
    def tau(self) -> float:
        """The temperature for mean errors; summed errors at 1 are mean errors at 1 / (4 h w)."""
        assert self.stack.tau is not None
        return {"calibrated": self.stack.tau, "mean": 1.0, "sum": 1 / self.latents[0].numel()}[
            self.settings.dc_scale
        ]

    @property
    def rows(self) -> int:
        """How many pictures go through the net at once in a step."""
        return max(1, (self.settings.batch or 1) // self.settings.accumulate)

    def calibrated(self, adapter: Adapter | None) -> float:
        """From 128 draws, or as many as learning had; twice a step's rows at once, as nothing is
        kept for a way back.
        """
        draws = min(128, (self.settings.steps or 1) * (self.settings.batch or 1))
        features = self.text(
            [f"a photo of a {name}" for name in (self.record.name, self.record.noun)]
        )
        with attached(self.backbone, adapter):
            found = classifier.calibration_errors(
                self.backbone, self.latents, features, draws, 2 * self.rows, self.on_progress
            )
        return classifier.calibrate(found)

    def consolidated(
        self, adapter: Adapter, scores: bool, snapshot: Path
    ) -> tuple[Adapter, list[float]]:
        past = [
            (name, grown(one, rank_of(adapter)) if kind_of(one) == "lora" else one)
            for name, one in self.past
        ]
        teachers = dsc.Teachers((self.record.name, adapter), past, self.record.noun)
        tau = self.tau if scores else None
        return dsc.consolidate(
            self.backbone,
            self.latents,
            teachers,
            self.text,
            tau,
            self.penalty,
            self.settings,
            snapshot,
            self.on_progress,
            self.source,
        )

    def fisher(self, adapter: Adapter) -> Adapter:
        tau = self.tau if METHODS[self.settings.method].importance == "scores" else None
        target = Target(
            self.latents,
            self.record.name,
            self.record.noun,
            [record.name for record in self.stack.records],
            tau,
        )
        # its samples are single ones, so it takes fewer at a time; it watches layers, which a
        # compiled net has not
        settings = replace(self.settings, batch=self.rows, compile=False)
        with (
            number_format(self.backbone, settings),
            attached(self.backbone, adapter, trainable=True) as factors,
        ):
            return fisher(self.backbone, factors, target, self.text, settings, self.on_progress)


def _digest(images: Path | list[Path], settings: ConsolidateSettings, *words: str) -> str:
    """Settings left alone are left out, so that a later version with settings more still knows what
    was learned.
    """
    usual = asdict(type(settings)())
    choices = {k: v for k, v in asdict(settings).items() if k not in MEANS and v != usual[k]}
    digest = hashlib.sha256(json.dumps([*words, choices], sort_keys=True).encode())
    for path in concepts.find_images(images):
        digest.update(_content(path))
    return digest.hexdigest()


def _groups(images: Path | list[Path]) -> list[tuple[str, list[Path]]]:
    """(name of the folder, its pictures): the folder itself, or the folders in it."""
    if isinstance(images, Path) and images.is_dir():
        folders = sorted(p for p in images.iterdir() if p.is_dir() and not p.name.startswith("."))
        return [(folder.name, concepts.find_images(folder)) for folder in folders or [images]]
    return [("", concepts.find_images(images))]


def _record(
    request: LearnRequest,
    settings: LearnSettings,
    pictures: concepts.ConceptImages,
    learned: Learned,
    stack: store.ConceptStack,
) -> store.ConceptRecord:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    identity = hashlib.sha256(
        f"{stack.fingerprint}/{request.token}/{now}/{len(stack.records)}".encode()
    ).hexdigest()[:12]
    tail = learned.losses[-max(1, len(learned.losses) // 10) :]
    with_noun = not METHODS[settings.method].starts_anew(settings)
    noun = request.noun if with_noun else ""
    prompts = [
        p
        for caption in dict.fromkeys(pictures.captions)
        for p in concepts.prompts_for(request.token, noun, TEMPLATES, caption)
    ]
    assert settings.steps
    return store.ConceptRecord(
        id=identity,
        token=request.token,
        noun=request.noun,
        method=settings.method,
        images=len(pictures.images),
        steps=settings.steps,
        seed=settings.seed,
        prompts=prompts,
        hashes=list(pictures.hashes),
        learned=now,
        loss=sum(tail) / len(tail),
        preview=pictures.preview,
        settings=asdict(settings),
        with_noun=with_noun,
        request=request.digest,
    )
