"""One text encoder of a checkpoint: token ids -> text features, with word vectors in place of some.

Shapes: n prompts, 77 positions, d the encoder's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection


@dataclass(eq=False)
class TextEncoder:
    """A text model and how its features are taken; one with projection gives pooled text too."""

    model: CLIPTextModel | CLIPTextModelWithProjection
    pad: int  # the token id after the end of the prompt
    penultimate: bool = False  # the last layer but one is used, not normed; else the last, normed
    clip_skip: int = 1  # of one that is normed: 1 the last layer is used, 2 the one before it

    @property
    def table(self) -> nn.Embedding:
        table = self.model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def width(self) -> int:
        return self.table.weight.shape[1]

    @property
    def pooled_width(self) -> int:
        """Of the pooled text; 0 if there is none."""
        if not isinstance(self.model, CLIPTextModelWithProjection):
            return 0
        return self.model.text_projection.out_features

    def encode(self, ids: Tensor, slot: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token ids (n, 77) -> features (n, 77, d) and pooled text (n, p).

        Where slot (n, 77) >= 0, vectors[slot], of (k, d), replaces the token's vector.
        """
        with _replaced(self.table, slot, vectors):
            is_last = not self.penultimate and self.clip_skip == 1
            output = self.model(ids, output_hidden_states=not is_last)
            if is_last:
                features = output.last_hidden_state
            elif self.penultimate:
                features = output.hidden_states[-2]
            else:
                features = self._norm(output.hidden_states[-self.clip_skip])
        return features, output.text_embeds if self.pooled_width else None

    @property
    def _norm(self) -> nn.Module:
        """The layer norm behind the last layer."""
        # older transformers have a shell around it
        inner: Any = getattr(self.model, "text_model", self.model)
        return inner.final_layer_norm

    def vectors(self, ids: list[int]) -> Tensor:
        """The table's vectors of these tokens, (k, d) float32 on the CPU."""
        return self.table.weight[ids].detach().float().cpu()

    def word_start(self, ids: list[int], generator: torch.Generator, count: int) -> Tensor:
        """The mean vector of these tokens plus a little noise, (count, d); random without tokens."""
        rows = self.vectors(ids) if ids else self.table.weight.detach().float().cpu()
        noise = torch.randn(count, rows.shape[1], generator=generator)
        return rows.mean(0) + (noise * rows.std() * 0.1 if ids else rows.std(0) * noise)


def weighted(features: Tensor, weights: Tensor) -> Tensor:
    """Features (c, 77, d) of chunks times the weights (c, 77) of their positions; each chunk's mean
    stays as it was.

    Source: AUTOMATIC1111 1.10, modules/sd_emphasis.py, its default "Original".
    """
    chunks = []
    for chunk, weight in zip(features, weights.to(features), strict=True):
        if bool((weight != 1).any()):
            scaled = chunk * weight[:, None]
            chunk = scaled * (chunk.mean() / scaled.mean())
        chunks.append(chunk)
    return torch.stack(chunks)


@contextmanager
def _replaced(table: nn.Embedding, slot: Tensor, vectors: Tensor) -> Iterator[None]:
    """While inside, the embedding table gives vectors[slot] where slot >= 0."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        # unlike vectors[slot], F.embedding adds up gradients in a fixed order
        words = F.embedding(slot.clamp(min=0), vectors)
        return torch.where((slot >= 0)[..., None], words.to(output.dtype), output)

    handle = table.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
