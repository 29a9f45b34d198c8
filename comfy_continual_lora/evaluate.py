"""Stage 8: how much a user's stack retains, and whether it looks like the user's pictures at all.

The stack holds the LoRA as it was after every concept, so its whole history can be drawn.

    R[i, j] = likeness of concept j, drawn after concept i was learned, to its reference (i >= j;
              same prompts, same seeds)
    floor   = likeness of what the checkpoint without the stack draws for the class noun
    own     = likeness of the reference pictures to each other
    near[j] = (R[N, j] - floor[j]) / (own[j] - floor[j])    0: any thing of its noun
                                                            1: as another picture of it
    kept[j] = (R[N, j] - floor[j]) / (R[j, j] - floor[j])   1: as when it had just been learned
              none if it was at the floor when it had just been learned: there is nothing to keep

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
from typing import Any

import torch
from PIL import Image as images
from PIL.Image import Image
from torch import Tensor

from . import classifier, likeness, sample
from .adapters.adapter import attached, folded
from .checkpoint.backbone import Backbone, FrozenText
from .concepts import PREVIEW, picture_of, to_pil, to_tensor
from .consolidation import as_of
from .errors import CheckpointError
from .metrics import own_similarity, similarity
from .progress import OnProgress, Progress
from .settings import DrawSettings, EvaluateSettings, ScoreSettings
from .stack import ConceptRecord, ConceptStack

# pictures (n, 3, h, w) in -1..1 and the class noun of what they show -> (n, d)
Features = Callable[[Tensor, str], Tensor]
PROMPTS = ("a photo of a {}", "a good photo of a {}")


# what concepts are compared with, in words
REFERENCES = {
    "pictures": "your pictures",
    "features": "what the stack keeps of your pictures",
    "thumbnail": "the thumbnail of its first picture",
    "drawn": "what was drawn when it was new",
}
# Shares of the way from the class noun to the user's own pictures. On the mini-SD .3 has nothing of
# the thing, .75 is a blob of one of its colours, .84 and more is the thing (benchmarks/LOG.md)
WELL, PARTLY = 0.8, 0.5
FADED = 0.7  # share kept


@dataclass(frozen=True)
class RetentionReport:
    """n concepts: their names in prompts; likeness R (n, n), NaN if i < j; floor, kept (n,); DC
    scores of the references (n,), NaN without scores; own (n,), NaN for a reference of one picture;
    spread (n,): the standard error of R[N, j] - floor[j]; what each is compared with (REFERENCES).

    pictures[i, j] are those of concept j drawn after concept i, counted from 0.
    """

    names: list[str]
    likeness: Tensor
    floor: Tensor
    recognised: Tensor
    pictures: dict[tuple[int, int], list[Image]]
    own: Tensor
    spread: Tensor
    reference: list[str]
    chart: Path | None = None

    def summary(self) -> str:
        """One line per concept: its likeness when just learned and now, the class noun's likeness,
        its pictures' to each other, the share kept, the DC score now. Then a verdict on each.
        """
        lines = ["concept                  noun   learned    now   own    kept  DC score"]
        for j, name in enumerate(self.names):
            learned, now = _column(self.likeness[j, j]), _column(self.likeness[-1, j])
            kept = _or_dash(100 * float(self.kept[j]), ".0f", 4, " %")
            lines.append(
                f"{name[:24]:<24}{_column(self.floor[j])}  {learned} {now}{_column(self.own[j])} "
                f"{kept}    {_column(self.recognised[j])}"
            )
        return "\n".join([*lines, "", *self.verdicts, self.verdict])

    def as_json(self) -> dict[str, Any]:
        """`kept`: a share for each concept in order, null if there is no share."""
        values = {
            "likeness": self.likeness,
            "floor": self.floor,
            "own": self.own,
            "near": self.near,
            "kept": self.kept,
            "recognised": self.recognised,
        }
        plain = {name: _without_nan(tensor.tolist()) for name, tensor in values.items()}
        words = {"verdicts": self.verdicts, "verdict": self.verdict, "reference": self.reference}
        chart = str(self.chart) if self.chart else None
        return {"concepts": self.names, **plain, **words, "table": self.summary(), "chart": chart}

    @property
    def kept(self) -> Tensor:
        """NaN for a concept that never was like the pictures even in part: nothing is to be kept."""
        learned = self.likeness.diagonal() - self.floor
        share = (self.likeness[-1] - self.floor) / learned
        there = learned > torch.clamp(2 * self.spread, min=0.01)
        there &= ~(self._near(self.likeness.diagonal()) < PARTLY)
        return torch.where(there, share, torch.nan)

    @property
    def near(self) -> Tensor:
        """How far from the class noun to the user's own pictures. A single picture does not say how
        alike several are, so it is as if they were the same, which is the farthest: it is at least as
        near as this. NaN without any.
        """
        return self._near(self.likeness[-1])

    def _near(self, likeness: Tensor) -> Tensor:
        """likeness (n,), of each concept."""
        compared = torch.tensor([one != "drawn" for one in self.reference])
        way = torch.where(compared, self.own.nan_to_num(1.0), torch.nan) - self.floor
        return torch.where(way > 0.01, (likeness - self.floor) / way, torch.nan)

    def shade(self, i: int, j: int) -> float:
        """How good R[i, j] is to look at: 0 if it is less than "partly", 1 from where it is "well";
        without the user's pictures, 1 is as when it was new.
        """
        near = float(self._near(self.likeness[i])[j])
        if near == near:
            return min(1.0, max(0.0, (near - PARTLY) / (WELL - PARTLY)))
        floor, now, new = (float(x[j]) for x in (self.floor, self.likeness[i], self.likeness[j]))
        return min(1.0, max(0.0, (now - floor) / max(new - floor, 0.01)))

    @property
    def grades(self) -> list[str]:
        """For each concept: "well", "partly", "floor" (like any thing of its noun) or "unknown"
        (compared with nothing of the user's).
        """
        return [self._grade(j) for j in range(len(self.names))]

    def _grade(self, j: int) -> str:
        if self.reference[j] == "drawn":
            return "unknown"
        near, gain = float(self.near[j]), float(self.likeness[-1, j] - self.floor[j])
        if gain <= 2 * float(self.spread[j]) or near < PARTLY:
            return "floor"
        return "partly" if near < WELL else "well"

    @property
    def verdicts(self) -> list[str]:
        """A sentence for each concept."""
        return [self._verdict(j, grade) for j, grade in enumerate(self.grades)]

    def _verdict(self, j: int, grade: str) -> str:
        name, kept = self.names[j], float(self.kept[j])
        compared = ""
        if self.reference[j] != "pictures":
            compared = f" (compared with {REFERENCES[self.reference[j]]})"
        faded = f", but it has faded: {100 * kept:.0f} % is left" if kept < FADED else ""
        if grade == "well":
            return f"{name}: looks like your pictures{compared}{faded}."
        if grade == "partly":
            least = "at least " if self.own[j].isnan() else ""
            return f"{name}: looks like your pictures {least}in part{compared}{faded}."
        if grade == "unknown":
            still = f"drawn as when it was new, to {100 * kept:.0f} %" if kept == kept else "drawn"
            return f"{name}: {still}; whether it looks like the thing is not known."
        if kept == kept:
            return f"{name}: forgotten; it looks like any thing of its kind again{compared}."
        return f"{name}: not learned; it looks like any thing of its kind{compared}."

    @property
    def verdict(self) -> str:
        """A sentence on the whole stack, and what to do."""
        grades, count = self.grades, len(self.names)
        bad = [name for name, grade in zip(self.names, grades, strict=True) if grade == "floor"]
        some = [name for name, grade in zip(self.names, grades, strict=True) if grade == "partly"]
        known = [grade for grade in grades if grade != "unknown"]
        if not known:
            return "Whether it is good is not known: give your pictures to compare with."
        if bad:
            return (
                f"In all: not good. {_listed(bad)} {'has' if len(bad) == 1 else 'have'} to be learned "
                "again, with more steps or better pictures."
            )
        shares = zip(self.names, self.kept.tolist(), strict=True)
        faded = [name for name, share in shares if share < FADED]
        if faded:
            since = "it was" if len(faded) == 1 else "they were"
            return f"In all: fair. {_listed(faded)} faded since {since} learned."
        if some:
            once = any(own != own for own in self.own.tolist())
            better = "; compared with all your pictures it would be told better" if once else ""
            return f"In all: fair. More steps or pictures may bring {_listed(some)} nearer{better}."
        return "In all: good." if count > 1 else "Good."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _column(value: Tensor) -> str:
    return _or_dash(float(value), ".2f", 6)


def _or_dash(value: float, form: str, width: int, unit: str = "") -> str:
    """A number right-aligned, or a dash for NaN."""
    return ("-" if value != value else f"{value:{form}}{unit}").rjust(width + len(unit))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if value != value else value


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
    records = stack.records
    count = len(records)
    drawing = DrawSettings(steps=settings.steps, guidance=settings.guidance, size=settings.size)
    drawing = drawing.resolved(backbone.preset)
    total = count + count * (count + 1) // 2
    done = 0

    def drawn(name: str, version: ConceptStack | None) -> Tensor:
        nonlocal done
        prompts = [PROMPTS[n % len(PROMPTS)].format(name) for n in range(settings.pictures)]
        seeds = [settings.seed + n for n in range(settings.pictures)]
        on_progress(Progress("evaluate", done, total))
        pictures = sample.draw(
            backbone,
            version.tokens if version else {},
            prompts,
            seeds,
            drawing,
            lambda p: on_progress(Progress("evaluate", done, total)),
        )
        done += 1
        return pictures

    versions = [as_of(stack, i + 1) for i in range(count)]
    after: dict[tuple[int, int], Tensor] = {}
    for i, version in enumerate(versions):
        with folded(backbone, version.adapter):
            for j in range(i + 1):
                after[i, j] = drawn(records[j].name, version)
    plain = [drawn(record.noun, None) for record in records]
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


def _standard_error(values: Tensor) -> Tensor:
    """Of a mean, 0 for one value."""
    return values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(0.0)


@dataclass(frozen=True)
class _Reference:
    """What a concept is compared with: its kind (REFERENCES) and its features (n, d)."""

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
    means = []
    with attached(backbone, stack.adapter):
        for record, pictures in zip(stack.records, reference, strict=True):
            scores = [
                classifier.classify(backbone, latent, prompts, stack.tau, scoring, on_progress)
                for latent in backbone.encode_images(pictures)
            ]
            own = [s.probabilities[s.names.index(record.token)] for s in scores]
            means.append(sum(own) / len(own))
    return means
