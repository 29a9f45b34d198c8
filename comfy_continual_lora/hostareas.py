"""Stage 8: areas (`areas`) in a host's own U-Net.

    a `SceneText` for each prompt about several learned things, made where the host encodes prompts
    -> `HostAreas.call` around every call of the U-Net, with what each part of its batch is drawn from
    -> the `Part`s that cross-attention is to follow in this call

How a host's cross-attention follows them is told by `patched` for ComfyUI and for Forge, reForge and
Forge Neo, whose U-Nets descend from it, by `patched_anima` for ComfyUI's Anima, and by `followed` for
AUTOMATIC1111 and for Forge Neo's Anima. In all of them the host makes K and V, with whatever LoRA it
applies. No host is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .areas import Areas, AreaSettings

Attend = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]  # q, k, v, the layer's options
Options = dict[str, Any]  # a host's transformer_options


_LOG = logging.getLogger("comfy-continual-lora")
_LOG.setLevel(logging.WARNING)  # whatever the host's is: Forge Neo shows errors alone


def warn(text: str) -> None:
    """Say something in the host's console."""
    _LOG.warning("comfy-continual-lora: %s", text)


@dataclass(frozen=True, eq=False)
class SceneText:
    """What a prompt about several learned things is drawn from: text features (1, t, d) of the whole
    prompt, of the neutral one and of each concept's own, on the CPU; `nouns` (k, t): 1 at the nouns in
    the neutral one.
    """

    tokens: tuple[str, ...]
    whole: Tensor
    neutral: Tensor
    own: tuple[Tensor, ...]
    nouns: Tensor

    @property
    def length(self) -> int:
        """The number of text positions of the neutral and the own prompts."""
        return sum(text.shape[1] for text in (self.neutral, *self.own))

    def is_in(self, context: Tensor) -> bool:
        """Whether this is the text of a context (n, t, d), which a host may have made longer. A host or
        another extension may have changed it since it was encoded.
        """
        whole = self.whole.to(context)
        count = whole.shape[1]
        if context.shape[2] != whole.shape[2] or context.shape[1] < count:
            return False
        return torch.equal(context[:, :count], whole.expand(len(context), -1, -1))


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a batch that are drawn from one scene."""

    rows: slice
    scene: SceneText
    areas: Areas


class HostAreas:
    """The areas of the pictures that a host draws with one model."""

    def __init__(self, settings: AreaSettings, masks: Tensor | None = None) -> None:
        """`masks` (k, h, w) in 0..1 of any size, to use for the things of each prompt in order."""
        self.settings, self.masks = settings, masks
        self.areas: dict[Hashable, Areas | None] = {}

    def start(self) -> None:
        """Forget the areas of what was drawn before."""
        self.areas = {}

    @property
    def found(self) -> list[Tensor]:
        """The masks (n, k, h, w) of what was drawn last."""
        return [one.masks for one in self.areas.values() if one and one.masks is not None]

    def call(
        self,
        scenes: Sequence[tuple[Hashable, SceneText] | None],
        x: Tensor,
        context: Tensor,
        run: Callable[[Sequence[Part]], Tensor],
    ) -> Tensor:
        """One call of the U-Net, made by `run`, whose cross-attention is to follow some parts.

        The batch x (n, 4, h, w) with its context (n, t, d) consists of equal parts, one for each of
        `scenes`: a key that stays the same from step to step with what the part is drawn from, or
        None for a part that is drawn as ever. In the first step the net is called once more, to see
        where things are.
        """
        count = len(x) // max(1, len(scenes))
        parts = []
        for number, one in enumerate(scenes):
            rows = slice(number * count, (number + 1) * count)
            if one and (areas := self._areas(one, x[rows], context[rows])):
                parts.append(Part(rows, one[1], areas))
        if any(part.areas.masks is None for part in parts):
            run(parts)
            for part in parts:
                part.areas.settle()
        output = run(parts)
        for part in parts:
            part.areas.settle()
        return output

    def _areas(self, keyed: tuple[Hashable, SceneText], x: Tensor, context: Tensor) -> Areas | None:
        """Those of a part of the batch; None if it has to be drawn the plain way."""
        scene = keyed[1]
        key = (keyed[0], tuple(x.shape))
        if key not in self.areas:
            problem = self._problem(scene, context)
            if problem:
                warn(f"{' and '.join(scene.tokens)} are drawn mixed, because {problem}.")
                self.areas[key] = None
            else:
                nouns = scene.nouns.to(x.device).expand(len(x), -1, -1)
                given = None if self.masks is None else self.masks[None].to(x.device).float()
                height, width = x.shape[-2:]
                self.areas[key] = Areas(nouns, (height, width), self.settings, given)
        return self.areas[key]

    def _problem(self, scene: SceneText, context: Tensor) -> str:
        if not scene.is_in(context):
            return "their prompt was changed after it was encoded, by another node or extension"
        if self.masks is not None and len(self.masks) != len(scene.tokens):
            return f"{len(self.masks)} masks were given for {len(scene.tokens)} things"
        if unseen := [t for t, row in zip(scene.tokens, scene.nouns, strict=True) if not row.any()]:
            return f"the noun of {' and '.join(unseen)} was not found in the prompt"
        return ""


# --- by ComfyUI's attention patches --------------------------------------------------------------


def patched(options: Options, parts: Sequence[Part], attend: Attend) -> Options:
    """Options in which every cross-attention follows these parts.

    One patch puts the texts of neutral and own prompts behind the context, so that the layer makes K
    and V of them. Another attends to them one by one and mixes the outputs. Patches that other
    extensions have in a layer (an image prompt's, say) are called for each of them.
    """
    if not parts:
        return options
    length = max(part.scene.length for part in parts)
    replacing = dict(options.get("patches_replace", {}))
    more = _Texts(parts, length)

    def extend(hidden: Tensor, context: Tensor, value: Tensor, _: Any) -> tuple[Tensor, ...]:
        return hidden, more.behind(context), more.behind(value)

    replacing["attn2"] = _EveryLayer(replacing.get("attn2", {}), parts, length, attend)
    return {**_with_attn2_patch(options, extend), "patches_replace": replacing}


def patched_anima(options: Options, parts: Sequence[Part]) -> Options:
    """The same of Anima, whose layers can't be replaced: another function computes all attention. It
    takes that of a cross-attention for what it is because the patch was called just before.

    Source: comfy/ldm/cosmos/predict2.py (Attention) and comfy/ldm/modules/attention.py (wrap_attn)
    of ComfyUI 0.33.
    """
    if not parts:
        return options
    length = max(part.scene.length for part in parts)
    more = _Texts(parts, length)
    foreign = options.get("optimized_attention_override")
    is_next: list[bool] = []

    def extend(hidden: Tensor, context: Tensor, value: Tensor, **_: Any) -> dict[str, Tensor]:
        is_next.append(True)
        return {"q": hidden, "k": more.behind(context), "v": more.behind(value)}

    def attention(
        attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        """q, k and v are (n, heads, positions, d)."""
        whole = partial(foreign, attend) if foreign else attend
        if not is_next:
            return whole(q, k, v, *rest, **named)
        is_next.clear()

        def over(start: int, count: int, rows: slice) -> Tensor:
            keys, values = (t[rows, :, start : start + count] for t in (k, v))
            return whole(q[rows], keys, values, *rest, **named)

        def look(part: Part, positions: slice) -> None:
            query, key = (
                one.transpose(1, 2).flatten(2) for one in (q[part.rows], k[part.rows, :, positions])
            )
            part.areas.look(query, key, q.shape[1])

        return _mixed(parts, k.shape[2] - length, q.shape[2], over, look)

    patched = _with_attn2_patch(options, extend)
    return {**patched, "optimized_attention_override": attention}


def _with_attn2_patch(options: Options, patch: Callable[..., Any]) -> Options:
    patches = dict(options.get("patches", {}))
    patches["attn2_patch"] = [*patches.get("attn2_patch", []), patch]
    return {**options, "patches": patches}


class _Texts:
    """The texts of neutral and own prompts, for every row of a batch (n, length, d)."""

    def __init__(self, parts: Sequence[Part], length: int) -> None:
        self.parts, self.length = parts, length
        self.made: list[Tensor] = []  # the same in every layer

    def behind(self, context: Tensor) -> Tensor:
        if not self.made:
            more = context.new_zeros(len(context), self.length, context.shape[2])
            for part in self.parts:
                texts = torch.cat([part.scene.neutral, *part.scene.own], 1)
                more[part.rows, : texts.shape[1]] = texts.to(context)
            self.made.append(more)
        return torch.cat([context, *self.made], 1)


def _mixed(
    parts: Sequence[Part],
    first: int,
    places: int,
    over: Callable[[int, int, slice], Tensor],
    look: Callable[[Part, slice], None],
) -> Tensor:
    """A layer's output (n, places, d) for a context whose texts begin at position `first`.

    `over`: attention of rows to so many positions from one on; `look`: show a part's areas what it
    attends to at some.
    """
    whole = over(0, first, slice(None))
    for part in parts:
        if not part.areas.fits(places):
            continue
        at, outputs = first, []
        for text in (part.scene.neutral, *part.scene.own):
            outputs.append(over(at, text.shape[1], part.rows))
            at += text.shape[1]
        neutral, *own = outputs
        if part.areas.masks is not None:
            neutral = part.areas.mix(neutral, own)
        whole[part.rows] = neutral
        look(part, slice(first, first + part.scene.neutral.shape[1]))
    return whole


class _EveryLayer(dict[Any, Any]):
    """What a host looks up to replace the attention of a layer, for every layer.

    The key is the layer's block, with or without its number in the block.
    """

    def __init__(
        self,
        replaced: Mapping[Any, Callable[..., Tensor]],
        parts: Sequence[Part],
        length: int,
        attend: Attend,
    ) -> None:
        super().__init__(replaced)
        self.parts, self.length, self.attend = parts, length, attend

    def __contains__(self, _key: object) -> bool:
        return True

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key]

    def __getitem__(self, key: Any) -> Callable[..., Tensor]:
        block = key[:2] if isinstance(key, tuple) else key
        foreign = dict.get(self, key) or dict.get(self, block)

        def attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            first = k.shape[1] - self.length

            def over(start: int, count: int, rows: slice) -> Tensor:
                """Attention of these rows to some of the text positions."""
                keys, values = (t[:, start : start + count] for t in (k, v))
                if foreign:  # it may count on the whole batch
                    return foreign(q, keys, values, options)[rows]
                return self.attend(q[rows], keys[rows], values[rows], options)

            def look(part: Part, positions: slice) -> None:
                part.areas.look(q[part.rows], k[part.rows, positions], options["n_heads"])

            return _mixed(self.parts, first, q.shape[1], over, look)

        return attention


# --- by a layer's own forward --------------------------------------------------------------------


def followed(
    forward: Callable[[Tensor, Tensor], Tensor],
    seen: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]],
    parts: Sequence[Part],
    x: Tensor,
    context: Tensor,
) -> Tensor:
    """What a cross-attention gives for x (n, places, d) if it follows these parts.

    `forward` is its own, `seen` gives its query and key, (n, places, d) and (n, t, d), and the number
    of its heads; both are asked for hidden states and a context.
    """
    output = forward(x, context)
    for part in parts:
        if not part.areas.fits(x.shape[1]):
            continue
        hidden, scene = x[part.rows], part.scene
        neutral = scene.neutral.to(context).expand(len(hidden), -1, -1)
        mixed = forward(hidden, neutral)
        if part.areas.masks is not None:
            own = [text.to(context).expand(len(hidden), -1, -1) for text in scene.own]
            mixed = part.areas.mix(mixed, [forward(hidden, text) for text in own])
        output[part.rows] = mixed
        if part.areas.wanted(x.shape[1]):
            part.areas.look(*seen(hidden, neutral))
    return output
