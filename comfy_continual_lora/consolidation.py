"""Stage 5: the closed form on a stack - consolidate all concepts, select, forget or merge some.

in: a stack - out: a new one; the original is not changed. Consolidating, and learning by `retention`,
solve for the targets of every concept; forgetting one drops its target; merging solves for those of
two stacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from .adapters.adapter import Adapter, kind_of
from .checkpoint.backbone import Backbone
from .errors import StackError
from .mentions import in_other_words
from .progress import OnProgress, Progress
from .results import SolveResult
from .settings import SolveSettings
from .solve import solve
from .stack import ConceptRecord, ConceptStack
from .targets import PromptBank, own_adapters, prompt_bank, relative_drift, small_target


def consolidated(
    backbone: Backbone,
    stack: ConceptStack,
    settings: SolveSettings,
    on_progress: OnProgress,
    bank: PromptBank,
) -> tuple[ConceptStack, SolveResult]:
    """One LoRA for all concepts of the stack; the previous one is kept as `unconsolidated`.

    Concepts already in `bank` (none, or the first few) are not encoded again.
    Errors: StackError if the stack's adapter is of a kind that can't be solved for.
    """
    assert stack.adapter
    check_solvable(stack)
    bank.extend(stack, on_progress)
    newest = stack.records[-1].id
    targets = bank.targets(own_adapters(stack), settings)
    targets[-1] = small_target(stack, newest, targets[-1])
    adapter, rank = solve(targets, settings, stack.rank or 1)
    shares = [
        {target.name: relative_drift(one, target) for target in bank.about_one(targets)}
        for one in (stack.adapter, adapter)
    ]
    return stack.solved(adapter, targets[-1].adapter), SolveResult(rank, *shares)


def selected(
    backbone: Backbone,
    stack: ConceptStack,
    tokens: Sequence[str],
    settings: SolveSettings,
    on_progress: OnProgress,
    cache: Path | None = None,
) -> ConceptStack:
    """A stack of only these concepts, with one LoRA solved for them, so that the other concepts
    take nothing from it; `cache` is a folder of moments.

    Errors: StackError for a token that is not on the stack, for no tokens, and for VeRA.
    """
    chosen = sorted({stack.index_of(token) for token in tokens})
    if not chosen:
        names = ", ".join(record.token for record in stack.records) or "none"
        raise StackError(f"No concept was named. The stack has: {names}.")
    check_solvable(stack)
    part = ConceptStack(
        stack.fingerprint, tau=stack.tau, checkpoint=stack.checkpoint, identity=stack.identity
    )
    nouns = [stack.records[n].noun for n in chosen]
    bank = PromptBank(
        backbone, nouns, cache=cache, language=settings.language, on_progress=on_progress
    )
    for done, number in enumerate(chosen):
        on_progress(Progress("solve", done, len(chosen)))
        record = stack.records[number]
        bank.add(record, stack.words[record.id])
        part = part.learned(record, stack.words[record.id], None)
    own = own_adapters(stack)
    wanted = [own[n] for n in chosen]
    if any(wanted):
        adapter, rank = solve(bank.targets(wanted, settings), settings)
        targets = {stack.records[n].id: one for n in chosen if (one := own[n])}
        part = part.with_solution(adapter, rank, targets)
    on_progress(Progress("solve", len(chosen), len(chosen)))
    return part


def without(
    backbone: Backbone,
    stack: ConceptStack,
    token: str,
    settings: SolveSettings,
    on_progress: OnProgress,
    cache: Path | None = None,
) -> ConceptStack:
    """The stack without one concept: its word, record, pool entry, and its share of every later
    adapter are gone; `cache` is a folder of moments.

    Errors: StackError for a token that is not on the stack.
    """
    number = stack.index_of(token)
    if number == len(stack.records) - 1:
        return stack.undone()
    check_solvable(stack)
    bank = prompt_bank(
        backbone, stack, on_progress, number + 1, cache=cache, language=settings.language
    )
    wanted, later = own_adapters(stack), {}
    wanted[number] = None
    after = stack
    for index in range(number + 1, len(stack.records)):  # each version with the concept in it
        record = stack.records[index]
        on_progress(Progress("solve", index, len(stack.records)))
        bank.add(record, stack.words[record.id])
        if wanted[index] is None:
            continue
        targets = bank.targets(wanted[: index + 1], settings)
        targets[-1] = small_target(after, record.id, targets[-1])
        wanted[index] = small = targets[-1].adapter
        if small is not None:
            after = after.with_target(record.id, small)
        later[record.id], _ = solve(targets, settings, stack.rank or 1)
    return after.without(stack.records[number].id, later)


def merged(
    backbone: Backbone,
    stack: ConceptStack,
    other: ConceptStack,
    settings: SolveSettings,
    on_progress: OnProgress,
    cache: Path | None = None,
) -> tuple[ConceptStack, dict[str, str]]:
    """The stack with those of the other's concepts on top that it lacks, and the new names of words
    that both had.

    Every version from there on is solved for, so that undo and drawing older versions still work.
    `cache` is a folder of moments.
    Errors: StackError for adapters of different kinds, and for VeRA.
    """
    if not stack.records:
        return stack.in_place_of_nothing(other), {}
    shared = {record.id for record in stack.records}  # the concepts both stacks began with
    pairs = zip(other.records, own_adapters(other), strict=True)
    new = [(record, adapter) for record, adapter in pairs if record.id not in shared]
    renamed = _new_names(stack, [record.token for record, _ in new])
    here = {record.id: record.token for record in stack.records}
    names = {
        record.token: here.get(record.id) or renamed.get(record.token, record.token)
        for record in other.records
    }
    if len({kind_of(one).name for one in (stack.adapter, other.adapter) if one}) > 1:
        raise StackError(
            "The two stacks hold adapters of different kinds (a LoRA and another one), so they "
            "can't be merged. Both need the same kind."
        )
    check_solvable(stack)
    records = [_with_names(record, names) for record, _ in new]
    targets = {one.id: other.targets[one.id] for one in records if one.id in other.targets}
    after = stack.ready_to_merge(other, targets)
    nouns = [record.noun for record in [*stack.records, *records]]
    bank = PromptBank(
        backbone, nouns, cache=cache, language=settings.language, on_progress=on_progress
    )
    bank.extend(stack, on_progress)
    wanted = own_adapters(stack)
    for number, (record, (_, own)) in enumerate(zip(records, new, strict=True)):
        on_progress(Progress("solve", number, len(records)))
        word = other.words[record.id]
        bank.add(record, word)
        wanted.append(own)
        after = _with_one_more(after, record, word, bank, wanted, settings)
    return after.settled(), renamed


def _with_one_more(
    stack: ConceptStack,
    record: ConceptRecord,
    word: Tensor,
    bank: PromptBank,
    wanted: list[Adapter | None],
    settings: SolveSettings,
) -> ConceptStack:
    """`wanted` ends with the new concept's own adapter, which is replaced by its small target."""
    own = wanted[-1]
    adapter = stack.adapter or own
    if stack.adapter and own:
        targets = bank.targets(wanted, settings)
        targets[-1] = small_target(stack, record.id, targets[-1])
        wanted[-1] = small = targets[-1].adapter
        if small is not None:
            stack = stack.with_target(record.id, small)
        adapter, _ = solve(targets, settings, stack.rank or 1)
    # all versions have the same rank until the last is known
    return stack.learned(record.with_rank_of(adapter), word, adapter, keep_rank=True)


