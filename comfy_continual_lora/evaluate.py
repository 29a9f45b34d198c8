"""Stage 8: how much a user's stack retains, and whether it looks like the user's pictures at all.

The stack holds, or can be solved for, the LoRA as it was after every concept, so its whole history
can be drawn: each concept as learned and after every later one, by the same prompts and seeds. Its
pictures, and those that the checkpoint draws for its noun, are compared with its reference
(equations: `verdicts`).

in: a backbone and its stack - out: `RetentionReport`. The reference is, of what there is, the first
of: the user's own pictures, their features in the stack (`likeness`), the thumbnail in the stack;
likeness is then the mean cosine over all pairs. Without any (an imported concept) it is what was
drawn when it had just been learned, picture by picture with the same seed, which says nothing about
the thing itself. Features: `features`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image as images
from PIL.Image import Image
from torch import Tensor

from . import classifier, likeness, sample
from .adapters.adapter import attached, folded
from .checkpoint.backbone import Backbone, FrozenText
from .concepts import PREVIEW, fitted, picture_of, to_pil, to_tensor
from .consolidation import as_of
from .errors import CheckpointError
from .metrics import own_similarity, similarity
from .progress import OnProgress, Progress
from .settings import DrawSettings, EvaluateSettings, ScoreSettings
from .stack import ConceptRecord, ConceptStack
from .verdicts import RetentionReport

# pictures (n, 3, h, w) in -1..1 and the class noun of what they show -> (n, d)
Features = Callable[[Tensor, str], Tensor]
PROMPTS = ("a photo of a {}", "a good photo of a {}")


def prompts_of(records: Sequence[ConceptRecord]) -> list[str]:
    """All prompts that are drawn, with each concept's name and with its noun alone."""
    names = [name for record in records for name in (record.name, record.noun)]
    return [prompt.format(name) for name in names for prompt in PROMPTS]


def features(backbone: Backbone, clip: Path | None) -> Features:
    """Image features: of a CLIP in a local folder, else of the checkpoint itself (`likeness`).

    Errors: CheckpointError for a folder that holds no CLIP vision model.
    """
    if clip is not None:
        return _clip_features(clip, backbone.device)
    return lambda pictures, noun: likeness.features(backbone, pictures, noun)


def _clip_features(folder: Path, device: torch.device) -> Features:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    if not folder.is_dir():  # else it would be taken for a name on the Hugging Face Hub
        raise CheckpointError(
            f"There is no folder {folder}. Expected one with a CLIP vision model, as transformers "
            "saves it."
        )
    try:
        model = CLIPVisionModelWithProjection.from_pretrained(  # nosec B615
            folder, local_files_only=True, use_safetensors=True
        )
        model = model.to(device).eval()  # type: ignore[arg-type]
        processor = CLIPImageProcessor.from_pretrained(  # nosec B615
            folder, local_files_only=True
        )
    except Exception as error:  # transformers may raise anything
        raise CheckpointError(
            f"{folder} can't be loaded as a CLIP vision model ({error!s:.300}). Expected a folder as "
            "transformers saves it."
        ) from None

    @torch.no_grad()
    def run(pictures: Tensor, _noun: str) -> Tensor:
        pixels = processor([to_pil(p) for p in pictures], return_tensors="pt")["pixel_values"]
        return model(pixels.to(device)).image_embeds.float().cpu()

    return run


