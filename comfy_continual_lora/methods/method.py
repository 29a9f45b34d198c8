"""What a method defines, stage by stage; the defaults are plain sequential learning (`lora`).

check        refuse combinations that can't work, before anything is loaded
start        the initial adapter and word
penalties    what is added to the loss
consolidate  further training after that (DSC)
remember     the stack with the new concept, and what later concepts need to know of it
rows         how many rows go through the net at once, for the plan
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..adapters import kind_with
from ..adapters.adapter import KINDS, Adapter, kind_of, new_adapter, rank_of
from ..concept import Concept
from ..diffusion import generator_for
from ..errors import SettingError
from ..files import real_file
from ..learn import TrainingInputs
from ..mentions import previewed
from ..penalty import Penalty
from ..presets import ADAPTERS
from ..session import Session, Snapshots
from ..settings import LearnSettings, ResolvedSettings
from ..solve import Target
from ..stack import CheckpointInfo, ConceptRecord, ConceptStack
from ..stackfile import read_shapes
from ..stacktensors import BYTES
from ..targets import own_adapters, retention_penalty, targets_of, with_prompts
from ..textspace import PaddingPenalty, RetentionPenalty, coordinates


@dataclass(frozen=True)
class StackSummary:
    """The parts of a stack's header that decide which methods can continue it."""

    kind: str = ""  # of its adapter; empty if there is none yet
    rank: int | None = None  # that its concepts are learned with
    adapter_rank: int | None = None  # that its adapter has now
    without_fisher: tuple[str, ...] = ()  # words of concepts that EWC can't hold
    ranks: tuple[int | None, ...] = ()  # that each of its concepts was learned with
    checkpoint: CheckpointInfo | None = None  # as its concepts were learned, if it has any
    size: int = 0  # of its file in bytes, if it was read from one

    @property
    def count(self) -> int:
        """How many concepts it has."""
        return len(self.ranks)


@dataclass(frozen=True)
class Start:
    """Where learning begins.

    `adapter` is None if none has been learned and the method trains none; `retention` is the
    penalty in text space.
    """

    adapter: Adapter | None
    word: Tensor
    frozen_adapter: Adapter | None = None
    preconditioner: Tensor | None = None
    retention: RetentionPenalty | None = None


@dataclass(frozen=True)
class LearnedConcept:
    """Everything the stages after learning can use."""

    session: Session
    settings: ResolvedSettings
    concept: Concept
    record: ConceptRecord
    word: Tensor  # as learned
    penalties: Mapping[str, Penalty]
    snapshots: Snapshots


class Rows(NamedTuple):
    """Pairs of image and prompt that go through the net at once: in a step, and at most."""

    step: int
    most: int


class Sizes(NamedTuple):
    """How many numbers there are."""

    adapter: int  # of the stack once the concept is on it
    word: int
    dense: int  # all K and V
    width: int  # of text features

    def prompts(self, earlier: int) -> int:
        """Bytes of a concept's prompts on the stack, and with the first of ordinary ones."""
        rows = 2 * 100 * self.width  # a hundred or fewer
        return rows if earlier else rows + 4 * self.width * (self.width + 1)


