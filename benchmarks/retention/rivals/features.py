"""Text features that the rivals in text space compute with, float64 on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.stable import StableBackbone

from .rival import Own

BATCH = 16


@torch.no_grad()
def feature_rows(
    backbone: Backbone, prompts: Sequence[str], words: Mapping[str, Tensor], padding: bool
) -> Tensor:
    """The features of every position of these prompts, (n, d_text); without `padding` each prompt's
    positions up to its end token.
    """
    rows = []
    for start in range(0, len(prompts), BATCH):
        chosen = prompts[start : start + BATCH]
        features = backbone.context(backbone.encode_prompts(chosen, words))
        if padding:
            rows.append(features.flatten(0, 1))
        else:
            rows.append(features[~backbone.padding(chosen, words)])
    return torch.cat(rows).double().cpu()


@torch.no_grad()
def target_rows(backbone: Backbone, concept: Own) -> Tensor:
    """The features at a concept's target words, (s, d_text): its word, its noun and the end token, in
    its name alone and in "photo of a ...".
    """
    words = {concept.token: concept.word}
    rows = []
    for prompt in (concept.name, f"photo of a {concept.name}"):
        features = backbone.context(backbone.encode_prompts([prompt], words))[0]
        assert isinstance(backbone, StableBackbone)
        _, slots = backbone.tokenize(prompt, words)
        first = next(position for position, slot in enumerate(slots) if slot >= 0)
        padding = backbone.padding([prompt], words)[0]
        rows.append(features[first:][~padding[first:]])
    return torch.cat(rows).double().cpu()
