"""Read-only operations on a stack: scores, pictures, evaluation, plan.

Part of the pipeline, which re-exports these functions; none of them changes the stack file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from . import classifier, concepts, infotext, inventory, report, sample, store
from . import evaluate as evaluation
from . import plan as planning
from .adapters.adapter import attached, folded
from .checkpoint.backbone import FrozenText
from .errors import (
    Cancelled,
    ConceptImagesError,
    ContinualLoraError,
    SettingError,
    StackError,
)
from .files import stack_stem, with_name
from .imagefile import check_folder, check_output, save_own
from .mentions import named, not_in_use
from .prepare import checked_method, tell_of_prompts
from .presets import PREDICTION_NAMES
from .progress import OnProgress, Progress, counted, ignore
from .requests import (
    DrawRequest,
    EvaluateRequest,
    LearnRequest,
    ScoreRequest,
)
from .results import (
    Drawn,
    DrawResult,
    Scored,
    ScoreResult,
)
from .session import Session, explain_oom, open_session
from .settings import DrawSettings, ScoreSettings, SolveSettings
from .solving import chosen
from .stack import ConceptRecord, ConceptStack
from .training import check_optimizer
from .verdicts import RetentionReport
from .versions import in_use


def dc_scores(request: ScoreRequest, on_progress: OnProgress = ignore) -> ScoreResult:
    """Which concept each picture shows, another thing of one's noun, or none of these.

    A folder may have subfolders, whose names are the labels of their pictures.
    """
    request.check()
    groups = _groups(request.images, on_progress)
    if request.plot:
        check_output(request.plot)
    with open_session(request, on_progress) as session:
        scored = scored_pictures(session, groups, request.settings)
    chart = _plotted(lambda: report.score_sheet(scored), request.plot, on_progress)
    return ScoreResult(scored, chart)


def draw(request: DrawRequest, on_progress: OnProgress = ignore) -> DrawResult:
    """Draw every prompt `settings.count` times.

    Errors: SettingError if pictures have different numbers of prompts side by side.
    """
    request.check()
    prompts = _beside(request)
    if request.out:
        check_folder(request.out)
    with open_session(request, on_progress) as session:
        backbone, stack = session.backbone, session.stack
        if not stack.records:
            session.tell(
                f"{session.path} holds no concept yet, so the checkpoint draws as it is. Learn one "
                "first (`learn`), or name another stack (`stack`)."
            )
        asked = [*(one for parts in prompts for one in parts), request.settings.negative]
        tell_of_prompts(session, asked, stack.tokens, drawn=True)
        if request.only:
            words = stack.tokens
            stack = chosen(session, request.only, SolveSettings())
            for token in named(asked, words):
                if token not in stack.tokens:
                    on_progress(Progress("draw", 0, 1, note=not_in_use(token)))
        settings = request.settings.resolved(backbone.preset)
        _tell_of_settings(session, request.settings, settings)
        # the version is read before another program changes the stack
        kept = _Drawings(_origin(session, stack, request.only), prompts, settings, request.out)
        try:
            with folded(backbone, stack.adapter):
                sample.draw(
                    backbone,
                    stack.tokens,
                    kept.prompts,
                    kept.seeds,
                    settings,
                    on_progress,
                    stack.nouns,
                    on_drawn=kept.add,
                )
        except Cancelled as stopped:
            raise kept.with_place(stopped) from None
    return kept.result()


def _tell_of_settings(session: Session, asked: DrawSettings, resolved: DrawSettings) -> None:
    """Say which settings that were asked for change nothing."""
    if asked.negative and resolved.guidance == 1:
        session.tell("The negative prompt changes nothing, since a guidance of 1 leaves it out.")
    prediction = PREDICTION_NAMES[session.backbone.prediction]
    usual = DrawSettings().resolved(session.backbone.preset).flow_shift
    if asked.flow_shift not in (None, usual) and prediction != "flow":
        session.tell(
            "The flow shift is for nets that predict a flow (`prediction` flow). This one predicts "
            f"{prediction}, so it changes nothing."
        )


class _Drawings:
    """The pictures of a request, each stored as soon as it is drawn."""

    def __init__(
        self,
        origin: infotext.Origin,
        prompts: Sequence[tuple[str, ...]],
        settings: DrawSettings,
        out: Path | None,
    ) -> None:
        """`settings` are resolved."""
        self.origin, self.settings, self.out = origin, settings, out
        self.prompts = [parts for parts in prompts for _ in range(settings.count)]
        self.seeds = [settings.seed + n for _ in prompts for n in range(settings.count)]
        self.drawn: dict[int, Drawn] = {}
        self.files: dict[int, Path] = {}

    def add(self, number: int, picture: Tensor) -> None:
        """Errors: SettingError if it can't be written; those before it are kept."""
        parts, seed, image = self.prompts[number], self.seeds[number], concepts.to_pil(picture)
        texts = infotext.texts(self.origin, parts, seed, image.size, self.settings)
        self.drawn[number] = Drawn(" | ".join(parts), seed, image, texts)
        if self.out:
            self.files[number] = report.save_picture(self.drawn[number], self.out)

    def with_place(self, stopped: Cancelled) -> Cancelled:
        """The same, which also says where the pictures before it are."""
        if not self.files:
            return stopped
        done = f"{len(self.files)} of {counted(len(self.prompts), 'picture')}"
        return Cancelled(f"{stopped}; {done} are in {self.out}")

    def result(self) -> DrawResult:
        """All of them in order, and a grid of several."""
        pictures = [self.drawn[number] for number in sorted(self.drawn)]
        files = [self.files[number] for number in sorted(self.files)]
        if self.out and len(files) > 1:
            files.append(report.save_grid(pictures, self.out))
        return DrawResult(pictures, files)


