"""What this project does, from end to end: READ THIS FIRST. Front ends call these functions.

How `learn_concept` works with the default method, `retention`:

    pictures -> concept.py        latents, prompts, masks
             -> methods/          start: adapter and word; penalties: ordinary prompts stay as they are
             -> learn.py          the denoising loss over adapter and word, in the loop of training.py
             -> consolidation.py  one LoRA closest to what every concept's own did to its prompts
                                  (targets.py: the prompts and their targets; solve.py: the algebra)
             -> store.py          one safetensors file beside the checkpoint
             -> sample.py, classifier.py, export.py     draw, score, export

The paper's methods train again instead of solving (dsc.py), or measure which parameters a concept
needs (fisher.py) and hold those (ewc.py); see their files in methods/.

Every function takes one request (requests.py), reports through `on_progress`, raises a
`ContinualLoraError` that a user can act on, and returns one result (results.py). A failed or
cancelled call leaves the concept stack as it was.
"""

from __future__ import annotations

from dataclasses import replace

from . import concepts, consolidation, parallel, store
from .adapters.adapter import rank_of
from .concept import kept_features, load_concept, record_of
from .errors import StackError
from .foreign import check_same_strength, imported_concept
from .learn import learn
from .mentions import previewed
from .methods.method import LearnedConcept
from .methods.stages import calibrated, distilled
from .moments import clear_cache
from .prepare import (
    checked_method,
    make_room,
    newest_again,
    preview_last,
    settings_for,
    take_stock,
    tell_of_clip_skip,
    tell_of_noun,
    tell_of_objective,
    tell_of_prompts,
    watched,
)
from .progress import OnProgress, ignore
from .requests import (
    ConsolidateRequest,
    ForgetRequest,
    ImportRequest,
    LearnRequest,
    MergeRequest,
    SolveRequest,
)
from .results import (
    ConsolidateResult,
    ForgetResult,
    ImportResult,
    LearnResult,
    MergeResult,
    SolveResult,
)
from .session import Snapshots, open_session
from .stack import ConceptStack
from .stackfile import read_header
from .targets import prompt_bank
from .upkeep import history as history
from .upkeep import info as info
from .upkeep import rename as rename
from .upkeep import restore as restore
from .upkeep import undo as undo
from .views import dc_scores as dc_scores
from .views import draw as draw
from .views import evaluate as evaluate
from .views import export as export
from .views import learned_before as learned_before
from .views import plan as plan
from .views import scored_after_learning
from .views import select as select


def learn_concept(request: LearnRequest, on_progress: OnProgress = ignore) -> LearnResult:
    """Teach the checkpoint one more concept and put it on its stack.

    The same request resumes a stopped run, and does not repeat a finished one.
    """
    method = checked_method(request)  # the cheapest mistakes first: nothing is loaded yet
    digest = request.digest
    if known := store.record_of_request(request.stack_file, digest):
        return LearnResult(known, list(known.losses), request.stack_file, again=True)
    take_stock(request.images, on_progress)
    with parallel.together(request.device) as device:
        request = replace(request, device=device)
        precision = request.settings.precision
        with open_session(request, on_progress, precision=precision, writes=True) as session:
            change = make_room(session, request)
            tell_of_noun(session, request)
            settings = settings_for(session, request, method)
            concept = load_concept(
                session,
                request.images,
                request.token,
                request.class_noun,
                settings,
                with_noun=not method.fresh_adapter(settings),
            )
            start = method.start(session, concept, settings)
            penalties = method.penalties(session, settings, start.retention)
            inputs = method.training_inputs(session, concept, settings, start, penalties)
            if settings.watch_every or settings.until == "good":
                inputs = watched(session, concept, inputs)
            snapshots = Snapshots.of(session, concept, settings, inputs.prompts)
            snapshots.tell_of_others(on_progress)
            if not snapshots.path().exists():
                tell_of_objective(session, concept)
            words = {**session.stack.tokens, concept.token: start.word}
            own = previewed(settings.preview_prompts, ())
            tell_of_prompts(session, own, words, drawn=True)
            trained = learn(session.backbone, inputs, settings, snapshots.path(), on_progress)
            record = record_of(concept, session.stack, settings, trained, digest)
            if settings.keep_features:
                record = replace(record, features=kept_features(session, concept))
            learned = LearnedConcept(
                session, settings, concept, record, trained.word, penalties, snapshots, start.bank
            )
            if session.stack.tau is None:
                session.stack = session.stack.calibrated(calibrated(learned, trained.adapter))
            adapter = method.consolidate(learned, trained.adapter)
            parallel.wait()  # until all processes have read the stack that is about to be written
            if parallel.is_first():
                stack = method.remember(learned, adapter)
                if settings.preview_every and stack.adapter is not trained.adapter:
                    preview_last(session, stack, settings)
                session.commit(stack, change, [record])
                snapshots.remove()
            scores = None
            if request.score and parallel.is_first():
                scores = scored_after_learning(session, request)
    return LearnResult(record, trained.losses, request.stack_file, scores=scores)


