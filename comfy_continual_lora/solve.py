"""Stage 4: the closed form - the one change of K and V that is closest, over all stored prompts at
once, to what each concept asks for.

    delta = argmin  sum_j w_j E_{c of j} || (delta - delta_j) c ||^2  +  ridge || delta ||^2  =  (
    sum_j w_j delta_j M_j ) G^-1
            M_j = E c c^T over the prompts of j,   G = sum_j w_j M_j + ridge,   delta_j: the adapter
            right after j was learned, 0 for ordinary prompts

This is `textspace.drift` at its minimum, so no step, no picture and no call of the U-Net is needed,
and the same request gives the same bytes.
The best product of rank k is delta projected onto the k leading left singular vectors of delta L,
with G = L L^T (reduced-rank regression;
Izenman 1975, eq. 2.9).

Consolidating, and learning by `retention`, ask for every concept; forgetting one asks for 0 there;
merging asks for the concepts of two stacks. Where
a penalty holds earlier concepts, it is at what is closest to all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checkpoint.backbone import Backbone
from .errors import StackError
from .lora import Adapter, factored, grown, kind_of, layers_of, rank_of
from .progress import OnProgress, Progress
from .settings import LearnSettings, SolveSettings
from .store import ConceptRecord, ConceptStack
from .textspace import Retention, drift, moment, ordinary_prompts, single_prompts, sizes

# the most that all earlier concepts weigh together where a penalty holds them; until then each
# weighs 1
HELD = 3.0


@dataclass(frozen=True)
class Wish:
    """Over prompts with this second moment (d, d), the change shall do what `adapter` does; None:
    nothing.
    """

    name: str
    moment: Tensor
    adapter: Adapter | None
    weight: float = 1.0


@dataclass(frozen=True)
class Consolidated:
    """By concept: the share of what its own adapter did to its prompts that is lost, before and
    after; those that name another, too, are left out,
    since two concepts ask for different things there."""

    rank: int  # that the energy rule asked for; the stack's LoRA may have more
    before: dict[str, float]
    after: dict[str, float]


def solve(
    wishes: Sequence[Wish], settings: SolveSettings, least_rank: int = 1
) -> tuple[Adapter, int]:
    """One LoRA for all wishes, and `settings.rank`, or the least rank that keeps the share
    `settings.energy`.

    It has `least_rank` at least, which is made use of unless a rank was said.

    Wishes for full changes of K and V give such a change, those for VeRA a LoRA.
    """
    asked = [(wish, layers_of(wish.adapter)) for wish in wishes if wish.adapter]
    full = any(kind_of(wish.adapter) == "full" for wish, _ in asked if wish.adapter)
    width = wishes[0].moment.shape[0]
    total = sum(
        (wish.weight * wish.moment.double() for wish in wishes),
        torch.zeros(width, width, dtype=torch.float64),
    )
    total += settings.ridge * total.trace() / width * torch.eye(width, dtype=torch.float64)
    lower = torch.linalg.cholesky(total)
    changes, leading, energies = {}, {}, []
    for layer in asked[0][1]:
        basis, want = _wanted([(wish, layers[layer]) for wish, layers in asked])
        changes[layer] = torch.cholesky_solve(want.T, lower).T
        if full:
            changes[layer] = basis @ changes[layer]
            continue
        vectors, values = _left_singular(
            torch.linalg.solve_triangular(lower, want.T, upper=False).T
        )
        leading[layer] = basis, vectors
        energies.append(values.square() / values.square().sum().clamp(min=1e-300))
    if full:
        adapter, rank = {f"{layer}.D": change.float() for layer, change in changes.items()}, width
    else:
        rank = _rank(energies, settings)
        taken = settings.rank or max(rank, least_rank)
        factors = [
            _factors(layer, basis, vectors[:, :taken], changes[layer])
            for layer, (basis, vectors) in leading.items()
        ]
        adapter = grown(
            {name: tensor for one in factors for name, tensor in one.items()}, max(rank, least_rank)
        )
    return adapter, rank


def _wanted(asked: Sequence[tuple[Wish, Mapping[str, Tensor]]]) -> tuple[Tensor, Tensor]:
    """sum_j w_j delta_j M_j of one layer, as an orthonormal basis (d_out, k) times (k, d_text),
    float64; k: the ranks together, d_out at most.
    """
    products = [(wish, *factored(parts, wish.moment.shape[0])) for wish, parts in asked]
    left = torch.cat([wish.weight * left.double() for wish, left, _ in products], 1)
    right = torch.cat([right.double() @ wish.moment.double() for wish, _, right in products])
    basis, rest = (
        torch.linalg.qr(left)
        if left.shape[1] < left.shape[0]
        else (torch.eye(len(left), dtype=torch.float64), left)
    )
    return basis, rest @ right


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values, the largest first, from the smaller Gram matrix:
    three times as fast as an SVD.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values = squares.flip(0).clamp(min=0).sqrt()
    vectors = vectors.flip(1)
    return vectors if wide else matrix @ vectors / values.clamp(min=values[0] * 1e-12), values


def _rank(energies: Sequence[Tensor], settings: SolveSettings) -> int:
    if settings.rank is not None:
        return settings.rank
    kept = torch.stack([e[: min(map(len, energies))] for e in energies]).mean(0).cumsum(0)
    return int((kept < settings.energy).sum()) + 1


def _factors(layer: str, basis: Tensor, directions: Tensor, change: Tensor) -> Adapter:
    """The change (k, d_text) projected onto the span of the directions (k, r) in the basis (d_out,
    k), as B and A of the same norm.
    """
    directions, _ = torch.linalg.qr(directions)  # those of hardly any energy are not orthogonal
    b, a = basis @ directions, directions.T @ change
    balance = (a.norm() / b.norm()).clamp(min=1e-12).sqrt()
    return {f"{layer}.A": (a / balance).float(), f"{layer}.B": (b * balance).float()}


def lost(adapter: Adapter, wish: Wish) -> float:
    """E || (delta - delta_j) c ||^2 / E || delta_j c ||^2, the layers together: one in which
    delta_j does next to nothing counts as little.
    """
    assert wish.adapter
    alike = dict.fromkeys(layers_of(wish.adapter), torch.ones(()))
    return float(
        drift(adapter, wish.adapter, wish.moment, alike)
        / drift(wish.adapter, None, wish.moment, alike).clamp(min=1e-12)
    )


# --- what a stack asks for
# --------------------------------------------------------------------------------------------------


class Memory:
    """What the prompts about a growing list of concepts look like, each encoded once.

    In a prompt about two, the positions from the second one's word on are the second's, those
    before the first's, the ending is both's.
    """

    def __init__(
        self, backbone: Backbone, nouns: Sequence[str], share: float | None = None
    ) -> None:
        """`nouns` are what ordinary prompts are about above all; `share` as in `moment`, for all
        prompts but those about two.
        """
        self.backbone, self.words, self.share = backbone, {}, share
        self.ordinary = moment(
            backbone, {}, ordinary_prompts(list(dict.fromkeys(nouns))), share
        ).cpu()
        self.records: list[ConceptRecord] = []
        self.alone: list[Tensor] = []
        self.shares: list[
            tuple[Tensor, float]
        ] = []  # of prompts about two: sum of c c^T, and how many c

    def add(self, record: ConceptRecord, word: Tensor) -> None:
        """One more concept, alone and together with the two before it."""
        self.records.append(record)
        self.words[record.token] = word
        self.alone.append(
            moment(self.backbone, self.words, single_prompts(record), self.share).cpu()
        )
        self.shares.append((torch.zeros_like(self.ordinary), 0.0))
        newest = len(self.records) - 1
        for other in range(max(0, newest - 2), newest):
            self._together(other, newest)
            self._together(newest, other)

    def extend(
        self, stack: ConceptStack, on_progress: OnProgress, count: int | None = None
    ) -> None:
        """Add the concepts of a stack that come behind those that are here, up to its first
        `count`.
        """
        for number, record in enumerate(
            stack.records[len(self.records) : count], start=len(self.records)
        ):
            on_progress(Progress("solve", number, len(stack.records)))
            self.add(record, stack.words[record.id])

    def _together(self, first: int, second: int) -> None:
        prompt = f"a photo of a {self.records[first].name} and a {self.records[second].name}"
        features = (
            self.backbone.context(self.backbone.encode_prompts([prompt], self.words))[0]
            .float()
            .cpu()
        )
        ids, slots = self.backbone.tokenize(prompt, self.words)
        start = (
            max(k for k in range(len(slots)) if slots[k] >= 0)
            + 1
            - len(self.words[self.records[second].token])
        )  # the last word's first position
        end = 1 + max(
            k
            for k, (number, slot) in enumerate(zip(ids, slots, strict=True))
            if slot >= 0 or number != ids[-1]
        )
        for concept, rows, weight in (
            (first, features[:start], 1.0),
            (second, features[start:end], 1.0),
            (first, features[end:], 0.5),
            (second, features[end:], 0.5),
        ):
            total, count = self.shares[concept]
            self.shares[concept] = (total + weight * rows.T @ rows, count + weight * len(rows))

    def wishes(self, adapters: Sequence[Adapter | None], settings: SolveSettings) -> list[Wish]:
        """Every concept's prompts shall get what its adapter does, ordinary prompts nothing."""
        asked = [
            Wish(
                "ordinary prompts",
                self.ordinary,
                None,
                settings.ordinary_weight * len(self.records),
            )
        ]
        for record, alone, (total, count), adapter in zip(
            self.records, self.alone, self.shares, adapters, strict=True
        ):
            asked.append(
                Wish(record.token, (alone + total / count) / 2 if count else alone, adapter)
            )
        return asked

    def about_one(self, wishes: Sequence[Wish]) -> list[Wish]:
        """Of such wishes those of concepts that ask for something, over prompts that name no other."""
        return [
            replace(wish, moment=alone)
            for wish, alone in zip(wishes[1:], self.alone, strict=True)
            if wish.adapter
        ]


