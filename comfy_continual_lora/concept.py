"""Stage 2: the concept being learned - pictures, captions and masks in the form training takes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import concepts, likeness
from .curves import thinned
from .errors import ConceptImagesError
from .inventory import inventory
from .learn import Trained
from .mentions import named, not_learned, unknown_words
from .presets import TEMPLATES
from .session import Session
from .settings import ResolvedSettings
from .stack import ConceptRecord, ConceptStack


@dataclass(frozen=True)
class Concept:
    """What is learned.

    Latents (c, h, w), prompts and masks (1, h, w); without masks every pixel counts. Latent i has
    prompts[i % len(prompts)] and masks[i]. Mirrored images come after the others.
    """

    token: str
    noun: str  # as the user wrote it
    with_noun: bool  # whether prompts contain it
    images: concepts.ConceptImages
    latents: Sequence[Tensor]
    prompts: Sequence[Sequence[str]]
    masks: Sequence[Tensor] | None
    source: Mapping[str, str]  # identifies a run's data and its starting point (`source_of`)

    @property
    def name(self) -> str:
        """How prompts name it."""
        return concepts.name_of(self.token, self.noun if self.with_noun else "")


def load_concept(
    session: Session,
    images: Path | list[Path],
    token: str,
    noun: str,
    settings: ResolvedSettings,
    *,
    with_noun: bool = True,
) -> Concept:
    """Errors: ConceptImagesError, one for all pictures that can't be used, and if all captions are
    too long to be read as far as the word.
    """
    backbone = session.backbone
    size = settings.size or backbone.size
    loaded = concepts.load_images(images, size, fit=settings.fit, tell=session.tell)
    pictures, masks = loaded.images, loaded.masks
    if settings.flip:
        pictures = (*pictures, *(image.flip(-1) for image in pictures))
        masks = masks and (*masks, *(mask.flip(-1) for mask in masks))
    prompt_noun = noun if with_noun else ""
    others = session.stack.tokens
    prompts = [
        concepts.prompts_for(token, prompt_noun, TEMPLATES, one, others) for one in loaded.captions
    ]
    _check_prompts(session, prompts, token, settings.vectors)
    latents = backbone.encode_images(pictures)
    small = None
    if masks is not None:
        small = [
            F.interpolate(mask[None], latent.shape[-2:], mode="area")[0].to(latent.device)
            for mask, latent in zip(masks, latents, strict=True)
        ]
    source = source_of(session.stack, images, token=token, noun=noun)
    return Concept(token, noun, with_noun, loaded, latents, prompts, small, source)


def _check_prompts(
    session: Session, prompts: Sequence[Sequence[str]], token: str, vectors: int
) -> None:
    """Tell of captions that name unknown words or are too long; refuse these if no prompt would teach
    the word.
    """
    backbone = session.backbone
    words = {**session.stack.tokens, token: torch.zeros(vectors, backbone.word_width)}
    if unknown := unknown_words((one for own in prompts for one in own), words):
        session.tell(f"In captions: {not_learned(unknown, words)}")
    ends = [backbone.not_read(one[0], words) for one in prompts]
    too_long = [number for number, end in enumerate(ends) if end]
    if not too_long:
        return
    before = [one[0].removesuffix(end) for one, end in zip(prompts, ends, strict=True)]
    unnamed = [number for number in too_long if token not in named([before[number]], words)]
    if len(unnamed) == len(prompts):
        raise ConceptImagesError(
            f"{token} would not be learned: every caption is so long that the text encoder stops "
            f"reading before {token}. Name it at the beginning of the captions, or shorten them."
        )
    first = too_long[0]
    note = (
        f"The captions of {len(too_long)} of {len(prompts)} pictures are too long: the text encoder "
        f'does not read their end, such as "{ends[first][:60]}".'
    )
    if unnamed:
        note += f" In {len(unnamed)} of them {token} is not read. Name it at their beginning."
    session.tell(note)


def source_of(
    stack: ConceptStack, images: Path | list[Path], *, token: str, noun: str
) -> dict[str, str]:
    """Identifies a run's data and its starting point: words, a hash of the files, a hash of the
    stack's tensors.
    """
    pictures, start = hashlib.sha256(), hashlib.sha256()
    for picture in inventory(images).pictures:
        picture.feed(pictures)
    adapters = {"adapter": stack.adapter, "before": stack.unconsolidated}
    for part, by_concept in (("pool", stack.pool), ("fishers", stack.fishers)):
        adapters |= {f"{part}.{concept}": adapter for concept, adapter in by_concept.items()}
    for concept, target in stack.targets.items():
        adapters |= {f"wishes.{concept}": target.numbers, f"scales.{concept}": target.scales}
    tensors = dict(stack.words)
    for part, adapter in adapters.items():
        tensors |= {f"{part}.{name}": tensor for name, tensor in (adapter or {}).items()}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        start.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {
        "token": token,
        "noun": noun,
        "pictures": pictures.hexdigest(),
        "start": start.hexdigest(),
    }


def kept_features(session: Session, concept: Concept) -> str:
    """What a stack keeps of the pictures, if the user wants that."""
    return likeness.packed(likeness.features(session.backbone, concept.images.images, concept.noun))


def record_of(
    concept: Concept,
    stack: ConceptStack,
    settings: ResolvedSettings,
    trained: Trained,
    request: str,
) -> ConceptRecord:
    """The concept's record for the stack; `request` is the request's digest."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begun = f"{stack.fingerprint}/{concept.token}/{now}/{len(stack.records)}"
    losses = trained.losses[: trained.steps]
    tail = losses[-max(1, len(losses) // 10) :]
    prompts: list[str] = []
    for own in dict.fromkeys(map(tuple, concept.prompts)):
        prompts += own
    return ConceptRecord(
        id=hashlib.sha256(begun.encode()).hexdigest()[:12],
        token=concept.token,
        noun=concept.noun,
        method=settings.method,
        images=len(concept.images.images),
        steps=trained.steps,
        seed=settings.seed,
        prompts=prompts,
        hashes=list(concept.images.hashes),
        learned=now,
        loss=sum(tail) / len(tail),
        preview=concept.images.preview,
        settings=asdict(settings),
        with_noun=concept.with_noun,
        request=request,
        watched=[[point.step, point.likeness, point.moved] for point in trained.points],
        losses=thinned(losses),
    )
