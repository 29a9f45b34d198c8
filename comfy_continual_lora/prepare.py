"""Stage 2: preparation for learning and consolidating: checks, a free word, resolved settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from . import concepts, objective
from .adapters.adapter import Adapter, folded
from .concept import Concept, load_concept, source_of
from .consolidation import undone
from .early import check_learn
from .emphasis import unread
from .errors import SettingError, StackError
from .inventory import inventory
from .learn import TrainingInputs, preview
from .mentions import not_learned, not_read, only_in_web_uis, previewed, unknown_words
from .methods import METHODS
from .methods.method import LearnedConcept, Method, StackSummary, summary_of, summary_of_file
from .methods.stages import past_adapters
from .presets import FLOW_PRESETS, PLAIN_NAME_PRESETS, PREDICTION_NAMES
from .progress import OnProgress, Progress
from .requests import ConsolidateRequest, ImportRequest, LearnRequest
from .session import Session, Snapshots, clip_skip_of, prediction_of
from .settings import LearnSettings, ResolvedSettings
from .stack import ConceptRecord, ConceptStack
from .training import check_optimizer
from .watch import Names, held_out
from .words import check_apart, check_newest


def checked_method(request: LearnRequest) -> Method:
    """The request's method, after all checks that do not need the checkpoint."""
    request.check()
    check_learn(request)
    method = METHODS[request.settings.method]
    method.check(request.settings, summary_for(request))
    return method


def check_suits_stack(request: LearnRequest) -> None:
    """What a concept that is not on the stack yet can't be learned with, before anything is loaded.

    Errors: SettingError, StackError.
    """
    check_optimizer(request.settings)
    stack = summary_for(request)
    with_rank_of(stack, request.settings)
    if stack.checkpoint:
        check_suits_checkpoint(request, stack.checkpoint.preset, stack)


def check_suits_checkpoint(request: LearnRequest, preset: str, stack: StackSummary) -> None:
    """Errors: SettingError, StackError for settings that a checkpoint of this preset, or a stack that
    was learned with others, does not take.
    """
    prediction_of(request, preset, "", stack.checkpoint, request.stack_file)
    clip_skip_of(request, preset, stack.checkpoint)


def summary_for(request: LearnRequest) -> StackSummary:
    """The summary of the stack file that the concept is put on, without the one it replaces.

    `settings_for` checks again once the stack is read.
    """
    return summary_of_file(request.stack_file, request.token if request.replace else "")


def take_stock(images: Path | list[Path], on_progress: OnProgress) -> None:
    """Tell what will be learned from and what is left out, before anything is loaded.

    Errors: ConceptImagesError for a caption that can't be read.
    """
    for note in inventory(images).notes():
        on_progress(Progress("load", 0, 1, note=note))


def make_room(session: Session, request: LearnRequest) -> str:
    """Make sure the word is free; returns the kind of change for the history.

    A concept to be replaced is removed in memory; on disk it stays until the new one is stored.
    """
    change = "learned"
    if request.replace and session.stack.find(request.token) is not None:
        session.stack = _without_newest(session.stack, request.token)
        change = "replaced"
    elif request.replace:
        session.tell(f"The stack has no {request.token} to replace, so it is learned as a new one.")
    concepts.check_token(request.token, session.stack.tokens, session.backbone.is_known_word)
    check_apart(request.token, request.class_noun, session.stack.nouns)
    return change


def tell_of_noun(session: Session, request: LearnRequest | ImportRequest) -> None:
    """Say if prompts will use the class noun without its first words."""
    if (noun := request.class_noun) != (given := request.noun.strip()):
        session.tell(
            f'The class noun is "{noun}", without "{given.removesuffix(noun).strip()}": prompts have '
            "an article of their own."
        )


def tell_of_clip_skip(session: Session, imported: int) -> None:
    """Say if an imported LoRA was trained with another clip skip than the stack's concepts."""
    if session.stack.records and imported != (own := session.backbone.clip_skip):
        session.tell(
            f"The LoRA says that it was trained with clip skip {imported}; this stack has {own}, so it "
            "may draw less well here. To keep its own, import it into another `stack`."
        )


