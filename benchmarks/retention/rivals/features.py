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
    rows = []
    for prompt in (concept.name, f"photo of a {concept.name}"):
        features, slots = _with_slots(backbone, concept, prompt)
        first = next(position for position, slot in enumerate(slots) if slot >= 0)
        padding = backbone.padding([prompt], {concept.token: concept.word})[0]
        rows.append(features[first:][~padding[first:]])
    return torch.cat(rows).double().cpu()


@torch.no_grad()
def word_rows(backbone: Backbone, concept: Own, prompt: str) -> Tensor:
    """The features at a concept's word in a prompt, (k, d_text)."""
    features, slots = _with_slots(backbone, concept, prompt)
    return features[[slot >= 0 for slot in slots]].double().cpu()


def _with_slots(backbone: Backbone, concept: Own, prompt: str) -> tuple[Tensor, list[int]]:
    """A prompt's features, (t, d_text), and at each position the number of the word's vector there,
    below 0 for anything else.
    """
    assert isinstance(backbone, StableBackbone)
    words = {concept.token: concept.word}
    features = backbone.context(backbone.encode_prompts([prompt], words))[0]
    return features, backbone.tokenize(prompt, words)[1]
