"""Stage 6: the concepts a checkpoint has learned, and the only functions that change them.

Every change returns a new stack; the original is not changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .adapters.adapter import Adapter, kind_of, rank_of
from .errors import StackError
from .stackschema import HISTORY
from .words import name_of, position_of


@dataclass(frozen=True)
class ConceptRecord:
    """What the header stores about one concept."""

    id: str
    token: str
    noun: str
    method: str
    images: int
    steps: int
    seed: int
    prompts: list[str]
    hashes: list[str]  # SHA-256 of the training pictures' files
    learned: str  # ISO 8601 date and time, UTC
    loss: float  # mean over the last tenth of the steps
    preview: str  # JPEG, base64
    settings: dict[str, Any]
    with_noun: bool = True  # whether prompts name it "V1 mug" or "V1"
    request: str = ""  # hash of the request: pictures, captions, words, settings
    consolidated: str = ""  # hash of the last request to consolidate it
    # the looks at it while it was learned (`watch`): step, likeness, how far earlier ones moved
    watched: list[list[float]] = field(default_factory=list)
    features: str = ""  # of its pictures, if the user wanted them kept (`likeness.packed`)
    losses: list[float] = field(default_factory=list)  # the curve of learning it (`curves.thinned`)
    later: dict[str, Any] = field(default_factory=dict)  # what later releases added, kept as it is

    @property
    def name(self) -> str:
        """How prompts name it."""
        return name_of(self.token, self.noun if self.with_noun else "")

    def with_rank_of(self, adapter: Adapter | None) -> ConceptRecord:
        """The record with the rank of this LoRA, which the stack has from this concept on."""
        if not adapter or kind_of(adapter).name != "lora":
            return self
        return replace(self, settings={**self.settings, "rank": rank_of(adapter)})


@dataclass(frozen=True)
class CheckpointInfo:
    """What a stack stores about its checkpoint, so that it can be exported without loading it."""

    preset: str = "sd1"
    prediction: str = "epsilon"
    word_widths: Sequence[int] = ()  # how many numbers of a word's vector each text encoder takes
    clip_skip: int = 1  # the layer of SD1.x's text encoder that is used, counted from the end
    later: dict[str, Any] = field(default_factory=dict)  # as of a record


@dataclass
class ConceptStack:
    """The concepts a checkpoint has learned, in order.

    `adapter` draws all of them; `pool` holds the adapter as it was after each earlier concept.
    """

    fingerprint: str
    records: list[ConceptRecord] = field(default_factory=list)
    words: dict[str, Tensor] = field(default_factory=dict)  # by concept id
    adapter: Adapter | None = None
    pool: dict[str, Adapter] = field(default_factory=dict)  # by id, if there was an adapter
    # by id: a concept's own adapter, if a solution for all concepts replaced it
    targets: dict[str, Adapter] = field(default_factory=dict)
    rank: int | None = None
    fishers: dict[str, Adapter] = field(default_factory=dict)  # by id; none for methods without EWC
    tau: float | None = None  # temperature of the DC scores, calibrated on the first concept
    unconsolidated: Adapter | None = None  # the newest adapter before its consolidation
    checkpoint: CheckpointInfo = field(default_factory=CheckpointInfo)
    identity: str = ""  # whose the exported files are; set when the stack is first stored
    history: int = HISTORY  # how many earlier versions are kept
    later: dict[str, Any] = field(default_factory=dict)  # as of a record

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Word vectors by token, for `Backbone.encode_prompts`."""
        return {record.token: self.words[record.id] for record in self.records}

    @property
    def nouns(self) -> dict[str, str]:
        """Class nouns by token."""
        return {record.token: record.noun for record in self.records}

    @property
    def owner(self) -> str:
        """Its identity.

        A stack that was never stored, or that an early version wrote, has one derived from its
        first concept.
        """
        if self.identity or not self.records:
            return self.identity
        beginning = f"{self.fingerprint}/{self.records[0].id}"
        return hashlib.sha256(beginning.encode()).hexdigest()[:16]

    @property
    def adapters(self) -> list[Adapter]:
        """All adapters and Fishers in the stack."""
        single = [adapter for adapter in (self.adapter, self.unconsolidated) if adapter]
        return [*single, *self.pool.values(), *self.targets.values(), *self.fishers.values()]

    def find(self, token: str) -> ConceptRecord | None:
        """The concept with this word, in any case."""
        return next((r for r in self.records if r.token.lower() == token.lower()), None)

    def index_of(self, token: str) -> int:
        """Errors: StackError for a token that is not on the stack."""
        return position_of(token, [one.token for one in self.records])

    def adapter_after(self, concept: str) -> Adapter | None:
        """The adapter as it was right after this concept was learned."""
        newest = self.records and concept == self.records[-1].id
        return self.adapter if newest else self.pool.get(concept)

    # --- changes ------------------------------------------------------------------------------

    def learned(
        self,
        record: ConceptRecord,
        word: Tensor,
        adapter: Adapter | None,
        *,
        fisher: Adapter | None = None,
        keep_rank: bool = False,
    ) -> ConceptStack:
        """With one more concept on top; the previous adapter goes into the pool.

        The stack takes the rank the concept was learned with, unless `keep_rank`.
        """
        after = self._copy()
        if self.records and self.adapter is not None:
            after.pool[self.records[-1].id] = self.adapter
        after.records.append(record)
        after.words[record.id] = word
        after.adapter, after.unconsolidated = adapter, None
        if adapter is not None and not keep_rank:
            after.rank = record.settings.get("rank", self.rank)
        if fisher is not None:
            after.fishers[record.id] = fisher
        return after

    def consolidated(self, adapter: Adapter, request: str, fisher: Adapter | None) -> ConceptStack:
        """With the newest concept's adapter replaced by further training (DSC); `request`: the
        request's digest.
        """
        after = self._copy()
        after.records[-1] = replace(self.records[-1], consolidated=request)
        after.adapter, after.unconsolidated = adapter, self.adapter
        if fisher is not None:
            after.fishers[self.records[-1].id] = fisher
        return after

    def solved(self, adapter: Adapter, target: Adapter | None) -> ConceptStack:
        """With one LoRA for all concepts; `target`: the newest one's target from now on.

        Fishers are dropped, because their factors no longer exist.
        """
        after = self._copy()
        after.unconsolidated = self.unconsolidated or self.adapter
        after.adapter, after.fishers = adapter, {}
        after.records[-1] = self.records[-1].with_rank_of(adapter)
        after.rank = after.records[-1].settings["rank"]
        if target is not None:
            after.targets[self.records[-1].id] = target
        return after

    def calibrated(self, tau: float) -> ConceptStack:
        """With a temperature for its DC scores."""
        return replace(self._copy(), tau=tau)

    def as_learned(self) -> ConceptStack:
        """With the current adapter counted as the newest concept's learned one, not consolidated."""
        return replace(self._copy(), unconsolidated=None)

    def settled(self) -> ConceptStack:
        """With the rank of its newest concept."""
        return replace(self._copy(), rank=self.records[-1].settings["rank"])

    def with_solution(
        self, adapter: Adapter, rank: int, targets: Mapping[str, Adapter]
    ) -> ConceptStack:
        """For concepts without adapter so far: with one LoRA for all, and each one's target."""
        return replace(self._copy(), adapter=adapter, rank=rank, targets=dict(targets))

    def with_target(self, concept: str, target: Adapter) -> ConceptStack:
        """With a new target for one concept."""
        after = self._copy()
        after.targets[concept] = target
        return after

    def undone(self) -> ConceptStack:
        """Without the newest concept, its word, record and Fisher; the adapter is the previous one.

        Errors: StackError for an empty stack.
        """
        if not self.records:
            raise StackError("There is no concept to undo: the stack is empty.")
        after = self._copy()
        gone = after.records.pop()
        del after.words[gone.id]
        after.fishers.pop(gone.id, None)
        after.targets.pop(gone.id, None)
        after.unconsolidated = None
        if not after.records:
            after.tau = after.rank = after.adapter = None
            return after
        newest = after.records[-1]
        after.rank = newest.settings.get("rank", self.rank)  # the closed form may have raised it
        after.adapter = after.pool.pop(newest.id, None)
        return after

    def as_of(self, count: int, *, consolidated: bool = True) -> ConceptStack:
        """The stack as it was with its first `count` concepts.

        `consolidated` false: before the newest of them was consolidated.
        """
        past = self._copy()
        while len(past.records) > max(count, 0):
            past = past.undone()
        if not consolidated and past.unconsolidated is not None:
            past.adapter = past.unconsolidated
        return past

    def without(self, concept: str, later: Mapping[str, Adapter]) -> ConceptStack:
        """Without one concept that is not the newest; `later`: by id, the adapters after each later
        concept, solved again without it.
        """
        after = self._copy()
        after.records = [record for record in self.records if record.id != concept]
        del after.words[concept]
        after.pool.pop(concept, None)
        after.targets.pop(concept, None)
        newest = after.records[-1].id
        after.adapter, after.unconsolidated = later.get(newest, self.adapter), None
        after.fishers = {}
        after.pool |= {one: adapter for one, adapter in later.items() if one != newest}
        after.records = [r.with_rank_of(after.adapter_after(r.id)) for r in after.records]
        after.rank = after.records[-1].settings["rank"]
        return after

    def in_place_of_nothing(self, other: ConceptStack) -> ConceptStack:
        """The other stack's concepts, as this stack's own."""
        return replace(
            other._copy(),
            checkpoint=replace(self.checkpoint, clip_skip=other.checkpoint.clip_skip),
            identity=self.identity,
            history=self.history,
        )

    def ready_to_merge(self, other: ConceptStack, targets: Mapping[str, Adapter]) -> ConceptStack:
        """With the targets of the other's concepts, before these are put on top one by one."""
        after = self._copy()
        after.targets |= targets
        after.fishers = {}
        after.tau = self.tau or other.tau
        after.rank = max(filter(None, (self.rank, other.rank)), default=None)
        return after

    def _copy(self) -> ConceptStack:
        names = ("records", "words", "pool", "targets", "fishers")
        return dataclasses.replace(self, **{name: getattr(self, name).copy() for name in names})