def evaluate(
    backbone: Backbone,
    stack: ConceptStack,
    own: Mapping[str, Tensor],
    embed: Features,
    settings: EvaluateSettings,
    on_progress: OnProgress,
    *,
    use_kept: bool = True,
) -> RetentionReport:
    """Draw and compare; `own` holds the user's pictures by token, (n, 3, size, size) in -1..1.
    `settings` are resolved. `use_kept`: whether features in the stack are of the same kind.
    """
    records, count = stack.records, len(stack.records)
    draw = _Drawing(backbone, settings, count + count * (count + 1) // 2, on_progress)
    versions = [as_of(stack, i + 1) for i in range(count)]
    after: dict[tuple[int, int], Tensor] = {}
    for i, version in enumerate(versions):
        with folded(backbone, version.adapter):
            for j, record in enumerate(records[: i + 1]):
                after[i, j] = draw(record.name, version.tokens)
    plain = [draw(record.noun, {}) for record in records]
    references = [
        _reference(record, own.get(record.token), embed, after[j, j], use_kept)
        for j, record in enumerate(records)
    ]
    matrix = torch.full((count, count), torch.nan)
    for (i, j), pictures in after.items():
        matrix[i, j] = references[j].likeness(pictures).mean()
    at_floor = [references[j].likeness(pictures) for j, pictures in enumerate(plain)]
    gains = [references[j].likeness(after[count - 1, j]) - at_floor[j] for j in range(count)]
    shown = [own.get(record.token, after[j, j]) for j, record in enumerate(records)]
    return RetentionReport(
        [r.name for r in records],
        matrix,
        torch.stack([one.mean() for one in at_floor]),
        torch.tensor(_recognised(backbone, stack, shown, settings, on_progress)),
        {at: [to_pil(p) for p in pictures] for at, pictures in after.items()},
        torch.tensor([one.own for one in references]),
        torch.stack([_standard_error(gain) for gain in gains]),
        [one.kind for one in references],
    )


class _Drawing:
    """The pictures of any name or noun, by the same prompts and seeds; reports progress."""

    def __init__(
        self,
        backbone: Backbone,
        settings: EvaluateSettings,
        total: int,
        on_progress: OnProgress,
    ) -> None:
        """`total`: how many times it will be called."""
        self.backbone, self.settings = backbone, settings
        self.on_progress, self.done, self.total = on_progress, 0, total
        own = DrawSettings(steps=settings.steps, guidance=settings.guidance, size=settings.size)
        self.drawing = own.resolved(backbone.preset)

    def __call__(self, name: str, words: Mapping[str, Tensor]) -> Tensor:
        """(pictures, 3, size, size) in -1..1; `words`: vectors by token."""
        prompts = [PROMPTS[n % len(PROMPTS)].format(name) for n in range(self.settings.pictures)]
        seeds = [self.settings.seed + n for n in range(self.settings.pictures)]
        self._report()
        pictures = sample.draw(
            self.backbone, words, prompts, seeds, self.drawing, lambda _: self._report()
        )
        self.done += 1
        return pictures

    def _report(self) -> None:
        self.on_progress(Progress("evaluate", self.done, self.total))


def _standard_error(values: Tensor) -> Tensor:
    """Of a mean, 0 for one value."""
    return values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(0.0)


@dataclass(frozen=True)
class _Reference:
    """What a concept is compared with: its kind (`verdicts.REFERENCES`) and its features (n, d)."""

    kind: str
    seen: Tensor
    embed: Callable[[Tensor], Tensor]

    @property
    def own(self) -> float:
        return own_similarity(self.seen) if self.kind != "drawn" else torch.nan

    def likeness(self, pictures: Tensor) -> Tensor:
        """Of each picture, (n,)."""
        seen = self.embed(pictures)
        if self.kind == "drawn":
            return torch.nn.functional.cosine_similarity(seen, self.seen)
        return torch.stack([torch.tensor(similarity(one[None], self.seen)) for one in seen])


def _reference(
    record: ConceptRecord, own: Tensor | None, embed: Features, drawn: Tensor, use_kept: bool
) -> _Reference:
    def seen(pictures: Tensor) -> Tensor:
        return embed(pictures, record.noun)

    if own is not None:
        return _Reference("pictures", seen(own), seen)
    if use_kept and (kept := likeness.unpacked(record.features)) is not None:
        return _Reference("features", kept, seen)
    if (thumbnail := picture_of(record.preview)) is not None:
        size = drawn.shape[-1]

        def seen_small(pictures: Tensor) -> Tensor:
            """As a thumbnail of them is seen: it has lost its details."""
            return seen(torch.stack([_through_thumbnail(to_pil(one), size) for one in pictures]))

        return _Reference("thumbnail", seen(_through_thumbnail(thumbnail, size)[None]), seen_small)
    return _Reference("drawn", seen(drawn), seen)


def _through_thumbnail(picture: Image, size: int) -> Tensor:
    smooth = images.Resampling.LANCZOS
    return to_tensor(picture.resize((PREVIEW, PREVIEW), smooth).resize((size, size), smooth))


def _scaled(picture: Tensor, side: int) -> Tensor:
    """A square picture (3, h, h) with another side."""
    if picture.shape[-1] == side:
        return picture
    return to_tensor(fitted(to_pil(picture), side, "crop"))


def _recognised(
    backbone: Backbone,
    stack: ConceptStack,
    reference: Sequence[Tensor],
    settings: EvaluateSettings,
    on_progress: OnProgress,
) -> list[float]:
    """The mean DC score of each concept for its own reference pictures, under the current stack."""
    if stack.tau is None:
        return [float("nan")] * len(reference)
    prompts = classifier.candidates(stack.records, FrozenText(backbone, stack.tokens))
    scoring = ScoreSettings(trials=settings.trials, seed=settings.seed)
    side, means = classifier.side_of(stack.records, backbone.size), []
    with attached(backbone, stack.adapter):
        for record, pictures in zip(stack.records, reference, strict=True):
            scores = [
                classifier.classify(backbone, latent, prompts, stack.tau, scoring, on_progress)
                for latent in backbone.encode_images([_scaled(one, side) for one in pictures])
            ]
            own = [s.probabilities[s.names.index(record.token)] for s in scores]
            means.append(sum(own) / len(own))
    return means
