"""What only looks at a stack: scores, pictures, evaluation, export, plan, history.

Part of the pipeline, which offers these functions as its own; none of them changes the stack file, but
for how many versions `history` is to keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import classifier, concepts, consolidation, report, sample, stackfile, store
from . import evaluate as evaluation
from . import history as stack_history
from . import plan as planning
from .adapters.adapter import attached
from .checkpoint.backbone import FrozenText
from .checkpoint.load import fingerprint
from .errors import ConceptImagesError, SettingError, StackError
from .export import Exported, export_files
from .files import stack_stem
from .imagefile import check_output, save_own
from .progress import OnProgress, ignore
from .requests import (
    DrawRequest,
    EvaluateRequest,
    ExportRequest,
    HistoryRequest,
    InfoRequest,
    LearnRequest,
    ScoreRequest,
    SelectRequest,
)
from .results import (
    Drawn,
    DrawResult,
    HistoryResult,
    InfoResult,
    Scored,
    ScoreResult,
)
from .session import Session, open_session
from .settings import ScoreSettings, SolveSettings
from .stack import ConceptRecord, ConceptStack
from .versions import versions


def dc_scores(request: ScoreRequest, on_progress: OnProgress = ignore) -> ScoreResult:
    """Which concept, or which class noun without one (c_0), each picture shows.

    A folder may hold folders: each one's name is the right answer.
    """
    request.check()
    groups = concepts.groups(request.images)
    if request.plot:
        check_output(request.plot)
    with open_session(request, on_progress) as session:
        scored = scored_pictures(session, groups, request.settings)
    if request.plot:
        save_own(report.score_sheet(scored), request.plot)
    return ScoreResult(scored, request.plot)


def draw(request: DrawRequest, on_progress: OnProgress = ignore) -> DrawResult:
    """Draw every prompt `settings.count` times.

    Errors: SettingError if one picture shall show more beside each other than another.
    """
    request.check()
    prompts = _beside(request)
    with open_session(request, on_progress) as session:
        backbone, stack = session.backbone, session.stack
        if request.only:
            stack = consolidation.selected(
                backbone, stack, request.only, SolveSettings(), on_progress
            )
        settings = request.settings.resolved(backbone.preset)
        wanted = [(parts, settings.seed + i) for parts in prompts for i in range(settings.count)]
        parts, seeds = [one for one, _ in wanted], [seed for _, seed in wanted]
        with attached(backbone, stack.adapter):
            images = sample.draw(backbone, stack.tokens, parts, seeds, settings, on_progress)
        drawn = [
            Drawn(" | ".join(one), seed, concepts.to_pil(image))
            for (one, seed), image in zip(wanted, images, strict=True)
        ]
    return DrawResult(drawn, report.save_pictures(drawn, request.out) if request.out else [])


def evaluate(
    request: EvaluateRequest, on_progress: OnProgress = ignore
) -> evaluation.RetentionReport:
    """Draw every concept with every version of the stack since it was learned, and tell how much is
    kept.
    """
    request.check()
    groups = dict(concepts.groups(request.images)) if request.images else {}
    if request.plot:
        check_output(request.plot)
    with open_session(request, on_progress) as session:
        result = evaluated(session, request, groups)
    if request.plot:
        save_own(report.retention_sheet(result), request.plot)
    return replace(result, chart=request.plot)


def export(request: ExportRequest, on_progress: OnProgress = ignore) -> Exported:
    """Write the stack as one LoRA and one embedding a word.

    For some concepts (`only`) a LoRA is solved, which needs the checkpoint; else it is not opened.
    """
    request.check()
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
    )


def select(request: SelectRequest, on_progress: OnProgress = ignore) -> ConceptStack:
    """Some concepts of the stack with a LoRA solved for them alone, to draw and to export; the
    stack file stays as it is.
    """
    with open_session(request, on_progress) as session:
        return consolidation.selected(
            session.backbone, session.stack, request.only, request.settings, on_progress
        )


def history(request: HistoryRequest, on_progress: OnProgress = ignore) -> HistoryResult:
    """The stack's versions that are kept, the newest first; `keep` says how many from now on."""
    if request.keep is not None:
        stack_history.keep_versions(request.stack_file, request.keep)
    return HistoryResult(versions(request.stack_file))