def consolidate(request: ConsolidateRequest, on_progress: OnProgress = ignore) -> ConsolidateResult:
    """Run full Diffusion Scores Consolidation on the newest concept; the stack's newest adapter and
    Fisher are replaced.
    """
    request.check()
    digest = request.digest
    records = store.read_records(request.stack_file)
    if records and records[-1].consolidated == digest:
        return ConsolidateResult(records[-1], [], request.stack_file, len(records) - 1, again=True)
    take_stock(request.images, on_progress)
    precision = request.settings.precision
    with open_session(request, on_progress, precision=precision, writes=True) as session:
        learned, adapter, method = newest_again(session, request)
        learned.snapshots.tell_of_others(on_progress)
        student, losses = distilled(learned, adapter, learned.penalties, with_scores=True)
        fisher = None
        if learned.record.id in session.stack.fishers:
            fisher = method.fisher(learned, student)
        stack = session.stack.consolidated(student, digest, fisher)
        session.commit(stack, "consolidated", stack.records[-1:])
        learned.snapshots.remove()
    return ConsolidateResult(stack.records[-1], losses, request.stack_file, len(stack.records) - 1)


def consolidate_in_closed_form(
    request: SolveRequest, on_progress: OnProgress = ignore
) -> SolveResult:
    """Solve for the one LoRA that does to every concept's prompts what the adapter right after it
    did. Needs no pictures and no U-Net, and is deterministic.
    """
    with open_session(request, on_progress, writes=True) as session:
        stack = session.stack
        if len(stack.records) < 2 or stack.adapter is None:
            raise StackError(
                f"There is nothing to consolidate: {request.stack_file} needs at least two "
                "concepts, learned with a LoRA."
            )
        bank = prompt_bank(
            session.backbone,
            stack,
            on_progress,
            count=0,
            cache=session.cache,
            language=request.settings.language,
        )
        solved, result = consolidation.consolidated(
            session.backbone, stack, request.settings, on_progress, bank
        )
        session.commit(solved, "solved", solved.records)
    return result


def forget(request: ForgetRequest, on_progress: OnProgress = ignore) -> ForgetResult:
    """Remove any one concept from the stack, and what later adapters know of it."""
    with open_session(request, on_progress, writes=True) as session:
        record = session.stack.records[session.stack.index_of(request.token)]
        stack = consolidation.without(
            session.backbone,
            session.stack,
            request.token,
            request.settings,
            on_progress,
            session.cache,
        )
        session.commit(stack, "forgot", [record])
        clear_cache(session.cache)  # only the history still contains the concept
    return ForgetResult(record, request.stack_file)


def merge(request: MergeRequest, on_progress: OnProgress = ignore) -> MergeResult:
    """Put those concepts of another stack of the same checkpoint on this one that it lacks."""
    request.check()
    own = {record.id for record in store.read_records(request.stack_file)}
    theirs = {record["id"] for record in read_header(request.other)["concepts"]}
    if not theirs:
        raise StackError(
            f"The stack {request.other} holds no concept, so there is nothing to merge. Choose "
            "another as `other`."
        )
    if theirs <= own:
        return MergeResult([], {}, request.stack_file)
    with open_session(request, on_progress, writes=True) as session:
        own = set(session.stack.words)
        stack, renamed = consolidation.merged(
            session.backbone,
            session.stack,
            session.load(request.other),
            request.settings,
            on_progress,
            session.cache,
        )
        added = [record for record in stack.records if record.id not in own]
        if added:
            session.commit(stack, "merged", added)
    return MergeResult([record.name for record in added], renamed, request.stack_file)


def import_concept(request: ImportRequest, on_progress: OnProgress = ignore) -> ImportResult:
    """Put a K/V LoRA that another program made on the stack, as one concept."""
    concepts.check_noun(request.noun, request.token)
    with open_session(request, on_progress, writes=True) as session:
        tell_of_noun(session, request)
        imported = imported_concept(session.backbone, request)
        record, rest = imported.record, imported.rest
        if known := next((one for one in session.stack.records if one.id == record.id), None):
            check_same_strength(known, request)
            return ImportResult(known, request.lora, again=True)
        concepts.check_token(request.token, session.stack.tokens, session.backbone.is_known_word)
        tell_of_clip_skip(session, imported.clip_skip)
        other = ConceptStack(session.stack.fingerprint, rank=rank_of(imported.adapter))
        other.checkpoint = replace(other.checkpoint, clip_skip=imported.clip_skip)
        other = other.learned(record, imported.word, imported.adapter)
        stack, _ = consolidation.merged(
            session.backbone, session.stack, other, request.settings, on_progress, session.cache
        )
        kept = rest.keep(request.lora) if rest and request.rest == "keep" else None
        session.commit(stack, "imported", [record])
    return ImportResult(record, request.lora, rest=rest.described() if rest else "", kept=kept)
