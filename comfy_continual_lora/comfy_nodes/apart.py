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


class _Wrappers:
    """What stands around ComfyUI's functions while a MODEL samples with areas.

    Each takes ComfyUI's own function first (`executor`), then that one's arguments.
    """

    def __init__(self, areas: HostAreas) -> None:
        self.areas = areas
        self.scenes: dict[Any, SceneText] = {}  # of the conds that are being sampled, by their ids

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.areas.start()
        try:
            return executor(*args, **kwargs)
        finally:
            self.scenes.clear()

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Learns which conds are of prompts that name two or more."""
        for cond in conds:
            for one in cond or []:
                scene = one.get(KEY)
                if isinstance(scene, SceneStates) and one["uuid"] not in self.scenes:
                    scene = scene.text(model, x.device)
                if isinstance(scene, SceneText):
                    self.scenes[one["uuid"]] = scene
        return executor(model, conds, x, *args, **kwargs)

    def unet(
        self,
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

        return self._call(x, context, options, run)

    def anima(
        self,
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

        return self._call(x, context, options, run)

    def _call(
        self,
        x: Tensor,
        context: Tensor,
        options: dict[str, Any],
        run: Callable[[Sequence[Part]], Tensor],
    ) -> Tensor:
        ids = options.get("uuids", [])
        keyed = [(one, self.scenes[one]) if one in self.scenes else None for one in ids]
        return self.areas.call(keyed, x, context, run)


def with_areas(model: Any, preset: str, masks: Tensor | None = None) -> Any:
    """A copy of MODEL that draws each learned thing of a prompt in its area.

    `masks` (k, h, w): areas to use in place of those found. The model's attachment KEY is its
    `HostAreas`.
    """
    areas = HostAreas(AreaSettings(FINE[preset]), masks)
    wrappers = _Wrappers(areas)
    around = {
        WrappersMP.OUTER_SAMPLE: wrappers.sample,
        WrappersMP.CALC_COND_BATCH: wrappers.calc_cond_batch,
        WrappersMP.DIFFUSION_MODEL: wrappers.anima if preset == "anima" else wrappers.unet,
    }
    copied = model.clone()
    for kind, wrapper in around.items():
        copied.remove_wrappers_with_key(kind, KEY)  # of a stack that was applied before
        copied.add_wrapper_with_key(kind, KEY, wrapper)
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
