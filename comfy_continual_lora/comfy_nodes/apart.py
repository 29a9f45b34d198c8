"""Several learned things in one ComfyUI prompt, each in the area where its noun is. Only ComfyUI
imports this module.

CLIP (`words`) puts a `SceneText`, or for Anima a `SceneStates`, into the conditioning of every prompt
that names two or more; here a MODEL learns to use it, with any sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import (  # pyright: ignore[reportMissingImports]
    optimized_attention,
)
from comfy.patcher_extension import WrappersMP  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ..areas import FINE, AreaSettings
from ..errors import SettingError
from ..hostareas import HostAreas, Part, SceneText, patched, patched_anima
from .words import KEY, SceneStates


def with_areas(model: Any, preset: str, masks: Tensor | None = None) -> Any:
    """A copy of MODEL that draws each learned thing of a prompt in its area.

    `masks` (k, h, w): areas to use in place of those found. The model's attachment KEY is its
    `HostAreas`.
    """
    areas = HostAreas(AreaSettings(FINE[preset]), masks)
    scenes: dict[Any, SceneText] = {}  # of the conds that are being sampled, by their ids

    def sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
        areas.start()
        try:
            return executor(*args, **kwargs)
        finally:
            scenes.clear()

    def conds(executor: Any, model: Any, conds: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for cond in conds:
            for one in cond or []:
                scene = one.get(KEY)
                if isinstance(scene, SceneStates) and one["uuid"] not in scenes:
                    scene = scene.text(model, x.device)
                if isinstance(scene, SceneText):
                    scenes[one["uuid"]] = scene
        return executor(model, conds, x, *args, **kwargs)

    def called(
        x: Tensor,
        context: Tensor,
        options: dict[str, Any],
        call: Callable[[Sequence[Part]], Tensor],
    ) -> Tensor:
        ids = options.get("uuids", [])
        keyed = [(one, scenes[one]) if one in scenes else None for one in ids]
        return areas.call(keyed, x, context, call)

    def unet(
        executor: Any,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        options = transformer_options or {}

        def run(parts: Sequence[Part]) -> Any:
            # the net takes what it uses out of these lists
            unused = control and {key: list(value) for key, value in control.items()}
            chosen = patched(options, parts, _attend)
            return executor(x, timesteps, context, y, unused, chosen, **kwargs)

        return called(x, context, options, run)

    def anima(
        executor: Any,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *more: Any,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        options = transformer_options or {}

        def run(parts: Sequence[Part]) -> Any:
            chosen = patched_anima(options, parts)
            return executor(x, timesteps, context, *more, transformer_options=chosen, **kwargs)

        return called(x, context, options, run)

    copied = model.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH, WrappersMP.DIFFUSION_MODEL):
        copied.remove_wrappers_with_key(kind, KEY)  # of a stack that was applied before
    copied.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sampling)
    copied.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, conds)
    net = anima if preset == "anima" else unet
    copied.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, net)
    copied.set_attachments(KEY, areas)
    return copied


def found_masks(model: Any, samples: Tensor) -> Tensor:
    """The areas of what was sampled last, (pictures times things, 8h, 8w) in 0..1.

    Errors: SettingError if no prompt named several learned things, or MODEL drew nothing.
    """
    areas = model.get_attachment(KEY)
    found = areas.found if isinstance(areas, HostAreas) else []
    if not found:
        raise SettingError(
            "There are no areas: nothing was sampled with this MODEL from a prompt that names two "
            "or more learned things. Connect the MODEL of Apply Concepts, also to the sampler."
        )
    size = [8 * side for side in samples.shape[-2:]]
    return torch.cat([F.interpolate(one.cpu(), size, mode="bilinear") for one in found]).flatten(
        0, 1
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    return optimized_attention(
        q, k, v, options["n_heads"], attn_precision=options.get("attn_precision")
    )
