"""Stage 5: the closed form on a stack - consolidate all concepts, select or forget some, merge, and
go back to an earlier number of them.

in: a stack that keeps the prompts and targets of its concepts (`targets.with_prompts`) - out: a new
one; the original is not changed. Each is one solve for the targets of the concepts that are wanted,
whatever their number and order, and needs no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .adapters.adapter import Adapter, kind_of
from .errors import StackError
from .mentions import in_other_words, named
from .results import SolveResult
from .settings import SolveSettings
from .solve import Target, solve
from .stack import ConceptRecord, ConceptStack, PromptRows
from .targets import about_one, has_prompts, own_adapters, relative_drift, targets_of


def solution(
    stack: ConceptStack,
    settings: SolveSettings,
    own: Sequence[Adapter | None] | None = None,
    unlearned: Sequence[PromptRows] = (),
) -> tuple[Adapter | None, int]:
    """The one LoRA closest to what every concept's own adapter did to its prompts, and its rank by
    the energy rule; None and 0 if no concept has an adapter.

    `own`: these adapters, if not the stack's; `unlearned`: prompts that it is to do nothing to.
    """
    wanted = own_adapters(stack) if own is None else own
    if not any(wanted):
        return None, 0
    assert stack.ordinary
    weight = settings.ordinary_weight * len(stack.records)
    ordinary = weight * stack.ordinary.moment(settings.language)
    targets = [*targets_of(stack, wanted), *(Target("", one.rows, None) for one in unlearned)]
    return solve(targets, settings, stack.rank or 1, ordinary)


def consolidated(stack: ConceptStack, settings: SolveSettings) -> tuple[ConceptStack, SolveResult]:
    """One LoRA for all concepts of the stack; the previous one is kept as `unconsolidated`.

    Errors: StackError if the stack's adapter is of a kind that can't be solved for.
    """
    assert stack.adapter
    check_solvable(stack)
    adapter, rank = solution(stack, settings)
    assert adapter
    targets = about_one(stack, targets_of(stack, own_adapters(stack)))
    before, after = (
        {target.name: relative_drift(one, target) for target in targets}
        for one in (stack.adapter, adapter)
    )
    return stack.solved(adapter), SolveResult(rank, before, after)


def as_of(stack: ConceptStack, count: int, *, consolidated: bool = True) -> ConceptStack:
    """The stack as it was with its first `count` concepts.

    `consolidated` false: before the stack's newest concept was consolidated, if it is among them.
    An adapter that was trained is the same; a solution is solved for again, for today's ordinary
    prompts.
    """
    count = max(count, 0)
    if count >= len(stack.records):
        before = None if consolidated else stack.unconsolidated
        return replace(stack, adapter=before or stack.adapter)
    after, solves = shortened(stack, count)
    if not solves or not has_prompts(after, 0.0):
        return after
    adapter, _ = solution(after, SolveSettings(language=_language(after)))
    return replace(after, adapter=adapter)


def shortened(stack: ConceptStack, count: int) -> tuple[ConceptStack, bool]:
    """The stack with its first `count` concepts, fewer than all, and whether its adapter has to be
    solved for: the one that they had was a solution, or later gave way to one.
    """
    newest = stack.records[count - 1].id if count else ""
    after = stack.first(count, stack.pool.get(newest))
    # without any adapter of their own they are words alone
    return after, newest not in stack.pool and bool(after.pool or after.targets)


def stays_solved(stack: ConceptStack, shorter: ConceptStack) -> bool:
    """Whether the first concepts, `shorter`, need a solution because the stack's adapter is one: what
    was trained up to the newest of them has spoiled the ones before.
    """
    newest = stack.records[-1]  # whether an older stack keeps the prompts to solve again or not
    is_solution = newest.id in stack.targets and not newest.consolidated
    return is_solution and sum(map(bool, own_adapters(shorter))) > 1


def undone(stack: ConceptStack) -> ConceptStack:
    """Without the newest concept, and with the adapter before it.

    Errors: StackError for an empty stack.
    """
    if not stack.records:
        raise StackError("There is no concept to undo: the stack is empty.")
    return as_of(stack, len(stack.records) - 1)


def _language(stack: ConceptStack) -> float:
    """The share of the vocabulary's sample that the newest concept was learned with, or the usual one
    if it was not learned; 0 if the stack has no sample.
    """
    assert stack.ordinary
    if stack.ordinary.drawn is None:
        return 0.0
    return stack.records[-1].settings.get("retention_language", SolveSettings().language)


def selected(stack: ConceptStack, tokens: Sequence[str], settings: SolveSettings) -> ConceptStack:
    """A stack of only these concepts, with one LoRA solved for them, so that the other concepts
    take nothing from it.

    Errors: StackError for a token that is not on the stack, for no tokens, and for VeRA.
    """
    if not tokens:
        names = ", ".join(record.token for record in stack.records) or "none"
        raise StackError(f"No concept was named. The stack has: {names}.")
    check_solvable(stack)
    own = {record.id: one for record, one in zip(stack.records, own_adapters(stack), strict=True)}
    part = stack.only(tokens)
    part.rank = None  # by the energy rule alone
    adapter, rank = solution(part, settings, [own[record.id] for record in part.records])
    return replace(part, adapter=adapter, rank=rank or None)


def without(stack: ConceptStack, number: int) -> ConceptStack:
    """The stack without one concept that is not the newest, and without whatever was trained after
    it. Its adapter has to be solved for, so each later concept needs a target.
    """
    kept = {record.id for record in stack.records[:number]}
    rest = [*stack.records[:number], *stack.records[number + 1 :]]
    after = stack.only([record.token for record in rest])
    after.pool = {one: adapter for one, adapter in stack.pool.items() if one in kept}
    return after


def joined(
    stack: ConceptStack, other: ConceptStack
) -> tuple[ConceptStack, list[Adapter | None], dict[str, str]]:
    """The stack with those of the other's concepts on top that it lacks; the own adapters of these;
    and the new names of words that both had. Its adapter has to be solved for.

    Errors: StackError for adapters of different kinds, for VeRA, and for a class noun of the other's
    that names a word of this stack.
    """
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
    theirs = {record.id for record in other.records}
    alone = [record.token for record in stack.records if record.id not in theirs]
    for record, _ in new:
        if words := named([record.noun], alone):
            raise StackError(
                f"The class noun of {record.name} contains {words[0]}, a concept of this stack, so prompts "
                f"would name both. Rename {words[0]} first, or forget it (`forget`)."
            )
    records = [_with_names(record, names) for record, _ in new]
    return stack.joined(other, records), [own for _, own in new], renamed


def check_solvable(stack: ConceptStack) -> None:
    """Errors: StackError for an adapter that the closed form can't be written as."""
    if stack.adapter and not kind_of(stack.adapter).solvable:
        raise StackError(
            f"The closed form can't be written as {kind_of(stack.adapter).name}, which this stack "
            "was learned with. Use DSC (`consolidate`), or learn with LoRA."
        )


def _new_names(stack: ConceptStack, tokens: Sequence[str]) -> dict[str, str]:
    """A new name for each token that the stack already has, as a word or in a noun: V1 becomes V1_2."""
    own = {token.lower() for token in stack.tokens}
    used = own | {token.lower() for token in tokens}
    nouns = [record.noun for record in stack.records]
    renamed: dict[str, str] = {}
    for token in tokens:
        if token.lower() in own or named(nouns, [token]):
            names = (f"{token[:59]}_{n}" for n in range(2, 10_000))
            free = (name for name in names if name.lower() not in used and not named(nouns, [name]))
            renamed[token] = next(free)
            used.add(renamed[token].lower())
    return renamed


def _with_names(record: ConceptRecord, names: Mapping[str, str]) -> ConceptRecord:
    """The same concept with its word and captions as `names` has the words of its stack."""
    prompts = [in_other_words(prompt, names) for prompt in record.prompts]
    if (token := names[record.token]) == record.token and prompts == record.prompts:
        return record
    return replace(record, token=token, prompts=prompts, request="")
