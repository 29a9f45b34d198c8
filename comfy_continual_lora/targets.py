"""Stage 4: what each concept's prompts should be mapped to.

    words, records -> `PromptBank`: second moments of the prompts about each concept -> the stack
    a stack that has them -> `Target`s for `solve`, or a penalty, without encoding anything

A concept's target is what its own adapter, right after it was learned, did to its own prompts. Once
it is known, neither needs the text encoders again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapters.adapter import Adapter
from .language import LANGUAGE, language_prompts
from .moments import MomentCache
from .progress import OnProgress, Progress, ignore
from .settings import RetentionSettings, SolveSettings
from .solve import Target, rows_of, solve
from .stack import ConceptRecord, ConceptStack, Ordinary, PromptRows
from .textspace import (
    RetentionPenalty,
    difference,
    noun_prompts,
    ordinary_prompts,
    shrunk,
    single_prompts,
    sizes,
)

if TYPE_CHECKING:
    from .checkpoint.backbone import Backbone

# In the penalty each earlier concept weighs 1, and all together at most this.
MAX_EARLIER_WEIGHT = 3.0
# The share of a moment's trace that the stack keeps. Over prompts of all kinds the solution is as
# good as with whole moments, which take three times the room: benchmarks/LOG.md, 2026-11-29.
KEPT = 0.998
ENERGY = 0.9995  # of what its concept's own adapter did, a target keeps this share (there, too)
NEIGHBORS = 2  # a concept's prompts name it beside each of so many before and after it


class PromptBank:
    """Encodes the prompts about concepts, and ordinary ones.

    In a prompt about two concepts, the positions before the second one's word count for the first,
    those from there on for the second, and the padding for both.
    """

    def __init__(
        self,
        backbone: Backbone,
        words: Mapping[str, Tensor],
        share: float | None = None,
        cache: Path | None = None,
        on_progress: OnProgress = ignore,
    ) -> None:
        """`words`: vectors by token; `share` as in `textspace.moment`, for all prompts but those about
        two concepts; `cache`: a folder of moments.
        """
        self.backbone, self.words, self.share = backbone, dict(words), share
        self.moments = MomentCache(backbone, cache)
        self.on_progress = on_progress
        self._alone: dict[str, Tensor] = {}  # by id
        self._pairs: dict[tuple[str, str], Tensor] = {}  # by ids, (t, d)

    # --- ordinary prompts ---------------------------------------------------------------------

    def ordinary(
        self, nouns: Iterable[str], known: Ordinary | None = None, language: float = LANGUAGE
    ) -> Ordinary:
        """The moments of prompts that name no concept, with these class nouns among them.

        Only what `known` lacks is encoded; its other nouns stay, too. No sample of the vocabulary is
        encoded if `language` is 0.
        """
        if known is None or known.share != self.share:
            prompts = ordinary_prompts(())
            listed = self.moments({}, prompts, self.share)
            known = Ordinary(listed, len(prompts), (), share=self.share)
        for noun in dict.fromkeys(nouns):
            if noun not in known.nouns:
                known = replace(self._changed_by(known, noun, 1), nouns=(*known.nouns, noun))
        if language and known.drawn is None:
            known = replace(known, drawn=self._language())
        return known

    def without_nouns(self, known: Ordinary, nouns: Iterable[str]) -> Ordinary:
        """The same without those of its class nouns that are not among these."""
        for noun in set(known.nouns) - set(nouns):
            left = tuple(one for one in known.nouns if one != noun)
            known = replace(self._changed_by(known, noun, -1), nouns=left)
        return known

    def _changed_by(self, known: Ordinary, noun: str, sign: int) -> Ordinary:
        """`listed` with the prompts about one noun (`sign` 1), or without them (-1)."""
        prompts = noun_prompts(noun)
        count = known.count + sign * len(prompts)
        own = self.moments({}, prompts, self.share)
        listed = (known.count * known.listed + sign * len(prompts) * own) / count
        return replace(known, listed=listed, count=count)

    def _language(self) -> Tensor:
        """The moment of a wide sample of language."""
        prompts = language_prompts(self.backbone.tokenizer)

        def report(done: int) -> None:
            self.on_progress(Progress("language", done, len(prompts)))

        return self.moments({}, prompts, self.share, report)

    # --- prompts about concepts ---------------------------------------------------------------

    def alone(self, record: ConceptRecord) -> Tensor:
        """Of prompts that name no other concept, (d, d)."""
        if record.id not in self._alone:
            prompts = single_prompts(record)
            self._alone[record.id] = self.moments(self.words, prompts, self.share)
        return self._alone[record.id]

    def shared(self, records: Sequence[ConceptRecord], number: int) -> Tensor:
        """Of prompts that also name a neighbor of this concept, (d, d); 0 if it has none."""
        width = self.backbone.word_width
        total, count = torch.zeros(width, width), 0.0
        for other in _near([number], len(records)):
            for first, second in ((number, other), (other, number)):
                own, padding = self._pair(records[first], records[second], number == second)
                total += own.T @ own + 0.5 * padding.T @ padding
                count += len(own) + 0.5 * len(padding)
        return total / max(count, 1.0)

    def moment(self, records: Sequence[ConceptRecord], number: int) -> Tensor:
        """Of all prompts about a concept, each kind with half the weight, (d, d)."""
        alone, shared = self.alone(records[number]), self.shared(records, number)
        return (alone + shared) / 2 if shared.any() else alone

    def _pair(
        self, first: ConceptRecord, second: ConceptRecord, of_second: bool
    ) -> tuple[Tensor, Tensor]:
        """The text features of one of the two concepts of a prompt, and of its padding, (n, d)."""
        prompt = f"a photo of a {first.name} and a {second.name}"
        pair = first.id, second.id
        if pair not in self._pairs:
            encoded = self.backbone.encode_prompts([prompt], self.words)
            self._pairs[pair] = self.backbone.context(encoded)[0].float().cpu()
        features = self._pairs[pair]
        start, end = self.backbone.second_word(prompt, second.token, self.words)
        return features[start:end] if of_second else features[:start], features[end:]


def _near(numbers: Iterable[int], count: int) -> list[int]:
    """The neighbors of these concepts, without themselves."""
    chosen = set(numbers)
    near = {n + k for n in chosen for k in range(-NEIGHBORS, NEIGHBORS + 1)}
    return sorted((near - chosen) & set(range(count)))


def with_prompts(
    bank: PromptBank,
    stack: ConceptStack,
    nouns: Iterable[str] = (),
    *,
    changed: Iterable[int] = (),
    language: float = LANGUAGE,
) -> ConceptStack:
    """The stack with the prompts of all its concepts, and ordinary ones with their nouns and these.

    Encoded are those of concepts that have none, and of those whose neighbors are new or `changed`.
    """
    records = stack.records
    missing = {n for n, record in enumerate(records) if record.id not in stack.prompts}
    work = sorted({*missing, *_near(missing, len(records)), *changed})
    encoded = {}
    for done, number in enumerate(work):
        bank.on_progress(Progress("solve", done, len(work)))
        record = records[number]
        kept = stack.prompts.get(record.id)
        alone = kept.alone if kept else rows_of(bank.alone(record), KEPT).half()
        shared = bank.shared(records, number)
        rows = rows_of(shared, KEPT).half() if shared.any() else alone[:0]
        encoded[record.id] = PromptRows(alone, rows)
    every = [*(record.noun for record in records), *nouns]
    return stack.with_prompts(encoded, bank.ordinary(every, stack.ordinary, language))


def has_prompts(stack: ConceptStack, language: float) -> bool:
    """Whether it can be solved for without the text encoders."""
    known = stack.ordinary
    return (
        known is not None
        and (known.drawn is not None or not language)
        and all(record.id in stack.prompts for record in stack.records)
    )


def targets_of(stack: ConceptStack, own: Sequence[Adapter | None]) -> list[Target]:
    """For every concept's prompts what its own adapter does."""
    return [
        Target(record.token, stack.prompts[record.id].rows, adapter)
        for record, adapter in zip(stack.records, own, strict=True)
    ]