def _origin(session: Session, stack: ConceptStack, only: Sequence[str]) -> infotext.Origin:
    """`stack`: what is drawn with, which may be some of the session's concepts."""
    path = session.path
    now = in_use(path) if path.exists() else None
    return infotext.Origin(
        with_name(session.backbone.path).stem,
        session.backbone.fingerprint,
        PREDICTION_NAMES[session.backbone.prediction],
        stack_stem(path),
        now.number if now else None,
        [record.name for record in stack.records],
        only,
        session.backbone.clip_skip,
    )


def evaluate(request: EvaluateRequest, on_progress: OnProgress = ignore) -> RetentionReport:
    """Draw every concept with every version of the stack since it was learned, and measure how much
    is retained.
    """
    request.check()
    groups = _groups(request.images, on_progress) if request.images else []
    if request.plot:
        check_output(request.plot)
    with open_session(request, on_progress) as session:
        result = evaluated(session, request, groups)
    chart = _plotted(lambda: report.retention_sheet(result), request.plot, on_progress)
    return replace(result, chart=chart)


def plan(request: LearnRequest) -> planning.Plan:
    """What learning this will take, without loading the checkpoint."""
    checked_method(request)
    again = learned_before(request) is not None
    if not again:
        check_optimizer(request.settings)
    return replace(planning.plan(request), again=again)


def learned_before(request: LearnRequest) -> ConceptRecord | None:
    """The stack's concept that was learned by the same request: the same pictures, captions, words
    and settings.
    """
    return store.learned_by(store.read_records(request.stack_file), request.digest)


def scored_pictures(
    session: Session, groups: Sequence[inventory.Group], settings: ScoreSettings
) -> list[Scored]:
    """The scores of every picture in these groups for all concepts."""
    stack, backbone = session.stack, session.backbone
    if not stack.records:
        raise StackError(
            f"{session.path} holds no concept yet, so there is nothing to score. Learn one first."
        )
    if stack.tau is None:
        raise StackError(
            "All concepts of this stack were imported, so its DC scores were never calibrated. "
            "Learn one concept here first."
        )
    if unknown := _unknown(stack, groups):
        session.tell(
            f"No concept is named {' or '.join(unknown)}, so these pictures are scored, but count "
            f"neither as right nor as wrong. There are {', '.join(stack.tokens)}."
        )
    prompts = classifier.prompts_of(stack.records)
    tell_of_prompts(session, prompts.values(), stack.tokens)
    features = classifier.candidates(stack.records, FrozenText(backbone, stack.tokens))
    size, scored = settings.size or classifier.side_of(stack.records, backbone.size), []
    count = sum(len(files) for _, files in groups)

    def report(progress: Progress) -> None:  # of one picture -> of all
        step = len(scored) * progress.steps + progress.step
        session.on_progress(replace(progress, step=step, steps=count * progress.steps))

    with attached(backbone, stack.adapter):
        for label, pictures in groups:
            concept = stack.find(label)
            for one in pictures:
                picture = concepts.load_image(one.file, size, fit=settings.fit)
                latent = backbone.encode_images([picture])[0]
                scores = classifier.classify(
                    backbone, latent, features, stack.tau, settings, report
                )
                scored.append(Scored(one.file, concept.token if concept else None, scores))
    return scored