def memory_of(
    backbone: Backbone,
    stack: ConceptStack,
    on_progress: OnProgress,
    count: int | None = None,
    nouns: Sequence[str] = (),
    share: float | None = None,
) -> Memory:
    """Of the first `count` concepts of a stack, or of all; `nouns` are those of concepts to come."""
    memory = Memory(backbone, [*(record.noun for record in stack.records), *nouns], share)
    memory.extend(stack, on_progress, count)
    return memory


def adapters_of(stack: ConceptStack) -> list[Adapter | None]:
    """What each concept asks for: its adapter right after it was learned, before any consolidation
    that is known of.
    """
    found = [
        stack.wishes.get(record.id) or stack.adapter_after(record.id) for record in stack.records
    ]
    if stack.before and stack.records[-1].id not in stack.wishes:
        found[-1] = stack.before
    return found


def _kept(stack: ConceptStack, concept: str, wish: Wish) -> Wish:
    """The same wish by a small adapter that stays on the stack: it does to the concept's own
    prompts what its adapter did, and little else.

    Were the solution for all the next solve's wish, each solve would take the same share of it
    again.
    """
    if wish.adapter and concept not in stack.wishes:
        stack.wishes[concept], _ = solve([wish], SolveSettings(energy=0.9999, ridge=1e-6))
    return replace(wish, adapter=stack.wishes.get(concept))


