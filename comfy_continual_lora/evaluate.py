"""Stage 8: how much a user's stack retains.

The stack holds the LoRA as it was after every concept, so its whole history can be drawn.

    R[i, j] = likeness of concept j, drawn after concept i was learned, to its reference (i >= j;
              same prompts, same seeds)
    kept[j] = (R[N, j] - floor[j]) / (R[j, j] - floor[j])   1: as when it had just been learned
                                                            0: as if it had never been learned
    floor   = likeness of what the checkpoint without the stack draws for the class noun

in: a backbone and its stack - out: `RetentionReport`. The reference is the concept's own images if
the user still has them (likeness: mean cosine over all pairs), otherwise those drawn when it had
just been learned (mean cosine of images with the same seed). Features: `features`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from . import classifier, sample
from .adapters.adapter import attached
from .checkpoint.backbone import Backbone, FrozenText
from .concepts import to_pil
from .errors import CheckpointError
from .metrics import paired_similarity, similarity
from .progress import OnProgress, Progress
from .settings import DrawSettings, EvaluateSettings, ScoreSettings
from .stack import ConceptStack

Features = Callable[[Tensor], Tensor]  # pictures (n, 3, h, w) in -1..1 -> (n, d)
PROMPTS = ("a photo of a {}", "a good photo of a {}")


@dataclass(frozen=True)
class RetentionReport:
    """n concepts: their names in prompts; likeness R (n, n), NaN if i < j; floor, kept (n,); DC
    scores of the references (n,), NaN without scores.

    pictures[i, j] are those of concept j drawn after concept i, counted from 0.
    """

    names: list[str]
    likeness: Tensor
    floor: Tensor
    recognised: Tensor
    pictures: dict[tuple[int, int], list[Image]]
    chart: Path | None = None

    def summary(self) -> str:
        """One line per concept: its likeness when just learned and now, the class noun's likeness,
        the share kept, the DC score now.
        """
        lines = ["concept                  learned   now   noun   kept   DC score"]
        shares = self.kept
        for j, name in enumerate(self.names):
            kept, score = shares[j], self.recognised[j]
            kept_text = "     -" if kept.isnan() else f"{100 * float(kept):5.0f} %"
            score_text = "      -" if score.isnan() else f"{float(score):7.2f}"
            learned, now, noun = (
                float(x) for x in (self.likeness[j, j], self.likeness[-1, j], self.floor[j])
            )
            lines.append(
                f"{name[:24]:<24} {learned:7.2f} {now:6.2f} {noun:6.2f} {kept_text}  {score_text}"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """`kept`: a share for each concept in order, null if there is no share."""
        values = {
            "likeness": self.likeness,
            "floor": self.floor,
            "kept": self.kept,
            "recognised": self.recognised,
        }
        plain = {name: _without_nan(tensor.tolist()) for name, tensor in values.items()}
        chart = str(self.chart) if self.chart else None
        return {"concepts": self.names, **plain, "table": self.summary(), "chart": chart}

    @property
    def kept(self) -> Tensor:
        learned = self.likeness.diagonal() - self.floor
        share = (self.likeness[-1] - self.floor) / learned
        # if a concept never differed from its noun, there is nothing to keep
        return torch.where(learned > 0.01, share, torch.nan)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if value != value else value


def features(backbone: Backbone, clip: Path | None) -> Features:
    """Image features: of a CLIP in a local folder, else the mini-SD's own CLIP, else latents.

    Errors: CheckpointError for a folder that holds no CLIP vision model.
    """
    if clip is not None:
        return _clip_features(clip, backbone.device)
    if backbone.preset == "mini":
        from .mini.weights import vision_features

        return vision_features
    return lambda pictures: torch.nn.functional.normalize(
        torch.stack(backbone.encode_images(pictures)).flatten(1).float().cpu(), dim=1
    )


def _clip_features(folder: Path, device: torch.device) -> Features:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    try:
        model = CLIPVisionModelWithProjection.from_pretrained(  # nosec B615
            folder, local_files_only=True, use_safetensors=True
        )
        model = model.to(device).eval()  # type: ignore[arg-type]
        processor = CLIPImageProcessor.from_pretrained(  # nosec B615
            folder, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} can't be loaded as a CLIP vision model ({error}). Expected a folder as "
            "transformers saves it."
        ) from None

    @torch.no_grad()
    def run(pictures: Tensor) -> Tensor:
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
) -> RetentionReport:
    """Draw and compare; `own` holds the user's pictures by token, (n, 3, size, size) in -1..1.
    `settings` are resolved.
    """
    records = stack.records
    count = len(records)
    drawing = DrawSettings(steps=settings.steps, guidance=settings.guidance, size=settings.size)
    total = count + count * (count + 1) // 2
    done = 0

    def drawn(name: str, version: ConceptStack | None) -> Tensor:
        nonlocal done
        prompts = [PROMPTS[n % len(PROMPTS)].format(name) for n in range(settings.pictures)]
        seeds = [settings.seed + n for n in range(settings.pictures)]
        on_progress(Progress("evaluate", done, total))
        with attached(backbone, version.adapter if version else None):
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

    versions = [stack.as_of(i + 1) for i in range(count)]
    after: dict[tuple[int, int], Tensor] = {}
    for i in range(count):
        for j in range(i + 1):
            after[i, j] = drawn(records[j].name, versions[i])
    plain = [drawn(record.noun, None) for record in records]
    reference = [own.get(record.token, after[j, j]) for j, record in enumerate(records)]

    def likeness(pictures: Tensor, j: int) -> float:
        compare = similarity if records[j].token in own else paired_similarity
        return compare(embed(pictures), embed(reference[j]))

    matrix = torch.full((count, count), torch.nan)
    for (i, j), pictures in after.items():
        matrix[i, j] = likeness(pictures, j)
    floor = torch.tensor([likeness(pictures, j) for j, pictures in enumerate(plain)])
    recognised = torch.tensor(_recognised(backbone, stack, reference, settings, on_progress))
    return RetentionReport(
        [r.name for r in records],
        matrix,
        floor,
        recognised,
        {at: [to_pil(p) for p in pictures] for at, pictures in after.items()},
    )


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