def check_solvable(stack: ConceptStack) -> None:
    """Errors: StackError for an adapter that the closed form can't be written as."""
    if stack.adapter and not kind_of(stack.adapter).solvable:
        raise StackError(
            f"The closed form can't be written as {kind_of(stack.adapter).name}, which this stack "
            "was learned with. Use DSC (`consolidate`), or learn with LoRA."
        )


def _new_names(stack: ConceptStack, tokens: Sequence[str]) -> dict[str, str]:
    """A new name for each token that the stack already has: V1 becomes V1_2."""
    own = {token.lower() for token in stack.tokens}
    used = own | {token.lower() for token in tokens}
    renamed: dict[str, str] = {}
    for token in tokens:
        if token.lower() in own:
            names = (f"{token[:59]}_{n}" for n in range(2, 10_000))
            renamed[token] = next(name for name in names if name.lower() not in used)
            used.add(renamed[token].lower())
    return renamed


def _with_names(record: ConceptRecord, names: Mapping[str, str]) -> ConceptRecord:
    """The same concept with its word and captions as `names` has the words of its stack."""
    prompts = [in_other_words(prompt, names) for prompt in record.prompts]
    if (token := names[record.token]) == record.token and prompts == record.prompts:
        return record
    return replace(record, token=token, prompts=prompts, request="")
