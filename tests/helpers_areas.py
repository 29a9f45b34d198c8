"""Attention couple, a second implementation that areas are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from helpers_learn import random_adapter
from torch import Tensor

from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.areas import FINE, AreaSettings
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.mentions import mentions
from comfy_continual_lora.presets import PLAIN_NAME_PRESETS
from comfy_continual_lora.together import drawn_together

NOUNS = {"V1": "mug", "V2": "fish", "V3": "star"}
PROMPT = "a photo of a V1 mug and a V2 fish on grass"


def words_of(backbone: Backbone) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    if backbone.preset in PLAIN_NAME_PRESETS:
        return {token: backbone.word_start(noun, generator) for token, noun in NOUNS.items()}
    return {
        token: backbone.word_start(noun, generator, 1 + number)
        + torch.randn(1, backbone.word_width, generator=generator) * 0.02
        for number, (token, noun) in enumerate(NOUNS.items())
    }


def halves(height: int, width: int) -> Tensor:
    """Masks (1, 2, height, width) of the left and the right half."""
    masks = torch.zeros(1, 2, height, width)
    masks[:, 0, :, : width // 2] = 1
    masks[:, 1, :, width // 2 :] = 1
    return masks


@contextmanager
def couple(unet: Any, rows: slice, contexts: list[Tensor], masks: Tensor) -> Iterator[None]:
    """Inside the block every cross-attention runs whole, once for each context, and its outputs for
    these rows are averaged with masks (k, h, w).
    """
    handles: dict[Any, Any] = {}

    def averaged(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        hidden = args[0][rows]
        height = round(math.sqrt(hidden.shape[1] * masks.shape[1] / masks.shape[2]))
        size = (height, hidden.shape[1] // height)
        handles.pop(module).remove()
        result = output.clone()
        result[rows] = sum(
            F.adaptive_avg_pool2d(mask[None], size).flatten()[:, None]
            * module(hidden, encoder_hidden_states=context.expand(len(hidden), -1, -1))
            for context, mask in zip(contexts, masks, strict=True)
        )
        handles[module] = module.register_forward_hook(averaged, with_kwargs=True)
        return result

    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            handles[module] = module.register_forward_hook(averaged, with_kwargs=True)
    try:
        yield
    finally:
        for handle in handles.values():
            handle.remove()


def follows_areas(backbone: Backbone, height: int, width: int) -> None:
    """Given halves are attention couple's result, areas are found where things can be anywhere, and
    the net is afterwards what it was. Sizes are of the latents, even on every level.
    """
    scene = mentions(PROMPT, NOUNS)
    assert scene
    text, settings = FrozenText(backbone, words_of(backbone)), AreaSettings(FINE[backbone.preset])
    channels, draws = backbone.latent_channels, torch.Generator().manual_seed(5)
    noisy = torch.randn(1, channels, height, width, generator=draws)
    timestep, unwanted = torch.tensor([500]), text([""])
    with torch.no_grad(), attached(backbone, random_adapter(backbone, "lora", 1)):
        plain = backbone.predict(noisy, timestep, text([PROMPT]))
        arguments = (backbone, text, [scene], (height, width), settings)
        with drawn_together(*arguments, halves(height, width)) as together:
            ours = together.predict(noisy, timestep, unwanted)
            neutral = together.neutral
        contexts = [backbone.context(text([own])) for own in scene.own]
        with couple(backbone.unet, slice(1, 2), contexts, halves(height, width)[0]):
            theirs = backbone.predict(
                torch.cat([noisy] * 2),
                torch.cat([timestep] * 2),
                torch.cat([unwanted, neutral]),
            )
        scale = float(theirs.abs().max())
        assert torch.allclose(ours, theirs, atol=1e-4 * scale)
        assert not torch.allclose(ours[1], plain[0], atol=1e-4 * scale)
        with drawn_together(*arguments) as together:
            found = together.predict(noisy, timestep, unwanted)
            masks = together.areas.masks
        assert found.isfinite().all()
        assert masks is not None
        size = tuple(-(-side // settings.fine) for side in (height, width))
        assert masks.shape == (1, 2, *size)
        assert masks.min() >= 0
        assert masks.sum(1).max() <= 1 + 1e-5
        assert masks.max() > 0.1
        assert torch.equal(plain, backbone.predict(noisy, timestep, text([PROMPT])))
