"""Operations by the closed form - consolidate, select, forget, merge - and export, which may select.
Part of the pipeline, which re-exports them.

A stack keeps what the closed form needs of its concepts. But for merging, the checkpoint is opened
only to encode what an older stack lacks, or prompts whose neighbors changed; consolidating and
selecting what was learned by `retention` takes no checkpoint at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import consolidation, store
from .adapters.adapter import Adapter
from .errors import StackError
from .export import export_files
from .exported import Exported
from .files import cache_folder, real_file, stack_stem
from .foreign import check_shared
from .imagefile import check_folder
from .moments import clear_cache
from .presets import PLAIN_NAME_PRESETS
from .progress import OnProgress, Progress, ignore
from .requests import ExportRequest, ForgetRequest, MergeRequest, SelectRequest, SolveRequest
from .results import ForgetResult, MergeResult, SolveResult
from .session import Session, open_session
from .settings import SolveSettings
from .stack import ConceptStack, PromptRows
from .stackfile import read_header
from .targets import NEIGHBORS, has_prompts, own_adapters, with_prompts, with_small_target


def consolidate_in_closed_form(
    request: SolveRequest, on_progress: OnProgress = ignore
) -> SolveResult:
    """Solve for the one LoRA that does to every concept's prompts what the adapter right after it
    did. Needs no pictures and no U-Net, and is deterministic.
    """
    with open_session(request, on_progress, writes=True, at_once=False) as session:
        stack = session.stack
        if len(stack.records) < 2 or stack.adapter is None:
            raise StackError(
                f"There is nothing to consolidate: {request.stack_file} needs at least two "
                "concepts, learned with a LoRA."
            )
        consolidation.check_solvable(stack)
        stack = encoded(session, stack, request.settings.language)
        newest = len(stack.records) - 1
        stack = with_targets(session, stack, [newest], own_adapters(stack))
        on_progress(Progress("solve", 0, 1))
        solved, result = consolidation.consolidated(stack, request.settings)
        on_progress(Progress("solve", 1, 1))
        session.commit(solved, "solved", solved.records)
    return result


def select(request: SelectRequest, on_progress: OnProgress = ignore) -> ConceptStack:
    """Some concepts of the stack with a LoRA solved for only these, to draw and to export; the
    stack file is not changed.
    """
    with open_session(request, on_progress, at_once=False) as session:
        return chosen(session, request.only, request.settings)


def chosen(session: Session, tokens: Sequence[str], settings: SolveSettings) -> ConceptStack:
    """`select` in an open session."""
    consolidation.check_solvable(session.stack)
    session.on_progress(Progress("solve", 0, 1))
    stack = encoded(session, session.stack, settings.language)
    part = consolidation.selected(stack, tokens, settings)
    session.on_progress(Progress("solve", 1, 1))
    return part


def export(request: ExportRequest, on_progress: OnProgress = ignore) -> Exported:
    """Write the stack as one LoRA and one embedding per word.

    The checkpoint is opened at most to solve for some concepts (`only`).
    """
    request.check()
    for folder in filter(None, (request.out, request.embeddings)):
        check_folder(folder)
    where = {"stack": request.stack, "device": request.device}
    if request.only:
        stack = select(SelectRequest(request.checkpoint, only=request.only, **where), on_progress)
    else:
        stack = store.open_stack(request.stack_file)
    return export_files(
        stack,
        request.out,
        request.embeddings or request.out,
        stack_stem(request.stack_file),
        request.format,
        request.only,
        request.remove_superseded,
        [record.token for record in store.read_records(request.stack_file)],
    )


def forget(request: ForgetRequest, on_progress: OnProgress = ignore) -> ForgetResult:
    """Remove any one concept from the stack, and what later adapters know of it."""
    with open_session(request, on_progress, writes=True, at_once=False) as session:
        number = session.stack.index_of(request.token)
        record = session.stack.records[number]
        stack = _without(session, number, request.settings)
        session.commit(stack, "forgot", [record])
        clear_cache(cache_folder(real_file(session.path)))  # only the history still has the concept
    return ForgetResult(record, request.stack_file)


def _without(session: Session, number: int, settings: SolveSettings) -> ConceptStack:
    stack = session.stack
    unlearned: list[PromptRows] = []
    if number == len(stack.records) - 1:
        after, solves = consolidation.shortened(stack, number)
        if consolidation.stays_solved(stack, after):
            after, solves = with_targets(session, after, [number - 1], own_adapters(after)), True
    else:
        consolidation.check_solvable(stack)
        later = range(number + 1, len(stack.records))
        stack = encoded(session, stack, settings.language)
        unlearned = [stack.prompts[stack.records[number].id]]
        after = with_targets(session, stack, later, own_adapters(stack))
        after, solves = consolidation.without(after, number), True
    if after.records and (solves or after.prompts):  # no prompt may name it any more
        near = range(max(0, number - NEIGHBORS), min(number + NEIGHBORS, len(after.records)))
        after = encoded(session, after, settings.language, changed=near)
        assert after.ordinary
        nouns = [record.noun for record in after.records]
        ordinary = session.bank(after).without_nouns(after.ordinary, nouns)
        after = after.with_prompts({}, ordinary)
    if solves:
        session.on_progress(Progress("solve", 0, 1))
        after = after.with_solution(consolidation.solution(after, settings, unlearned=unlearned)[0])
        session.on_progress(Progress("solve", 1, 1))
    return after


def merge(request: MergeRequest, on_progress: OnProgress = ignore) -> MergeResult:
    """Put those concepts of another stack of the same checkpoint on this one that it lacks."""
    request.check()
    own = {record.id for record in store.read_records(request.stack_file)}
    others = read_header(request.other)["concepts"]
    theirs = {record["id"] for record in others}
    if not theirs:
        raise StackError(
            f"The stack {request.other} holds no concept, so there is nothing to merge. Choose "
            "another as `other`."
        )
    nothing_new = MergeResult([], {}, request.stack_file)
    if theirs <= own and all(record["method"] != "import" for record in others):
        return nothing_new
    with open_session(request, on_progress, writes=True) as session:
        own, other = set(session.stack.words), session.load(request.other)
        check_shared(session.stack, other, request.other)
        if other.words.keys() <= own:
            return nothing_new
        stack, renamed = put_on_top(session, other, request.settings)
        added = [record for record in stack.records if record.id not in own]
        session.commit(stack, "merged", added)
    return MergeResult([record.name for record in added], renamed, request.stack_file)


def put_on_top(
    session: Session, other: ConceptStack, settings: SolveSettings
) -> tuple[ConceptStack, dict[str, str]]:
    """The session's stack with the other's concepts on top, and the new names of words that both had.

    Errors: StackError for adapters of different kinds, for VeRA, and for names that both have and
    that are plain text.
    """
    stack = session.stack
    if not stack.records:
        return stack.in_place_of_nothing(other), {}
    joined, new, renamed = consolidation.joined(stack, other)
    if renamed and stack.checkpoint.preset in PLAIN_NAME_PRESETS:
        names = ", ".join(renamed)
        raise StackError(
            f"Both stacks have {names}, and names on this checkpoint are plain text, which the LoRA "
            "knows a thing by. Forget one of them first (`forget`)."
        )
    earlier, count = own_adapters(stack), len(stack.records)
    near = range(max(0, count - NEIGHBORS), min(count + NEIGHBORS, len(joined.records)))
    joined = encoded(session, joined, settings.language, changed=near)
    own = [*earlier, *new]
    if not any(new):
        return joined.with_solution(stack.adapter), renamed
    if sum(map(bool, own)) == 1:  # nothing that it has to agree with
        return joined.with_solution(next(filter(None, own))), renamed
    joined = with_targets(session, joined, range(count, len(own)), own)
    session.on_progress(Progress("solve", 0, 1))
    wanted = [*earlier, *own_adapters(joined)[count:]]
    adapter, _ = consolidation.solution(joined, settings, wanted)
    session.on_progress(Progress("solve", 1, 1))
    return joined.with_solution(adapter), renamed


def encoded(
    session: Session, stack: ConceptStack, language: float, changed: Sequence[int] = ()
) -> ConceptStack:
    """The stack with the prompts of all its concepts. `language`: the share of the vocabulary's sample;
    `changed`: concepts whose neighbors are others now.
    """
    if has_prompts(stack, language) and not changed:
        return stack
    return with_prompts(session.bank(stack), stack, changed=changed, language=language)


def with_targets(
    session: Session, stack: ConceptStack, numbers: Iterable[int], own: Sequence[Adapter | None]
) -> ConceptStack:
    """The stack with a target for each of these concepts that has an own adapter."""
    lacking = [n for n in numbers if own[n] and stack.records[n].id not in stack.targets]
    if not lacking:
        return stack
    bank = session.bank(stack)
    for number in lacking:
        adapter = own[number]
        assert adapter
        stack = with_small_target(bank, stack, number, adapter)
    return stack