def retention(
    memory: Memory, stack: ConceptStack, settings: LearnSettings, weight: float
) -> Retention:
    """What learning one more concept is held at: the closed form's wishes, as a penalty.

        sum_j w_j E_{c of j} || (delta - delta_j) c ||^2  =  E || (delta - anchor) c ||^2 + what no
        delta can help,     anchor: the closed form

    Each concept in the memory is held at what its own adapter did, and a step costs the same
    however many there are. They weigh HELD together at
    most, ordinary prompts `settings.retention_ordinary`.
    """
    device, own = (
        memory.backbone.device,
        memory.wishes(adapters_of(stack)[: len(memory.records)], SolveSettings())[1:],
    )
    each = min(1.0, HELD / max(1, len(own)))
    wishes = [Wish("ordinary prompts", memory.ordinary, None, settings.retention_ordinary)]
    wishes += [replace(wish, weight=each) for wish in own]
    asked = sum(
        (wish.weight * wish.moment for wish in wishes), torch.zeros_like(memory.ordinary)
    ).to(device)
    anchor, _ = (
        solve(wishes, SolveSettings(energy=0.9999))
        if any(wish.adapter for wish in wishes)
        else ({}, 0)
    )
    return Retention(
        weight,
        asked,
        {k: t.to(device) for k, t in anchor.items()},
        sizes(memory.backbone, memory.ordinary.to(device)),
    )


