"""One text encoder of a checkpoint: token numbers -> text features, with word vectors standing for
some of the tokens.

Shapes: n prompts, 77 positions, d the encoder's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection


@dataclass(eq=False)
class TextEncoder:
    """`penultimate`: the last layer but one speaks, not normed; else the last one, normed.

    A model with projection gives pooled text too.
    """

    model: CLIPTextModel | CLIPTextModelWithProjection
    pad: int  # the token number behind the end of the prompt
    penultimate: bool = False

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
        """Of the pooled text; 0 where there is none."""
        return (
            self.model.text_projection.out_features
            if isinstance(self.model, CLIPTextModelWithProjection)
            else 0
        )

    def encode(self, ids: Tensor, slot: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token numbers (n, 77) -> features (n, 77, d) and pooled text (n, p); vectors[slot] (k, d)
        stands where slot (n, 77) >= 0.
        """
        with _replaced(self.table, slot, vectors):
            found = self.model(ids, output_hidden_states=self.penultimate)
        features = found.hidden_states[-2] if self.penultimate else found.last_hidden_state
        return features, found.text_embeds if self.pooled_width else None

    def vectors(self, ids: list[int]) -> Tensor:
        """The table's vectors of these tokens, (k, d) float32 on the CPU."""
        return self.table.weight[ids].detach().float().cpu()

    def word_start(self, ids: list[int], generator: torch.Generator, count: int) -> Tensor:
        """The mean vector of these tokens plus a little noise, (count, d); without tokens random
        vectors.
        """
        rows = self.vectors(ids) if ids else self.table.weight.detach().float().cpu()
        noise = torch.randn(count, rows.shape[1], generator=generator)
        return rows.mean(0) + (noise * rows.std() * 0.1 if ids else rows.std(0) * noise)


@contextmanager
def _replaced(table: nn.Embedding, slot: Tensor, vectors: Tensor) -> Iterator[None]:
    """While inside, the embedding table gives vectors[slot] where slot >= 0."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        words = F.embedding(
            slot.clamp(min=0), vectors
        )  # adds gradients up in a fixed order, which vectors[slot] does not
        return torch.where((slot >= 0)[..., None], words.to(output.dtype), output)

    handle = table.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