class Method:
    """Subclasses override what they do differently."""

    id: ClassVar[str]
    # weight of the drift in text space, unless the setting overrides it
    retention_weight: ClassVar[float] = 0.0
    # whether previews also show an earlier concept
    previews_earlier: ClassVar[bool] = True

    # --- before anything is loaded ----------------------------------------------------------------

    def adapter_kind(self, settings: LearnSettings) -> str:
        """The kind of adapter it trains besides the word; "" for the word only."""
        return settings.adapter

    def takes(self, kind: str) -> bool:
        """Whether it can learn with this kind of adapter."""
        return True

    def check(self, settings: LearnSettings, stack: StackSummary) -> None:
        """Errors: SettingError for settings that don't go together, or don't suit the stack."""
        kind = self.adapter_kind(settings)
        if not self.takes(settings.adapter):
            others = " or ".join(one for one in ADAPTERS if self.takes(one))
            raise SettingError(
                f"{self.id} can't learn with the `adapter` {settings.adapter}. Choose {others}, or "
                f"another `method` with {settings.adapter}."
            )
        if kind and stack.kind and kind != stack.kind:
            raise SettingError(
                f"The `method` {self.id} trains an adapter of the kind {kind}, but this stack's is "
                f"{stack.kind}. Continue with a method of that kind, or start another `stack`."
            )

    def fresh_adapter(self, settings: LearnSettings) -> bool:
        """Whether every concept gets its own LoRA on top of the frozen earlier ones, and a random
        word without class noun.
        """
        return False

    def rows(self, settings: ResolvedSettings, earlier: int) -> Rows:
        """`earlier`: how many concepts are on the stack."""
        step = -(-settings.batch // settings.accumulate)
        return Rows(step, step)

    def kept_bytes(self, settings: ResolvedSettings, sizes: Sizes, earlier: int) -> int:
        """By how many bytes a concept lets the stack grow, about; `earlier` concepts are on it."""
        prompts = sizes.prompts(earlier) if self.held_weight(settings) else 0
        return 4 * (sizes.adapter + sizes.word) + prompts

    def penalty_bytes(self, settings: ResolvedSettings, sizes: Sizes, earlier: int) -> int:
        """What its `penalties` take on the device, for the gradient too."""
        return 0

    # --- learning ---------------------------------------------------------------------------------

    def start(self, session: Session, concept: Concept, settings: ResolvedSettings) -> Start:
        """Sequential: the adapter starts from the stack's, the word from its class noun."""
        stack, backbone = session.stack, session.backbone
        generator = torch.Generator().manual_seed(settings.seed)
        fresh = self.fresh_adapter(settings)
        if fresh and stack.records:  # else A and the word would start where the first one's did
            generator = generator_for(settings.seed, "start", len(stack.records))
        noun = concept.noun if concept.with_noun else ""
        word = backbone.word_start(noun, generator, settings.vectors)
        self.encode(session, concept.noun, settings)
        held = self.retention(session, settings)
        kind = self.adapter_kind(settings)
        preconditioner = None
        if held is not None and kind and KINDS[kind].preconditioned:
            preconditioner = coordinates(held.moment.cpu())
        adapter = stack.adapter
        if kind and (adapter is None or fresh):
            adapter = new_adapter(backbone, settings.rank, generator, kind, preconditioner)
        frozen_adapter = stack.adapter if fresh else None
        return Start(adapter, word, frozen_adapter, preconditioner, held)

    def held_weight(self, settings: LearnSettings) -> float:
        """Weight of the retention penalty; 0 for none."""
        if not self.adapter_kind(settings):
            return 0.0
        return settings.retention_weight or self.retention_weight

    def held(self, session: Session) -> list[Target]:
        """What earlier concepts' prompts are held at while learning."""
        stack = session.stack
        return [one for one in targets_of(stack, own_adapters(stack)) if one.adapter]

    def encode(self, session: Session, noun: str, settings: ResolvedSettings) -> None:
        """Have the session's stack hold the prompts that `retention` needs, with this class noun."""
        if self.held_weight(settings):
            stack = session.stack
            bank = session.bank(stack, settings.retention_words)
            language = settings.retention_language
            session.stack = with_prompts(bank, stack, [noun], language=language)

    def retention(self, session: Session, settings: ResolvedSettings) -> RetentionPenalty | None:
        """The penalty that protects prompts during learning; None for none."""
        weight = self.held_weight(settings)
        if not weight:
            return None
        stack = session.stack
        assert stack.ordinary
        ordinary = stack.ordinary.moment(settings.retention_language)
        return retention_penalty(session.backbone, ordinary, self.held(session), settings, weight)

    def penalties(
        self, session: Session, settings: ResolvedSettings, held: RetentionPenalty | None
    ) -> dict[str, Penalty]:
        """Penalties on the factors that protect the stack's concepts."""
        return {} if held is None else {"retention": held}

    def word_penalties(
        self, session: Session, settings: ResolvedSettings, held: RetentionPenalty | None
    ) -> dict[str, Penalty]:
        """Further penalties while the word is learned too."""
        if held is None or not settings.retention_apart:
            return {}
        weight = held.weight * settings.retention_apart
        return {"padding": PaddingPenalty(session.backbone, weight, held.sizes)}

    def training_inputs(
        self,
        session: Session,
        concept: Concept,
        settings: ResolvedSettings,
        start: Start,
        penalties: Mapping[str, Penalty],
    ) -> TrainingInputs:
        """What the training loop takes."""
        names = [concept.name]
        if self.previews_earlier:
            names += [record.name for record in session.stack.records[:1]]
        return TrainingInputs(
            concept.latents,
            concept.prompts,
            concept.token,
            session.stack.tokens,
            start.adapter,
            start.word,
            trains_adapter=bool(self.adapter_kind(settings)),
            penalties={**penalties, **self.word_penalties(session, settings, start.retention)},
            frozen_adapter=start.frozen_adapter,
            previewed=previewed(settings.preview_prompts, names),
            nouns={**session.stack.nouns, concept.token: concept.noun},
            masks=concept.masks,
            preconditioner=start.preconditioner,
            source=concept.source,
        )

    # --- afterwards -------------------------------------------------------------------------------

    def consolidate(self, learned: LearnedConcept, adapter: Adapter | None) -> Adapter | None:
        """The adapter after further training; called in every process."""
        return adapter

    def remember(self, learned: LearnedConcept, adapter: Adapter | None) -> ConceptStack:
        """The stack with the concept on it; called in the first process only."""
        session, settings = learned.session, learned.settings
        fisher = self.fisher(learned, adapter) if adapter else None
        stack = session.stack.learned(learned.record, learned.word, adapter, fisher=fisher)
        if stack.ordinary is None:
            return stack
        return with_prompts(session.bank(stack), stack, language=settings.retention_language)

    def fisher(self, learned: LearnedConcept, adapter: Adapter) -> Adapter | None:
        """The concept's Fisher, if the method holds later concepts by it."""
        return None


def summary_of(stack: ConceptStack) -> StackSummary:
    """The summary of a stack in memory."""
    ranks = tuple(record.settings.get("rank") for record in stack.records)
    checkpoint = stack.checkpoint if stack.records else None
    if not stack.adapter:
        return StackSummary(rank=stack.rank, ranks=ranks, checkpoint=checkpoint)
    kind = kind_of(stack.adapter).name
    without = tuple(record.token for record in stack.records if record.id not in stack.fishers)
    rank = rank_of(stack.adapter) if kind == "lora" else None
    return StackSummary(kind, stack.rank, rank, without, ranks, checkpoint)


def summary_of_file(path: Path, replaced: str = "") -> StackSummary:
    """The summary of a stack file, from its header; an empty one if there is no file.

    `replaced`: a word whose concept does not count if it is the newest.
    """
    if not real_file(path).exists():
        return StackSummary()
    header, shapes = read_shapes(path)
    records, rank, prefix = header["concepts"], header["rank"], "adapter."
    size = path.stat().st_size
    # the checkpoint is opened as the stack is, also where its only concept gives way
    checkpoint = CheckpointInfo(**header["base"]) if records else None
    if records and records[-1]["token"].lower() == replaced.lower():
        records, newest = records[:-1], records[-1]
        prefix = _adapter_of(records, shapes)
        rank = records[-1]["settings"].get("rank", rank) if prefix else None
        gone = [one for name, one in shapes.items() if name.split(".")[1] == newest["id"]]
        if prefix != "adapter.":
            gone += [one for name, one in shapes.items() if name.startswith("adapter.")]
        size -= sum(BYTES[one.dtype] * math.prod(one.sizes) for one in gone)
    if not records:
        return StackSummary(checkpoint=checkpoint)
    sizes = {n: one.sizes for n, one in shapes.items() if prefix and n.startswith(prefix)}
    kind = kind_with({name.rpartition(".")[2] for name in sizes}) or ""
    of_adapter = [one[0] for name, one in sizes.items() if kind == "lora" and name.endswith(".A")]
    fishers = {name.split(".")[1] for name in shapes if name.startswith("fisher.")}
    return StackSummary(
        kind,
        rank,
        next(iter(of_adapter), None),
        tuple(one["token"] for one in records if one["id"] not in fishers),
        tuple(one["settings"].get("rank") for one in records),
        checkpoint,
        size,
    )


def _adapter_of(records: Sequence[Mapping[str, Any]], shapes: Iterable[str]) -> str:
    """What the names of the adapter of a stack's first concepts begin with; "" if they have none."""
    own = {name.split(".")[1] for name in shapes if name.startswith(("pool.", "wish."))}
    if not own & {record["id"] for record in records}:
        return ""
    trained = f"pool.{records[-1]['id']}."
    return trained if any(name.startswith(trained) for name in shapes) else "adapter."