def scored_after_learning(session: Session, request: LearnRequest) -> ScoreResult | None:
    """The scores of the first pictures of a concept that was just stored, in few trials.

    If they can't be scored, that is told and the concept kept; a stop says that it is stored.
    """
    settings = ScoreSettings(trials=8, fit=request.settings.fit)
    stored = f"{request.token} is learned and stored, but its pictures were not scored"
    try:
        pictures = list(inventory.inventory(request.images).pictures[: request.score])
        with explain_oom(None):
            return ScoreResult(scored_pictures(session, [("", pictures)], settings))
    except Cancelled as stopped:
        raise Cancelled(f"{stopped} {stored}.") from None
    except ContinualLoraError as error:
        session.tell(f"{stored}: {error.marked}")
        return None


def evaluated(
    session: Session, request: EvaluateRequest, groups: Sequence[inventory.Group]
) -> RetentionReport:
    stack, backbone = session.stack, session.backbone
    if not stack.records:
        raise StackError(
            f"{session.path} holds no concept yet, so there is nothing to evaluate. Learn one first."
        )
    settings = request.settings.resolved(backbone.preset)
    size = settings.size or backbone.size
    own_images: dict[str, list[Tensor]] = {}
    for label, pictures in groups:
        if record := stack.find(label):
            loaded = [concepts.load_image(one.file, size) for one in pictures]
            own_images.setdefault(record.token, []).extend(loaded)
        elif pictures[0].folder:
            session.tell(f"Left out: the pictures in {label}; no concept has this name.")
        else:
            session.tell(f"Left out: the pictures beside the folders in {request.images}.")
    if groups and not own_images:
        found = ", ".join(_unknown(stack, groups)) or "no folder with pictures"
        raise ConceptImagesError(
            f"No folder in {request.images} is named after a concept. Expected "
            f"{', '.join(stack.tokens)}; found {found}."
        )
    own = {token: torch.stack(images) for token, images in own_images.items()}
    tell_of_prompts(session, evaluation.prompts_of(stack.records), stack.tokens)
    features = evaluation.features(backbone, request.clip)
    return evaluation.evaluate(
        backbone,
        stack,
        own,
        features,
        settings,
        session.on_progress,
        use_kept=request.clip is None,
    )


def _unknown(stack: ConceptStack, groups: Sequence[inventory.Group]) -> list[str]:
    """The subfolders that are not named after a concept of the stack."""
    return [name for name, pictures in groups if pictures[0].folder and not stack.find(name)]


def _plotted(made: Callable[[], Image], plot: Path | None, on_progress: OnProgress) -> Path | None:
    """Make and write a result's plot; if there is no room for it, or a picture that it shows is gone,
    say so and keep the result.
    """
    if plot is None:
        return None
    try:
        save_own(made(), plot)
    except (SettingError, ConceptImagesError) as error:
        on_progress(Progress("plot", 1, 1, note=error.marked))
        return None
    return plot


def _groups(images: Path | list[Path], on_progress: OnProgress) -> list[inventory.Group]:
    """`inventory.groups`; all pictures are read once, so that one that can't be is found before the
    work, and what is left out or changed is told.
    """

    def tell(note: str) -> None:
        on_progress(Progress("load", 0, 1, note=note))

    groups, found = inventory.groups(images)
    if found.left_out:
        tell(f"{counted(len(found.pictures), 'picture')}{found.rest()}")
    concepts.check_readable(found.pictures, tell)
    return groups


def _beside(request: DrawRequest) -> list[tuple[str, ...]]:
    """Each picture's prompts, from left to right."""
    prompts = [(one,) if isinstance(one, str) else tuple(one) for one in request.prompts]
    counts = {len(parts) for parts in prompts}
    if not counts or 0 in counts:
        raise SettingError("`prompts` has no prompt. Give one, such as a photo of a V1 teapot.")
    if len(counts) > 1:
        raise SettingError(
            "All pictures of a request need the same number of prompts side by side; these have "
            f"{sorted(counts)}. Draw them in separate requests."
        )
    return prompts
