"""Stage 4: what each concept's prompts should be mapped to.

    prompts of a stack -> `PromptBank`: their second moments -> `Target`s for `solve`, or a penalty

A concept's target is what its own adapter, right after it was learned, did to its own prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .adapters.adapter import Adapter, layers_of
from .checkpoint.backbone import Backbone
from .language import LANGUAGE, language_prompts
from .moments import MomentCache
from .progress import OnProgress, Progress, ignore
from .settings import RetentionSettings, SolveSettings
from .solve import Target, solve
from .stack import ConceptRecord, ConceptStack
from .textspace import (
    RetentionPenalty,
    drift,
    ordinary_prompts,
    shrunk,
    single_prompts,
    sizes,
)

# In the penalty each earlier concept weighs 1, and all together at most this.
MAX_EARLIER_WEIGHT = 3.0


class PromptBank:
    """The moments of the prompts about a growing list of concepts, each encoded once.

    In a prompt about two concepts, the positions before the second one's word count for the first,
    those from there on for the second, and the padding for both.
    """

    def __init__(
        self,
        backbone: Backbone,
        nouns: Sequence[str],
        share: float | None = None,
        cache: Path | None = None,
        *,
        language: float = LANGUAGE,
        on_progress: OnProgress = ignore,
    ) -> None:
        """`nouns`: the main subjects of ordinary prompts; `share` as in `textspace.moment`, for all
        prompts but those about two concepts; `cache`: a folder of moments; `language`: the share
        of ordinary prompts that is drawn from the tokenizer's vocabulary.
        """
        self.backbone, self.words, self.share = backbone, {}, share
        self.moments = MomentCache(backbone, cache)
        self.ordinary = self.moments({}, ordinary_prompts(list(dict.fromkeys(nouns))), share)
        if language:
            drawn = self._language(on_progress)
            self.ordinary = (1 - language) * self.ordinary + language * drawn
        self.records: list[ConceptRecord] = []
        self.alone: list[Tensor] = []
        # prompts about two, by concept: sum of c c^T, and the number of c
        self.shared: list[tuple[Tensor, float]] = []

    def _language(self, on_progress: OnProgress) -> Tensor:
        """The moment of a wide sample of language."""
        prompts = language_prompts(self.backbone.tokenizer)

        def report(done: int) -> None:
            on_progress(Progress("language", done, len(prompts)))

        return self.moments({}, prompts, self.share, report)

    def add(self, record: ConceptRecord, word: Tensor) -> None:
        """Add a concept: prompts about it alone, and together with each of the two before it."""
        self.records.append(record)
        self.words[record.token] = word
        self.alone.append(self.moments(self.words, single_prompts(record), self.share))
        self.shared.append((torch.zeros_like(self.ordinary), 0.0))
        newest = len(self.records) - 1
        for other in range(max(0, newest - 2), newest):
            self._add_pair(other, newest)
            self._add_pair(newest, other)

    def extend(
        self, stack: ConceptStack, on_progress: OnProgress, count: int | None = None
    ) -> None:
        """Add the concepts of a stack that are not in the bank yet, up to its first `count`."""
        first = len(self.records)
        for number, record in enumerate(stack.records[first:count], start=first):
            on_progress(Progress("solve", number, len(stack.records)))
            self.add(record, stack.words[record.id])

    def _add_pair(self, first: int, second: int) -> None:
        prompt = f"a photo of a {self.records[first].name} and a {self.records[second].name}"
        encoded = self.backbone.encode_prompts([prompt], self.words)
        features = self.backbone.context(encoded)[0].float().cpu()
        start, end = self._second_word(prompt, self.records[second].token)
        for concept, rows, weight in (
            (first, features[:start], 1.0),
            (second, features[start:end], 1.0),
            (first, features[end:], 0.5),
            (second, features[end:], 0.5),
        ):
            total, count = self.shared[concept]
            self.shared[concept] = (total + weight * rows.T @ rows, count + weight * len(rows))

    def _second_word(self, prompt: str, token: str) -> tuple[int, int]:
        """The position at which the last learned word of a prompt begins, and that of its padding."""
        ids, slots = self.backbone.tokenize(prompt, self.words)
        words = [k for k, slot in enumerate(slots) if slot >= 0]
        before_padding = [
            k
            for k, (one, slot) in enumerate(zip(ids, slots, strict=True))
            if slot >= 0 or one != ids[-1]
        ]
        return max(words) + 1 - len(self.words[token]), max(before_padding) + 1

    def targets(self, adapters: Sequence[Adapter | None], settings: SolveSettings) -> list[Target]:
        """For every concept's prompts what its adapter does; for ordinary prompts no change."""
        weight = settings.ordinary_weight * len(self.records)
        targets = [Target("ordinary prompts", self.ordinary, None, weight)]
        for record, alone, (total, count), adapter in zip(
            self.records, self.alone, self.shared, adapters, strict=True
        ):
            mean = (alone + total / count) / 2 if count else alone
            targets.append(Target(record.token, mean, adapter))
        return targets

    def about_one(self, targets: Sequence[Target]) -> list[Target]:
        """The targets of concepts that have an adapter, over prompts that name no other concept."""
        return [
            replace(target, moment=alone)
            for target, alone in zip(targets[1:], self.alone, strict=True)
            if target.adapter
        ]