def about_one(stack: ConceptStack, targets: Sequence[Target]) -> list[Target]:
    """The targets of concepts that have an adapter, over prompts that name no other concept."""
    return [
        replace(target, rows=stack.prompts[record.id].alone.float())
        for record, target in zip(stack.records, targets, strict=True)
        if target.adapter
    ]


def own_adapters(stack: ConceptStack) -> list[Adapter | None]:
    """Each concept's own adapter: as it was right after learning, before any consolidation that the
    stack has a record of; float32.
    """
    targets = {concept: target.adapter for concept, target in stack.targets.items()}
    own = [targets.get(one.id) or stack.adapter_after(one.id) for one in stack.records]
    if stack.unconsolidated and stack.records[-1].id not in targets:
        own[-1] = stack.unconsolidated
    return own


def with_small_target(
    bank: PromptBank, stack: ConceptStack, number: int, own: Adapter
) -> ConceptStack:
    """The stack with a small adapter as this concept's target: it does to the concept's own prompts
    what its own adapter did, and little else.

    If the solution for all concepts were the target of the next solve, each solve would lose the
    same share of it again.
    """
    record = stack.records[number]
    # of the whole moment: rows of its largest directions alone would say little about other prompts
    target = Target(record.token, rows_of(bank.moment(stack.records, number)), own)
    small, _ = solve([target], SolveSettings(energy=ENERGY, ridge=1e-6))
    return stack.with_target(record.id, small)