def info(request: InfoRequest, on_progress: OnProgress = ignore) -> InfoResult:
    """What a checkpoint has learned, from the stack's header; the checkpoint is looked into only
    where there is no stack yet.
    """
    path = request.stack_file
    if not path.exists():
        return InfoResult([], path, fingerprint(request.checkpoint), None, 0)
    header, shapes = stackfile.read_shapes(path)
    newest = f"word.{header['concepts'][-1]['id']}" if header["concepts"] else ""
    used = [shape for key, shape in shapes.items() if key.startswith("adapter.") or key == newest]
    trainable = sum(math.prod(shape.sizes) for shape in used)
    return InfoResult(header["concepts"], path, header["fingerprint"], header["rank"], trainable)


def plan(request: LearnRequest) -> planning.Plan:
    """What learning this will take, without loading the checkpoint."""
    request.check()
    return planning.plan(request.checkpoint, request.stack_file, request.settings, request.device)


def learned_before(request: LearnRequest) -> ConceptRecord | None:
    """The stack's concept that this very request has taught it already: the same pictures,
    captions, words and settings.
    """
    return store.record_of_request(request.stack_file, request.digest)


def scored_pictures(
    session: Session, groups: Sequence[tuple[str, list[Path]]], settings: ScoreSettings
) -> list[Scored]:
    """Every picture of every (folder's name, files) compared with all concepts."""
    stack, backbone = session.stack, session.backbone
    if not stack.records:
        raise StackError(
            f"{session.path} holds no concept yet, so there is nothing to tell apart. Learn one "
            "first."
        )
    if stack.tau is None:
        raise StackError(
            "All concepts of this stack were imported, so its DC scores were never calibrated. "
            "Learn one concept here first."
        )
    features = classifier.candidates(stack.records, FrozenText(backbone, stack.tokens))
    size, scored = settings.size or backbone.size, []
    with attached(backbone, stack.adapter):
        for label, files in groups:
            concept = stack.find(label)
            for file in files:
                picture = concepts.load_images([file], size, fit=settings.fit)
                latent = backbone.encode_images(picture.images)[0]
                scores = classifier.classify(
                    backbone, latent, features, stack.tau, settings, session.on_progress
                )
                scored.append(Scored(file, concept.token if concept else None, scores))
    return scored


def evaluated(
    session: Session, request: EvaluateRequest, groups: dict[str, list[Path]]
) -> evaluation.RetentionReport:
    """`groups`: files by the name of their folder."""
    stack, backbone = session.stack, session.backbone
    if not stack.records:
        raise StackError(
            f"{session.path} holds no concept yet, so there is nothing to evaluate. Learn one first."
        )
    settings = request.settings.resolved(backbone.preset)
    size, given = settings.size or backbone.size, {}
    for name, files in groups.items():
        if record := stack.find(name):
            given[record.token] = torch.stack(concepts.load_images(files, size).images)
    if groups and not given:
        raise ConceptImagesError(
            f"No folder in {request.images} is named after a concept. Expected "
            f"{', '.join(stack.tokens)}; found {', '.join(groups)}."
        )
    features = evaluation.features(backbone, request.clip)
    return evaluation.evaluate(backbone, stack, given, features, settings, session.on_progress)


def _beside(request: DrawRequest) -> list[tuple[str, ...]]:
    """The prompts of each picture."""
    prompts = [(one,) if isinstance(one, str) else tuple(one) for one in request.prompts]
    counts = {len(parts) for parts in prompts}
    if len(counts) > 1:
        raise SettingError(
            "The pictures of one request show equally many prompts beside each other; these show "
            f"{sorted(counts)}. Ask for them one by one."
        )
    return prompts
