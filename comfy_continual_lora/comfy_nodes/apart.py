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
from ..hostareas import HostAreas, Part, Place, SceneText, patched, patched_anima
from .words import KEY, SceneStates


class _Wrappers:
    """What stands around ComfyUI's functions while a MODEL samples with areas.

    Each takes ComfyUI's own function first (`executor`), then that one's arguments.
    """

    def __init__(self, areas: HostAreas) -> None:
        self.areas = areas
        self.texts: dict[Any, SceneText] = {}  # of the conds that are being sampled, by their ids
        # what the conds of this call are drawn from, by the number of their list and their ids
        self.scenes: dict[tuple[int, Any], SceneText] = {}
        self.kinds: dict[Any, str] = {}  # positive, negative, ... by the ids of conds
        self.shape: Sequence[int] = ()  # of the latents that were sampled last

    def sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.areas.start()
        self.shape = noise.shape
        conds = getattr(executor.class_obj, "original_conds", {})
        self.kinds = {one.get("uuid"): kind for kind, ones in conds.items() for one in ones}
        try:
            return executor(noise, *args, **kwargs)
        finally:
            self.texts, self.scenes = {}, {}

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Learns which conds are of prompts that name two or more; negative ones are left as they are."""
        self.scenes = {}
        for number, ones in enumerate(conds):
            for one in self._own(ones or []):
                if scene := self._text(one, model, x.device):
                    self.scenes[number, one["uuid"]] = scene
                    if area := one.get("area"):
                        self.areas.places[number, one["uuid"]] = _place(area, x)
        return executor(model, conds, x, *args, **kwargs)

    def _own(self, conds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conds of one list, unless it is the negative ones.

        A cond for an area of the picture stands behind the other lists', too, as a copy with their
        text (comfy/samplers.py, create_cond_with_same_area_if_none).
        """
        kinds = [self.kinds.get(one.get("uuid"), "") for one in conds]
        if "negative" in kinds[:1]:
            return []
        return [one for one, kind in zip(conds, kinds, strict=True) if kind == kinds[0]]

    def _text(self, cond: dict[str, Any], model: Any, device: torch.device) -> SceneText | None:
        """What a cond is drawn from; None if it is of no such prompt."""
        scene, name = cond.get(KEY), cond.get("uuid")
        if name not in self.texts:
            if isinstance(scene, SceneStates):
                scene = scene.text(model, device)
            if not isinstance(scene, SceneText):
                return None
            self.texts[name] = scene
        return self.texts[name]

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
        ids = zip(options.get("cond_or_uncond", []), options.get("uuids", []), strict=False)
        keyed = [(one, self.scenes[one]) if one in self.scenes else None for one in ids]
        return self.areas.call(keyed, x, context, run)


def _place(area: Sequence[int], x: Tensor) -> Place:
    """Of a cond for an area of the picture: the sizes of its dimensions, then where they begin, of which
    the last two are height and width. ComfyUI cuts what is beyond the latents.
    """
    height, width = area[len(area) // 2 - 2 : len(area) // 2]
    top, left = area[-2:]
    size = (x.shape[-2], x.shape[-1])
    return Place(size, slice(top, top + height), slice(left, left + width))


def with_areas(model: Any, preset: str, masks: Tensor | None = None) -> Any:
    """A copy of MODEL that draws each learned thing of a prompt in its area.

    `masks` (k, h, w): areas to use in place of those found; without them, those that a stack applied
    before was given. The model's attachment KEY is its `_Wrappers`.
    """
    if masks is None and isinstance(before := model.get_attachment(KEY), _Wrappers):
        masks = before.areas.masks
    wrappers = _Wrappers(HostAreas(AreaSettings(FINE[preset]), masks))
    around = {
        WrappersMP.OUTER_SAMPLE: wrappers.sample,
        WrappersMP.CALC_COND_BATCH: wrappers.calc_cond_batch,
        WrappersMP.DIFFUSION_MODEL: wrappers.anima if preset == "anima" else wrappers.unet,
    }
    copied = model.clone()
    for kind, wrapper in around.items():
        copied.remove_wrappers_with_key(kind, KEY)  # of a stack that was applied before
        copied.add_wrapper_with_key(kind, KEY, wrapper)
    copied.set_attachments(KEY, wrappers)
    return copied


def found_masks(model: Any, samples: Tensor) -> Tensor:
    """The areas of what was sampled last, (pictures times things, 8h, 8w) in 0..1; `samples`
    (n, c, h, w) are the latents of it.

    Errors: SettingError if no prompt named several learned things, or if MODEL drew nothing, or
    pictures of another number or size last.
    """
    wrappers = model.get_attachment(KEY)
    found = wrappers.areas.found if isinstance(wrappers, _Wrappers) else []
    if not found:
        raise SettingError(
            "There are no areas: nothing was sampled with this MODEL from a prompt that names two "
            "or more learned things. Connect the MODEL of Apply Concepts, also to the sampler."
        )
    drawn, given = _pictures(wrappers.shape), _pictures(samples.shape)
    if drawn != given:
        raise SettingError(
            f"The areas are those of what MODEL drew last, {drawn}, but the latents are of {given}. "
            "Connect the latents of the sampler that draws last with this MODEL."
        )
    size = [8 * side for side in samples.shape[-2:]]
    masks = (F.interpolate(one.cpu(), size, mode="bilinear").flatten(0, 1) for one in found)
    return torch.cat(list(masks))


def _pictures(shape: Sequence[int]) -> str:
    """How many pictures of which size latents of this shape are, in words."""
    count = shape[0]
    return f"{count} picture{'s' if count != 1 else ''} of {8 * shape[-1]} x {8 * shape[-2]} pixels"


def _attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    return optimized_attention(
        q, k, v, options["n_heads"], attn_precision=options.get("attn_precision")
    )
