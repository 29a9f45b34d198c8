"""Who looks at the pictures of the retention benchmark: the mini-SD's CLIP, or a CLIP from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from jobs import Job
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from comfy_continual_lora.mini import weights


class Eyes(Protocol):
    """Features of pictures (n, 3, size, size) in -1..1 and of texts, in one space: (n, d)."""

    def features(self, pictures: Tensor) -> Tensor: ...

    def text(self, prompts: Sequence[str]) -> Tensor: ...


class MiniEyes:
    """The mini-SD's CLIP, which knows the world's words alone."""

    def features(self, pictures: Tensor) -> Tensor:
        return features_of(pictures)

    def text(self, prompts: Sequence[str]) -> Tensor:
        return weights.text_features(prompts)


class ClipEyes:
    """A CLIP of transformers, from a folder."""

    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.size = self.model.vision_model.config.image_size

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )
        found = []
        for chunk in pictures.split(16):
            scaled = F.interpolate(chunk, size=self.size, mode="bicubic", antialias=True)
            pixels = (scaled.clamp(-1, 1).add(1).div(2) - mean) / std
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            found.append(self.model.visual_projection(pooled))
        return torch.cat(found)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt"
        )
        return self.model.text_projection(self.model.text_model(**tokens).pooler_output)


def eyes_of(job: Job) -> Eyes:
    return ClipEyes(job.real.clip) if job.real else MiniEyes()


def features_of(pictures: Tensor) -> Tensor:
    """Of the mini-SD's CLIP, (n, 192)."""
    return torch.cat([weights.vision_features(chunk) for chunk in pictures.split(32)])
