"""Stage 6: the concepts a checkpoint has learned, and the only functions that change them.

Every change returns a new stack; the original is not changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .adapters.adapter import Adapter, kind_of, rank_of
from .adapters.packed import Packed, pack
from .stackschema import HISTORY, owner_of
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


@dataclass(frozen=True)
class PromptRows:
    """The prompts about a concept, as rows with their second moment: rows^T rows = E c c^T."""

    alone: Tensor  # (k, d_text) float16: prompts that name no other concept
    shared: Tensor  # (m, d_text) float16: those with the concepts before and after it; m may be 0

    @property
    def rows(self) -> Tensor:
        """All of them, each kind with half the weight, float32."""
        if not len(self.shared):
            return self.alone.float()
        return torch.cat([self.alone, self.shared]).float() * 0.5**0.5


@dataclass(frozen=True)
class Ordinary:
    """The second moments of prompts that name no concept, (d_text, d_text) float32."""

    listed: Tensor  # over lists of common words and the class nouns
    count: int  # how many prompts that is
    nouns: tuple[str, ...]
    drawn: Tensor | None = None  # over a sample of the tokenizer's vocabulary
    share: float | None = None  # as in `textspace.moment`

    def moment(self, language: float) -> Tensor:
        """Of both; `language` is the share of the sample."""
        if not language:
            return self.listed
        assert self.drawn is not None
        return (1 - language) * self.listed + language * self.drawn


@dataclass
class ConceptStack:
    """The concepts a checkpoint has learned, in order.

    `adapter` draws all of them. `pool` holds the adapter as it was after an earlier concept, if it
    was trained. A solution of the closed form is not kept: `targets`, `prompts` and `ordinary` are
    all it takes to solve for it again (`consolidation.as_of`).
    """

    fingerprint: str
    records: list[ConceptRecord] = field(default_factory=list)
    words: dict[str, Tensor] = field(default_factory=dict)  # by concept id
    adapter: Adapter | None = None
    pool: dict[str, Adapter] = field(default_factory=dict)  # by id, if there was an adapter
    # by id: a concept's own adapter, if a solution for all concepts replaced it
    targets: dict[str, Packed] = field(default_factory=dict)
    prompts: dict[str, PromptRows] = field(default_factory=dict)  # by id
    ordinary: Ordinary | None = None
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
        """Whose the exported files are."""
        return owner_of(self.identity, self.fingerprint, [record.id for record in self.records])

    @property
    def adapters(self) -> list[Adapter]:
        """All adapters and Fishers in the stack but targets."""
        single = [adapter for adapter in (self.adapter, self.unconsolidated) if adapter]
        return [*single, *self.pool.values(), *self.fishers.values()]

    def find(self, token: str) -> ConceptRecord | None:
        """The concept with this word, in any case."""
        return next((r for r in self.records if r.token.lower() == token.lower()), None)

    def index_of(self, token: str) -> int:
        """Errors: StackError for a token that is not on the stack."""
        return position_of(token, [one.token for one in self.records])

    def adapter_after(self, concept: str) -> Adapter | None:
        """The adapter as it was right after this concept was learned; None if there was none, or
        it was a solution.
        """
        newest = self.records and concept == self.records[-1].id
        return self.adapter if newest else self.pool.get(concept)

    def can_solve(self, concept: str) -> bool:
        """Whether the adapter after this concept is a solution that can be solved for again."""
        if self.ordinary is None or concept not in self.targets or concept not in self.prompts:
            return False
        # one that was consolidated by DSC was trained further
        return not any(one.consolidated for one in self.records if one.id == concept)

    # --- changes ------------------------------------------------------------------------------

    def learned(
        self,
        record: ConceptRecord,
        word: Tensor,
        adapter: Adapter | None,
        *,
        fisher: Adapter | None = None,
    ) -> ConceptStack:
        """With one more concept on top; the previous adapter goes into the pool.

        The stack takes the rank the concept was learned with.
        """
        after = self._with_adapter_kept()
        after.records.append(record)
        after.words[record.id] = word
        after.adapter, after.unconsolidated = adapter, None
        if adapter is not None:
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

    def solved(self, adapter: Adapter) -> ConceptStack:
        """With one LoRA for all concepts.

        Fishers are dropped, because their factors no longer exist.
        """
        after = self._copy()
        after.unconsolidated = self.unconsolidated or self.adapter
        after.adapter, after.fishers = adapter, {}
        after.records[-1] = replace(self.records[-1].with_rank_of(adapter), consolidated="")
        after.rank = after.records[-1].settings["rank"]
        return after

    def calibrated(self, tau: float) -> ConceptStack:
        """With a temperature for its DC scores."""
        return replace(self._copy(), tau=tau)

    def as_learned(self) -> ConceptStack:
        """With the current adapter counted as the newest concept's learned one, not consolidated."""
        return replace(self._copy(), unconsolidated=None)

    def with_target(self, concept: str, target: Adapter) -> ConceptStack:
        """With a new target for one concept, packed."""
        after = self._copy()
        after.targets[concept] = pack(target)
        return after

    def with_prompts(self, prompts: Mapping[str, PromptRows], ordinary: Ordinary) -> ConceptStack:
        """With the prompts of these concepts, and ordinary ones.

        Solutions that earlier versions of this program kept are dropped.
        """
        after = replace(self._copy(), ordinary=ordinary)
        after.prompts |= prompts
        after.pool = {one: held for one, held in after.pool.items() if not after.can_solve(one)}
        return after

    def with_solution(self, adapter: Adapter | None) -> ConceptStack:
        """With another adapter for the same concepts, which takes the place of all trained ones that
        are not in the pool.
        """
        after = replace(self._copy(), adapter=adapter, unconsolidated=None, fishers={})
        after.records = [
            one if one.id in self.pool else replace(one, consolidated="") for one in self.records
        ]
        if after.records:
            after.records[-1] = after.records[-1].with_rank_of(adapter)
            after.rank = after.records[-1].settings.get("rank", self.rank)
        return after

    def first(self, count: int, adapter: Adapter | None) -> ConceptStack:
        """Only the first `count` concepts, fewer than all, and the adapter they had then."""
        after = self._copy()
        for gone in self.records[count:]:
            after._drop(gone.id)
        after.records, after.unconsolidated = self.records[:count], None
        if not after.records:
            after.tau = after.rank = after.adapter = after.ordinary = None
            return after
        newest = after.records[-1]
        after.pool.pop(newest.id, None)
        after.adapter = adapter
        after.rank = newest.settings.get("rank", self.rank)  # the closed form may have raised it
        if adapter is None and not (after.pool or after.targets):
            after.rank = None  # words alone
        return after

    def only(self, tokens: Sequence[str]) -> ConceptStack:
        """Only these concepts, in the stack's order, with no adapter: one has to be solved for.

        Errors: StackError for a token that is not on the stack.
        """
        after = replace(self._copy(), adapter=None, unconsolidated=None, pool={}, fishers={})
        chosen = {self.index_of(token) for token in tokens}
        after.records = [record for n, record in enumerate(self.records) if n in chosen]
        for record in self.records:
            if record not in after.records:
                after._drop(record.id)
        return after

    def _drop(self, concept: str) -> None:
        """Forget all that is kept of a concept besides its record."""
        del self.words[concept]
        for kept in (self.pool, self.targets, self.prompts, self.fishers):
            kept.pop(concept, None)

    def in_place_of_nothing(self, other: ConceptStack) -> ConceptStack:
        """The other stack's concepts, as this stack's own, with what they were learned with."""
        learned = other.checkpoint
        return replace(
            other._copy(),
            checkpoint=replace(
                self.checkpoint, prediction=learned.prediction, clip_skip=learned.clip_skip
            ),
            identity=self.identity,
            history=self.history,
        )

    def joined(self, other: ConceptStack, records: Sequence[ConceptRecord]) -> ConceptStack:
        """With concepts of another stack on top, which keep their targets; an adapter has to be
        solved for.
        """
        after = replace(self._with_adapter_kept(), fishers={}, tau=self.tau or other.tau)
        after.records += records
        after.words |= {one.id: other.words[one.id] for one in records}
        after.targets |= {
            one.id: other.targets[one.id] for one in records if one.id in other.targets
        }
        after.rank = max(filter(None, (self.rank, other.rank)), default=None)
        return after

    def _with_adapter_kept(self) -> ConceptStack:
        """With the present adapter in the pool, if it can't be solved for again."""
        after = self._copy()
        if self.records and self.adapter is not None and not self.can_solve(self.records[-1].id):
            after.pool[self.records[-1].id] = self.adapter
        return after

    def _copy(self) -> ConceptStack:
        names = ("records", "words", "pool", "targets", "prompts", "fishers")
        return dataclasses.replace(self, **{name: getattr(self, name).copy() for name in names})