def prompt_bank(
    backbone: Backbone,
    stack: ConceptStack,
    on_progress: OnProgress,
    count: int | None = None,
    nouns: Sequence[str] = (),
    share: float | None = None,
    cache: Path | None = None,
    language: float = LANGUAGE,
) -> PromptBank:
    """The bank of a stack's first `count` concepts, or of all; `nouns`: those of concepts to come."""
    every = [*(record.noun for record in stack.records), *nouns]
    bank = PromptBank(backbone, every, share, cache, language=language, on_progress=on_progress)
    bank.extend(stack, on_progress, count)
    return bank


def own_adapters(stack: ConceptStack) -> list[Adapter | None]:
    """Each concept's own adapter: as it was right after learning, before any consolidation that the
    stack has a record of.
    """
    own = [stack.targets.get(one.id) or stack.adapter_after(one.id) for one in stack.records]
    if stack.unconsolidated and stack.records[-1].id not in stack.targets:
        own[-1] = stack.unconsolidated
    return own


def small_target(stack: ConceptStack, concept: str, target: Target) -> Target:
    """The same target with a small adapter, which the stack keeps from then on: it does to the
    concept's own prompts what its adapter did, and little else.

    If the solution for all concepts were the target of the next solve, each solve would lose the
    same share of it again.
    """
    small = stack.targets.get(concept)
    if target.adapter and small is None:
        small, _ = solve([target], SolveSettings(energy=0.9999, ridge=1e-6))
    return replace(target, adapter=small)


def relative_drift(adapter: Adapter, target: Target) -> float:
    """E || (delta - delta_j) c ||^2 / E || delta_j c ||^2, summed over the layers before dividing:
    a layer in which delta_j does almost nothing counts for almost nothing.
    """
    assert target.adapter
    unit_sizes = dict.fromkeys(layers_of(target.adapter), torch.ones(()))
    lost = drift(adapter, target.adapter, target.moment, unit_sizes)
    whole = drift(target.adapter, None, target.moment, unit_sizes)
    return float(lost / whole.clamp(min=1e-12))


def retention_penalty(
    bank: PromptBank, stack: ConceptStack, settings: RetentionSettings, weight: float
) -> RetentionPenalty:
    """The penalty while learning one more concept: the closed form's targets.

        sum_j w_j E_{c of j} || (delta - delta_j) c ||^2
            = E || (delta - anchor) c ||^2 + a constant        anchor: the closed form

    Each concept in the bank is held at what its own adapter did; a step costs the same for any
    number of them. Together they weigh at most MAX_EARLIER_WEIGHT, ordinary prompts
    `settings.retention_ordinary`. The moment of the latter is shrunk, while the solve has it as it
    is: there it would take from the concepts and protect nothing (benchmarks/LOG.md).
    """
    device = bank.backbone.device
    ordinary = shrunk(bank.ordinary)
    own = bank.targets(own_adapters(stack)[: len(bank.records)], SolveSettings())[1:]
    each = min(1.0, MAX_EARLIER_WEIGHT / max(1, len(own)))
    targets = [Target("ordinary prompts", ordinary, None, settings.retention_ordinary)]
    targets += [replace(target, weight=each) for target in own]
    total = torch.zeros_like(ordinary)
    for target in targets:
        total = total + target.weight * target.moment
    anchor: Adapter = {}
    if any(target.adapter for target in targets):
        anchor, _ = solve(targets, SolveSettings(energy=0.9999))
    return RetentionPenalty(
        weight,
        total.to(device),
        {name: tensor.to(device) for name, tensor in anchor.items()},
        sizes(bank.backbone, ordinary.to(device)),
    )