# --- stacks -> stacks
# --------------------------------------------------------------------------------------------------


def consolidated(
    backbone: Backbone,
    stack: ConceptStack,
    settings: SolveSettings,
    on_progress: OnProgress,
    memory: Memory | None = None,
) -> Consolidated:
    """One LoRA for all concepts of the stack, in place; what it was before stays as `before`.
    Fishers are dropped: their factors are gone.

    What `memory` has encoded, of none or some of the first concepts, is not encoded again.
    """
    assert stack.adapter
    _refuse_vera(stack)
    memory = memory or memory_of(backbone, stack, on_progress, count=0)
    memory.extend(stack, on_progress)
    wishes = memory.wishes(adapters_of(stack), settings)
    wishes[-1] = _kept(stack, stack.records[-1].id, wishes[-1])
    adapter, rank = solve(wishes, settings, stack.rank or 1)
    told = [
        {wish.name: lost(one, wish) for wish in memory.about_one(wishes)}
        for one in (stack.adapter, adapter)
    ]
    stack.before = stack.before or stack.adapter
    stack.adapter, stack.fishers = adapter, {}
    stack.records[-1] = _noted(stack.records[-1], adapter)
    stack.rank = stack.records[-1].settings["rank"]
    return Consolidated(rank, *told)


def selected(
    backbone: Backbone,
    stack: ConceptStack,
    tokens: Sequence[str],
    settings: SolveSettings,
    on_progress: OnProgress,
) -> ConceptStack:
    """A stack of these concepts alone, and one LoRA solved for them: what the others ask for takes
    nothing from it. The stack given stays as it is.

    Errors: StackError for a token that is not on the stack, for none at all, and for VeRA.
    """
    numbers = sorted({_number_of(stack, token) for token in tokens})
    if not numbers:
        raise StackError(f"No concept was named. The stack knows {_known(stack)}.")
    _refuse_vera(stack)
    adapters, found = (
        adapters_of(stack),
        ConceptStack(stack.fingerprint, tau=stack.tau, base=stack.base, identity=stack.identity),
    )
    memory = Memory(backbone, [stack.records[n].noun for n in numbers])
    for done, number in enumerate(numbers):
        on_progress(Progress("solve", done, len(numbers)))
        record = stack.records[number]
        memory.add(record, stack.words[record.id])
        found.add(record, stack.words[record.id], None)
    asked = [adapters[n] for n in numbers]
    if any(asked):
        found.adapter, found.rank = solve(memory.wishes(asked, settings), settings)
        found.wishes = {stack.records[n].id: adapter for n in numbers if (adapter := adapters[n])}
    on_progress(Progress("solve", len(numbers), len(numbers)))
    return found


def forgotten(
    backbone: Backbone,
    stack: ConceptStack,
    token: str,
    settings: SolveSettings,
    on_progress: OnProgress,
) -> ConceptRecord:
    """Take one concept out, in place: its word, record and pool entry, and what every later adapter
    knows of it.

    Errors: StackError for a token that is not on the stack.
    """
    number = _number_of(stack, token)
    if number == len(stack.records) - 1:
        return stack.undo()
    _refuse_vera(stack)
    gone, memory, adapters, later = (
        stack.records[number],
        memory_of(backbone, stack, on_progress, number + 1),
        adapters_of(stack),
        {},
    )
    adapters[number] = None
    for count, record in enumerate(
        stack.records[number + 1 :], start=number + 2
    ):  # every version of the stack that knew it
        on_progress(Progress("solve", count - 1, len(stack.records)))
        memory.add(record, stack.words[record.id])
        if adapters[count - 1] is not None:
            wishes = memory.wishes(adapters[:count], settings)
            wishes[-1] = _kept(stack, record.id, wishes[-1])
            adapters[count - 1] = wishes[-1].adapter
            later[record.id], _ = solve(wishes, settings, stack.rank or 1)
    stack.records.pop(number)
    del stack.words[gone.id]
    stack.pool.pop(gone.id, None)
    stack.wishes.pop(gone.id, None)
    stack.adapter, stack.before, stack.fishers = (
        later.pop(stack.records[-1].id, stack.adapter),
        None,
        {},
    )
    stack.pool |= later
    stack.records = [_noted(record, stack.adapter_after(record.id)) for record in stack.records]
    stack.rank = stack.records[-1].settings["rank"]
    return gone