def relative_drift(adapter: Adapter, target: Target) -> float:
    """E || (delta - delta_j) c ||^2 / E || delta_j c ||^2, summed over the layers before dividing:
    a layer in which delta_j does almost nothing counts for almost nothing.
    """
    assert target.adapter
    lost = _size(difference(adapter, target.adapter, target.rows.shape[1]), target.rows)
    whole = _size(difference(target.adapter, None, target.rows.shape[1]), target.rows)
    return float(lost / whole.clamp(min=1e-12))


def _size(products: Mapping[str, tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """The sum over layers of E || left right c ||^2."""
    rights = torch.stack([right for _, right in products.values()]) @ rows.T
    inner = torch.stack([left.T @ left for left, _ in products.values()])
    return ((rights @ rights.mT) * inner).sum()


def retention_penalty(
    backbone: Backbone,
    ordinary: Tensor,
    earlier: Sequence[Target],
    settings: RetentionSettings,
    weight: float,
) -> RetentionPenalty:
    """The penalty while learning one more concept: the closed form's targets.

        sum_j w_j E_{c of j} || (delta - delta_j) c ||^2
            = E || (delta - anchor) c ||^2 + a constant        anchor: the closed form

    `ordinary`: the moment (d, d) of ordinary prompts. Each of the `earlier` concepts is held at what
    its own adapter did; a step costs the same for any number of them. Together they weigh at most
    MAX_EARLIER_WEIGHT, ordinary prompts `settings.retention_ordinary`. The moment of the latter is
    shrunk, while the solve has it as it is: there shrinkage would take from the concepts and
    protect nothing (benchmarks/LOG.md).
    """
    device = backbone.device
    ordinary = shrunk(ordinary)
    held = settings.retention_ordinary * ordinary
    each = min(1.0, MAX_EARLIER_WEIGHT / max(1, len(earlier)))
    targets = [replace(target, weight=each) for target in earlier]
    total = held + sum(target.weight * target.moment for target in targets)
    anchor: Adapter = {}
    if any(target.adapter for target in targets):
        anchor, _ = solve(targets, SolveSettings(energy=0.9999), ordinary=held)
    return RetentionPenalty(
        weight,
        total.to(device),
        {name: tensor.to(device) for name, tensor in anchor.items()},
        sizes(backbone, ordinary.to(device)),
    )