def tell_of_objective(session: Session, concept: Concept) -> None:
    """Before a stack's first concept, say if the checkpoint seems to predict something else."""
    if not session.stack.records and session.backbone.preset not in FLOW_PRESETS:
        prompt = f"a photo of a {concept.noun}"
        if note := objective.doubt(session.backbone, concept.latents, prompt):
            session.tell(note)


def _without_newest(stack: ConceptStack, token: str) -> ConceptStack:
    """Errors: TokenError if the newest concept has another word."""
    check_newest(token, stack.records[-1].token)
    return undone(stack)


def settings_for(session: Session, request: LearnRequest, method: Method) -> ResolvedSettings:
    """The resolved settings. Errors: SettingError if they don't suit the stack."""
    stack = summary_of(session.stack)
    method.check(request.settings, stack)
    settings = with_rank_of(stack, request.settings)
    settings = replace(settings, clip_skip=session.backbone.clip_skip)
    resolved = settings.resolved(session.backbone.preset)
    check_name(session.backbone.path, resolved, session.backbone.preset)
    prediction = PREDICTION_NAMES[session.backbone.prediction]
    if request.settings.weighting == "debiased" and prediction != "epsilon":
        session.tell(
            "The weighting debiased is for nets that predict noise (`prediction` epsilon). This one "
            f"predicts {prediction}, so all timesteps weigh the same."
        )
    return resolved


def check_name(checkpoint: Path, settings: ResolvedSettings, preset: str) -> None:
    """Errors: SettingError if the checkpoint's names are plain text and this wants vectors, or not
    and it wants none.
    """
    plain = preset in PLAIN_NAME_PRESETS
    if plain and settings.method == "textual_inversion":
        raise SettingError(
            f"The `method` textual_inversion learns a word's vectors alone, and on {checkpoint.name} "
            "names are plain text. Choose another."
        )
    if plain != (settings.vectors == 0):
        kind = "plain text, without vectors" if plain else "learned vectors, at least one"
        raise SettingError(
            f"`vectors` is {settings.vectors}, but a concept's name on {checkpoint.name} is {kind}. "
            "Leave it out."
        )


def with_rank_of(stack: StackSummary, settings: LearnSettings) -> LearnSettings:
    """The settings with the stack's rank, if it has one. Errors: SettingError for another one."""
    if stack.rank is None or settings.rank == stack.rank:
        return settings
    # the closed form may have raised the rank that the concepts were learned with
    if settings.rank is not None and settings.rank not in stack.ranks:
        raise SettingError(
            f"`rank` is {settings.rank}, but the concepts of this stack were learned with rank "
            f"{stack.rank}. Leave it out, or start another `stack`."
        )
    return replace(settings, rank=stack.rank)


def newest_again(
    session: Session, request: ConsolidateRequest
) -> tuple[LearnedConcept, Adapter, Method]:
    """The newest concept as it was right after learning, its adapter and its method.

    Its session has the stack without it. Errors: StackError if no earlier concept has a LoRA.
    """
    stack, path = session.stack, session.path
    if len(stack.records) < 2 or stack.adapter is None:
        raise StackError(
            f"There is nothing to consolidate: {path} needs at least two concepts, both learned "
            "with a LoRA."
        )
    record = stack.records[-1]
    if record.method not in METHODS:
        raise StackError(
            f"{record.token} was imported, so there are no pictures that it was learned from. Use "
            "`closed_form`, which needs none."
        )
    earlier = replace(session, stack=undone(stack), writes=False)
    settings = _settings_again(request, record, earlier)
    method = METHODS[settings.method]
    concept = load_concept(
        earlier, request.images, record.token, record.noun, settings, with_noun=record.with_noun
    )
    if record.hashes and set(record.hashes).isdisjoint(concept.images.hashes):
        session.tell(
            f"None of these is one of the pictures that {record.token} was learned from. If they "
            f"show another thing, {record.token} becomes that thing: stop, and give its own."
        )
    # a run starts from the newest concept's adapter too, which the stack without it lacks
    source = source_of(stack, request.images, token=record.token, noun=record.noun)
    concept = replace(concept, source=source)
    method.encode(earlier, record.noun, settings)
    held = method.retention(earlier, settings)
    penalties = method.penalties(earlier, settings, held)
    snapshots = Snapshots.of(earlier, concept, settings)
    learned = LearnedConcept(
        earlier, settings, concept, record, stack.words[record.id], penalties, snapshots
    )
    if not past_adapters(learned):
        raise StackError(
            f"There is nothing to consolidate: no concept before {record.token} in {path} has a "
            "LoRA."
        )
    return learned, stack.adapter, method


