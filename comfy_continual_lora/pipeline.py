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

from collections.abc import Sequence
from dataclasses import replace

from . import concepts, parallel, store
from .adapters.adapter import rank_of
from .checkpoint.load import open_checkpoint
from .concept import kept_features, load_concept, record_of
from .foreign import check_same, check_word, imported_concept
from .learn import learn
from .lorafile import Rest
from .mentions import previewed
from .methods.method import LearnedConcept
from .methods.stages import calibrated, distilled
from .prepare import (
    check_suits_stack,
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
    ImportRequest,
    LearnRequest,
)
from .results import (
    ConsolidateResult,
    ImportResult,
    LearnResult,
)
from .session import Snapshots, open_session
from .solving import consolidate_in_closed_form as consolidate_in_closed_form
from .solving import export as export
from .solving import forget as forget
from .solving import merge as merge
from .solving import put_on_top
from .solving import select as select
from .stack import ConceptRecord, ConceptStack
from .training import check_optimizer
from .upkeep import history as history
from .upkeep import info as info
from .upkeep import rename as rename
from .upkeep import restore as restore
from .upkeep import undo as undo
from .views import dc_scores as dc_scores
from .views import draw as draw
from .views import evaluate as evaluate
from .views import learned_before as learned_before
from .views import plan as plan
from .views import scored_after_learning
from .words import check_apart


def learn_concept(request: LearnRequest, on_progress: OnProgress = ignore) -> LearnResult:
    """Teach the checkpoint one more concept and put it on its stack.

    The same request resumes a stopped run, and does not repeat a finished one.
    """
    method = checked_method(request)  # the cheapest mistakes first: nothing is loaded yet
    digest = request.digest
    if known := store.learned_by(store.read_records(request.stack_file), digest):
        return LearnResult(known, list(known.losses), request.stack_file, again=True)
    check_suits_stack(request)
    take_stock(request.images, on_progress)
    with parallel.together(request.device) as device:
        request = replace(request, device=device)
        precision = request.settings.precision
        with open_session(request, on_progress, precision=precision, writes=True) as session:
            # since it was looked at above
            if known := store.learned_by(session.stack.records, digest):
                return LearnResult(known, list(known.losses), request.stack_file, again=True)
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
                session, settings, concept, record, trained.word, penalties, snapshots
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
    if again := _again(store.read_records(request.stack_file), request, digest):
        return again
    check_optimizer(request.settings)
    take_stock(request.images, on_progress)
    precision = request.settings.precision
    with open_session(request, on_progress, precision=precision, writes=True) as session:
        if again := _again(session.stack.records, request, digest):
            return again
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


def _again(
    records: Sequence[ConceptRecord], request: ConsolidateRequest, digest: str
) -> ConsolidateResult | None:
    """The result, if the request with this digest consolidated the newest concept."""
    if not records or records[-1].consolidated != digest:
        return None
    return ConsolidateResult(records[-1], [], request.stack_file, len(records) - 1, again=True)


def import_concept(request: ImportRequest, on_progress: OnProgress = ignore) -> ImportResult:
    """Put a K/V LoRA that another program made on the stack, as one concept."""
    concepts.check_noun(request.noun, request.token)
    with open_checkpoint(request.checkpoint) as layout:
        check_word(request, layout.preset)
    with open_session(request, on_progress, writes=True) as session:
        tell_of_noun(session, request)
        imported = imported_concept(session.backbone, request)
        record = imported.record
        if known := next((one for one in session.stack.records if one.id == record.id), None):
            check_same(known, session.stack.words[known.id], imported, request)
            return _import_result(known, imported.rest, request, again=True)
        concepts.check_token(request.token, session.stack.tokens, session.backbone.is_known_word)
        check_apart(request.token, request.class_noun, session.stack.nouns)
        tell_of_clip_skip(session, imported.clip_skip)
        other = ConceptStack(session.stack.fingerprint, rank=rank_of(imported.adapter))
        other.checkpoint = replace(session.stack.checkpoint, clip_skip=imported.clip_skip)
        other = other.learned(record, imported.word, imported.adapter)
        stack, _ = put_on_top(session, other, request.settings)
        result = _import_result(record, imported.rest, request)
        session.commit(stack, "imported", [record])
    return result


def _import_result(
    record: ConceptRecord, rest: Rest | None, request: ImportRequest, again: bool = False
) -> ImportResult:
    """The result, once the file with the rest is written, with `rest` keep."""
    kept = rest.keep(request.lora) if rest and request.rest == "keep" else None
    return ImportResult(record, request.lora, again, rest.described() if rest else "", kept)