def merged(
    backbone: Backbone,
    stack: ConceptStack,
    second: ConceptStack,
    settings: SolveSettings,
    on_progress: OnProgress,
) -> dict[str, str]:
    """Put the concepts of a second stack that this one has not behind its own, in place; returns
    the new names of words that both have.

    Every version of the stack from then on is solved for, so that undo, and drawing older versions,
    go on working. Errors: StackError where one
    of them is no LoRA and the other is, and where both are VeRA.
    """
    if not stack.records:
        vars(stack).update(
            {
                **vars(second),
                "base": stack.base,
                "identity": stack.identity,
                "history": stack.history,
            }
        )
        return {}
    known = {record.id for record in stack.records}  # of a beginning that both have in common
    new = [
        (record, adapter)
        for record, adapter in zip(second.records, adapters_of(second), strict=True)
        if record.id not in known
    ]
    renamed, adapters = _new_names(stack, [record.token for record, _ in new]), adapters_of(stack)
    own = [_with_word(record, renamed.get(record.token, record.token)) for record, _ in new]
    if len({kind_of(a) for a in (stack.adapter, second.adapter) if a}) > 1:
        raise StackError(
            "One of the stacks holds a LoRA, the other an adapter of another kind; only two of a "
            "kind can be merged."
        )
    _refuse_vera(stack)
    stack.words |= second.words
    stack.wishes |= {
        record.id: second.wishes[record.id] for record in own if record.id in second.wishes
    }
    stack.fishers, stack.tau = {}, stack.tau or second.tau
    stack.rank = max(filter(None, (stack.rank, second.rank)), default=None)
    memory = Memory(backbone, [record.noun for record in [*stack.records, *own]])
    memory.extend(stack, on_progress)
    for number, (record, (_, adapter)) in enumerate(zip(own, new, strict=True)):
        on_progress(Progress("solve", number, len(own)))
        memory.add(record, stack.words[record.id])
        adapters.append(adapter)
        found = stack.adapter or adapter
        if stack.adapter and adapter:
            wishes = memory.wishes(adapters, settings)
            wishes[-1] = _kept(stack, record.id, wishes[-1])
            adapters[-1] = wishes[-1].adapter
            found, _ = solve(wishes, settings, stack.rank or 1)
        stack.add(_noted(record, found), stack.words[record.id], found)
    stack.rank = stack.records[-1].settings["rank"]
    return renamed


def _number_of(stack: ConceptStack, token: str) -> int:
    number = next(
        (n for n, record in enumerate(stack.records) if record.token.lower() == token.lower()), None
    )
    if number is None:
        raise StackError(f"No concept {token!r} is on the stack. It knows {_known(stack)}.")
    return number


def _known(stack: ConceptStack) -> str:
    return ", ".join(record.token for record in stack.records) or "none"


def _refuse_vera(stack: ConceptStack) -> None:
    if stack.adapter and kind_of(stack.adapter) == "vera":
        raise StackError(
            "The closed form can't be written as VeRA, which this stack was learned with. Use "
            "DSC, or learn with LoRA."
        )


def _new_names(first: ConceptStack, tokens: Sequence[str]) -> dict[str, str]:
    """V1 that both have becomes V1_2."""
    known, renamed = {token.lower() for token in first.tokens}, {}
    taken = known | {token.lower() for token in tokens}
    for token in tokens:
        if token.lower() in known:
            renamed[token] = next(
                name for n in range(2, 10_000) if (name := f"{token[:59]}_{n}").lower() not in taken
            )
            taken.add(renamed[token].lower())
    return renamed


def _with_word(record: ConceptRecord, token: str) -> ConceptRecord:
    """The same concept under another word."""
    if token == record.token:
        return record
    prompts = [
        re.sub(rf"(?<!\w){re.escape(record.token)}(?!\w)", token, prompt, flags=re.IGNORECASE)
        for prompt in record.prompts
    ]
    return replace(record, token=token, prompts=prompts, request="")


def _noted(record: ConceptRecord, adapter: Adapter | None) -> ConceptRecord:
    """The record with the rank the stack's LoRA has from this concept on."""
    return (
        replace(record, settings={**record.settings, "rank": rank_of(adapter)})
        if adapter and kind_of(adapter) == "lora"
        else record
    )