def _settings_again(
    request: ConsolidateRequest, record: ConceptRecord, earlier: Session
) -> ResolvedSettings:
    """The request's settings, with the method, its own settings, the adapter and the rank that the
    concept was learned with, and with its size and `flip` where the request has none.
    """
    own = ("adapter", "c_lora_weight", "c_lora_variant")
    same = {name: record.settings[name] for name in own if name in record.settings}
    same |= {"method": record.method, "rank": earlier.stack.rank}
    given = asdict(request.settings)
    same |= {name: record.settings.get(name) for name in ("size", "flip") if given[name] is None}
    settings = LearnSettings(**{**given, **same})
    return settings.resolved(earlier.backbone.preset)


def watched(session: Session, concept: Concept, inputs: TrainingInputs) -> TrainingInputs:
    """The same, with some pictures held out to look at, and their copies left out; without, if there
    are too few.
    """
    hashes = concept.images.hashes
    count, distinct = len(hashes), list(dict.fromkeys(hashes))
    out = {distinct[i] for i in held_out(len(distinct))}
    pictures = "pictures" if len(distinct) == count else "different pictures"
    if not out:
        session.tell(
            f"{len(distinct)} {pictures} are too few to hold one out, so how good it gets is not "
            "watched and it learns all steps. Five are enough."
        )
        return inputs
    session.tell(f"{len(out)} of {len(distinct)} {pictures} are held out, to see when it is done.")
    held = [i for i in range(count) if hashes[i] in out and i == hashes.index(hashes[i])]
    learned = [i for i in range(len(inputs.latents)) if hashes[i % count] not in out]
    masks = inputs.masks
    earlier = [(record.name, record.noun) for record in session.stack.records]
    return replace(
        inputs,
        latents=[inputs.latents[i] for i in learned],
        prompts=[one for i, one in enumerate(inputs.prompts) if hashes[i] not in out],
        masks=masks and [masks[i] for i in learned],
        held_out=[inputs.latents[i] for i in held],
        held_out_masks=masks and [masks[i] for i in held],
        names=Names((concept.name, concept.noun or "thing"), earlier),
    )


def tell_of_prompts(
    session: Session, prompts: Iterable[str], words: Mapping[str, Tensor], *, drawn: bool = False
) -> None:
    """Say what these prompts name that is none of the learned words, and what of them is not read:
    the end of a long one, and of those that are `drawn`, what only web UIs read.
    """
    distinct, notes = list(dict.fromkeys(prompts)), []
    if unknown := unknown_words(distinct, words):
        notes.append(not_learned(unknown, words))
    if drawn:
        marks = dict.fromkeys(mark for prompt in distinct for mark in unread(prompt))
        notes += [only_in_web_uis(list(marks))] if marks else []
    else:
        ends = ((prompt, session.backbone.not_read(prompt, words)) for prompt in distinct)
        notes += [not_read(prompt, end) for prompt, end in ends if end]
    for note in notes:
        session.tell(note)


def preview_last(session: Session, stack: ConceptStack, settings: LearnSettings) -> None:
    """Show what previews show, or the new concept and the first one, as they are drawn now."""
    names = [stack.records[-1].name, stack.records[0].name]
    prompts = previewed(settings.preview_prompts, names)
    with folded(session.backbone, stack.adapter):
        image = preview(session.backbone, stack.tokens, prompts, stack.nouns)
    session.on_progress(Progress("preview", 1, 1, preview=image))
