"""How a rival learns one concept: alone, or after others."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from comfy_continual_lora import concepts
from comfy_continual_lora.adapters.adapter import Adapter, rank_of
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.learn import TrainingInputs, learn
from comfy_continual_lora.presets import TEMPLATES
from comfy_continual_lora.progress import OnProgress, ignore
from comfy_continual_lora.settings import ResolvedSettings
from comfy_continual_lora.stack import ConceptRecord, ConceptStack

from .rival import Own, Rival, summed


@dataclass(frozen=True)
class Lesson:
    """A concept to learn."""

    token: str
    noun: str
    pictures: Tensor  # (n, 3, h, w) in -1..1


def learn_next(
    rival: Rival,
    backbone: Backbone,
    lesson: Lesson,
    past: Sequence[Own],
    settings: ResolvedSettings,
    options: Mapping[str, float],
    snapshot: Path,
    on_progress: OnProgress = ignore,
) -> Own:
    """The concept as this rival learns it after `past`, which it leaves as they are.

    The draws for its start are its own: with those of the other concepts, all LoRAs would start from
    the same A. The same call resumes from `snapshot`, which is left there.
    """
    generator = torch.Generator().manual_seed(settings.seed + zlib.crc32(lesson.token.encode()))
    earlier = [concept.adapter for concept in past]
    word = backbone.word_start(lesson.noun, generator, settings.vectors)
    adapter = rival.start(backbone, earlier, settings.rank, generator)
    prompts = concepts.prompts_for(lesson.token, lesson.noun, TEMPLATES, None)
    inputs = TrainingInputs(
        backbone.encode_images(lesson.pictures),
        [prompts],
        lesson.token,
        {concept.token: concept.word for concept in past},
        adapter,
        word,
        penalties=rival.penalties(earlier, options, backbone.device),
        frozen_adapter=summed(earlier) if rival.sequential and past else None,
        preconditioner=_nothing(backbone.word_width) if rival.freezes_a else None,
        source=_source(rival, lesson, past, options),
    )
    trained = learn(backbone, inputs, settings, snapshot, on_progress)
    assert trained.adapter
    own = _newest(trained.adapter, rank_of(adapter))
    name = concepts.name_of(lesson.token, lesson.noun)
    return Own(lesson.token, name, lesson.noun, trained.word, own, prompts)


def _nothing(width: int) -> Tensor:
    """The preconditioner P = 0, which freezes A: each step of A is a step of A' times P, A = A' P
    (`training.precondition`), weight decay included. A's gradient still counts in the norm that
    gradients are clipped by.
    """
    return torch.zeros(width, width)


def _source(
    rival: Rival, lesson: Lesson, past: Sequence[Own], options: Mapping[str, float]
) -> dict[str, str]:
    """What identifies the run, besides settings, checkpoint and prompts."""
    return {
        "rival": rival.id,
        "options": str(sorted(options.items())),
        "token": lesson.token,
        "earlier": " ".join(concept.token for concept in past),
    }


def _newest(adapter: Adapter, rank: int) -> Adapter:
    """The newest LoRA of a sum, which is its last `rank` rows of A and columns of B."""
    return {
        name: (tensor[-rank:] if name.endswith(".A") else tensor[:, -rank:]).clone()
        for name, tensor in adapter.items()
    }


# --- as a stack -----------------------------------------------------------------------------------


def stack_of(backbone: Backbone, owns: Sequence[Own], adapter: Adapter) -> ConceptStack:
    """A stack that draws these concepts with one adapter."""
    rank = rank_of(adapter) if any(name.endswith(".A") for name in adapter) else None
    stack = ConceptStack(backbone.fingerprint, adapter=adapter, rank=rank, tau=0.01)
    for number, own in enumerate(owns):
        record = record_of(own, number)
        stack.records.append(record)
        stack.words[record.id] = own.word
    return stack


def record_of(own: Own, number: int) -> ConceptRecord:
    return ConceptRecord(
        id=str(number),
        token=own.token,
        noun=own.noun,
        method="rival",
        images=5,
        steps=0,
        seed=0,
        prompts=list(own.prompts),
        hashes=[],
        learned="",
        loss=0.0,
        preview="",
        settings={},
    )
