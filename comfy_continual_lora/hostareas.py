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
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
    def texts(self) -> tuple[Tensor, ...]:
        """The neutral prompt's features, then each concept's own."""
        return self.neutral, *self.own

    @property
    def places(self) -> list[slice]:
        """The positions of each of `texts` if they are joined."""
        ends = accumulate((text.shape[1] for text in self.texts), initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def within(self, context: Tensor) -> SceneText | None:
        """This scene as a context (n, t, d) of one prompt has it: what stands behind the prompt there,
        such as text that a node added, stands behind each of the texts. None if the context is of
        another prompt, or of this one after an extension changed it.
        """
        row, whole = context[:1], self.whole.to(context)
        count = whole.shape[1]
        if row.shape[2] != whole.shape[2] or row.shape[1] < count:
            return None
        is_here = torch.equal(row[:, :count], whole)
        if not is_here or not torch.equal(context, row.expand_as(context)):
            return None
        added = row[:, count : _period(row, count)].to(self.whole)
        if not added.shape[1]:
            return self
        own = tuple(torch.cat([text, added], 1) for text in self.own)
        nouns = F.pad(self.nouns, (0, added.shape[1]))
        whole, neutral = (torch.cat([text, added], 1) for text in (self.whole, self.neutral))
        return SceneText(self.tokens, whole, neutral, own, nouns)


def _period(row: Tensor, least: int) -> int:
    """How many positions a context (1, t, d) has before it repeats itself, which a host does to make it
    as long as another; at least so many.
    """
    length = row.shape[1]
    for times in range(length // least, 1, -1):
        if length % times == 0:
            part = row[:, : length // times]
            if torch.equal(row, part.repeat(1, times, 1)):
                return part.shape[1]
    return length


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a batch that are drawn from one scene."""

    rows: slice
    scene: SceneText
    areas: Areas


class Place(NamedTuple):
    """Where in a picture's latents, `size` is their height and width, a prompt for a part of it is."""

    size: tuple[int, int]
    rows: slice
    columns: slice

    def cut(self, masks: Tensor) -> Tensor:
        """Masks (n, k, h, w) of the whole picture, of any size -> of this part of the latents."""
        whole = F.interpolate(masks, self.size, mode="area")
        return whole[..., self.rows, self.columns]

    def pasted(self, masks: Tensor) -> Tensor:
        """Masks of this part, of any size -> of the latents, 0 around it."""
        whole = masks.new_zeros(*masks.shape[:2], *self.size)
        part = whole[..., self.rows, self.columns]
        part.copy_(F.interpolate(masks, part.shape[2:], mode="bilinear"))
        return whole


class HostAreas:
    """The areas of the pictures that a host draws with one model."""

    def __init__(self, settings: AreaSettings, masks: Tensor | None = None) -> None:
        """`masks` (k, h, w) in 0..1 of any size, to use for the things of each prompt in order."""
        self.settings, self.masks = settings, masks
        # by their keys, the parts of a batch that are a part of the picture
        self.places: dict[Hashable, Place] = {}
        # what a part of the batch is drawn from in every step, with its areas
        self.drawn: dict[tuple[Hashable, tuple[int, ...]], tuple[SceneText, Areas] | None] = {}

    def start(self) -> None:
        """Forget the areas of what was drawn before."""
        self.drawn, self.places = {}, {}

    @property
    def found(self) -> list[Tensor]:
        """The masks (n, k, h, w) of what was drawn last, of whole pictures."""
        found = []
        for (key, _), drawn in self.drawn.items():
            if drawn and (masks := drawn[1].masks) is not None:
                place = self.places.get(key)
                found.append(place.pasted(masks) if place else masks)
        return found

    def call(
        self,
        scenes: Sequence[tuple[Hashable, SceneText] | None],
        x: Tensor,
        context: Tensor,
        run: Callable[[Sequence[Part]], Tensor],
    ) -> Tensor:
        """One call of the U-Net, made by `run`, whose cross-attention is to follow some parts.

        The batch x (n, c, h, w) with its context (n, t, d) consists of equal parts, one for each of
        `scenes`: a key that stays the same from step to step with what the part is drawn from, or
        None for a part that is drawn as ever. In the first step the net is called once more, to see
        where things are.
        """
        count = len(x) // max(1, len(scenes))
        parts = []
        for number, one in enumerate(scenes):
            rows = slice(number * count, (number + 1) * count)
            if one and (drawn := self._drawn(one, x[rows], context[rows])):
                parts.append(Part(rows, *drawn))
        if any(part.areas.masks is None for part in parts):
            run(parts)
            for part in parts:
                part.areas.settle()
        output = run(parts)
        for part in parts:
            part.areas.settle()
        return output

    def _drawn(
        self, keyed: tuple[Hashable, SceneText], x: Tensor, context: Tensor
    ) -> tuple[SceneText, Areas] | None:
        """What a part of the batch is drawn from; None if it has to be drawn the plain way."""
        key = (keyed[0], tuple(x.shape))
        if key not in self.drawn:
            self.drawn[key] = self._begun(keyed[1], x, context, self.places.get(keyed[0]))
        return self.drawn[key]

    def _begun(
        self, scene: SceneText, x: Tensor, context: Tensor, place: Place | None
    ) -> tuple[SceneText, Areas] | None:
        seen = scene.within(context)
        problem = self._problem(seen)
        if seen is None or problem:
            warn(f"{' and '.join(scene.tokens)} are drawn mixed, because {problem}.")
            return None
        nouns = seen.nouns.to(x.device).expand(len(x), -1, -1)
        given = None if self.masks is None else self.masks[None].to(x.device).float()
        if given is not None and place:
            given = place.cut(given)
        height, width = x.shape[-2:]
        return seen, Areas(nouns, (height, width), self.settings, given)

    def _problem(self, scene: SceneText | None) -> str:
        """Why what a context has of a scene can't be drawn by areas; empty if it can."""
        if scene is None:
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
    replacing = dict(options.get("patches_replace", {}))
    more = _Texts(parts)

    def extend(hidden: Tensor, context: Tensor, value: Tensor, _: Any) -> tuple[Tensor, ...]:
        return hidden, more.behind(context), more.behind(value)

    replacing["attn2"] = _EveryLayer(replacing.get("attn2", {}), more, attend)
    return {**_with_attn2_patch(options, extend), "patches_replace": replacing}


def patched_anima(options: Options, parts: Sequence[Part]) -> Options:
    """The same of Anima, whose layers can't be replaced: another function computes all attention. It
    takes that of a cross-attention for what it is because the patch was called just before.

    Source: comfy/ldm/cosmos/predict2.py (Attention) and comfy/ldm/modules/attention.py (wrap_attn)
    of ComfyUI 0.33.
    """
    if not parts:
        return options
    more = _Texts(parts)
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
        (k, keys), (v, values) = (t.tensor_split([-more.length], 2) for t in (k, v))

        def output(part: Part, number: int) -> Tensor:
            rows, place = part.rows, part.scene.places[number]
            return whole(q[rows], keys[rows, :, place], values[rows, :, place], *rest, **named)

        def look(part: Part) -> None:
            neutral = keys[part.rows, :, part.scene.places[0]]
            query, key = (one.transpose(1, 2).flatten(2) for one in (q[part.rows], neutral))
            part.areas.look(query, key, q.shape[1])

        return _mixed(whole(q, k, v, *rest, **named), parts, q.shape[2], output, look)

    patched = _with_attn2_patch(options, extend)
    return {**patched, "optimized_attention_override": attention}


def _with_attn2_patch(options: Options, patch: Callable[..., Any]) -> Options:
    patches = dict(options.get("patches", {}))
    patches["attn2_patch"] = [*patches.get("attn2_patch", []), patch]
    return {**options, "patches": patches}


class _Texts:
    """The texts of neutral and own prompts, for every row of a batch (n, length, d)."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.length = max(part.scene.places[-1].stop for part in parts)
        self.made: list[Tensor] = []  # the same in every layer

    def behind(self, context: Tensor) -> Tensor:
        if not self.made:
            more = context.new_zeros(len(context), self.length, context.shape[2])
            for part in self.parts:
                texts = torch.cat(part.scene.texts, 1)
                more[part.rows, : texts.shape[1]] = texts.to(context)
            self.made.append(more)
        return torch.cat([context, *self.made], 1)


def _mixed(
    whole: Tensor,
    parts: Sequence[Part],
    count: int,
    output: Callable[[Part, int], Tensor],
    look: Callable[[Part], None],
) -> Tensor:
    """A layer's output `whole` (n, places, d), with so many places, in which these parts are mixed.

    `output`: what the layer gives for a part's rows and one of its `SceneText.texts`, by its number;
    `look`: show the part's areas what it attends to in the neutral one.
    """
    for part in parts:
        if not part.areas.fits(count):
            continue
        mixed = output(part, 0)
        if part.areas.masks is not None:
            own = [output(part, number) for number in range(1, len(part.scene.texts))]
            mixed = part.areas.mix(mixed, own)
        whole[part.rows] = mixed
        look(part)
    return whole


class _EveryLayer(dict[Any, Any]):
    """What a host looks up to replace the attention of a layer, for every layer.

    The key is the layer's block, with or without its number in the block.
    """

    def __init__(
        self,
        replaced: Mapping[Any, Callable[..., Tensor]],
        texts: _Texts,
        attend: Attend,
    ) -> None:
        super().__init__(replaced)
        self.texts, self.attend = texts, attend

    def __contains__(self, _key: object) -> bool:
        return True

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key]

    def __getitem__(self, key: Any) -> Callable[..., Tensor]:
        block = key[:2] if isinstance(key, tuple) else key
        foreign = dict.get(self, key) or dict.get(self, block)

        def attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            (k, keys), (v, values) = (t.tensor_split([-self.texts.length], 1) for t in (k, v))

            def output(part: Part, number: int) -> Tensor:
                rows, place = part.rows, part.scene.places[number]
                key, value = keys[:, place], values[:, place]
                if foreign:  # it may count on the whole batch
                    return foreign(q, key, value, options)[rows]
                return self.attend(q[rows], key[rows], value[rows], options)

            def look(part: Part) -> None:
                neutral = keys[part.rows, part.scene.places[0]]
                part.areas.look(q[part.rows], neutral, options["n_heads"])

            whole = (foreign or self.attend)(q, k, v, options)
            return _mixed(whole, self.texts.parts, q.shape[1], output, look)

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

    def given(part: Part, number: int) -> tuple[Tensor, Tensor]:
        hidden, text = x[part.rows], part.scene.texts[number]
        return hidden, text.to(context).expand(len(hidden), -1, -1)

    def output(part: Part, number: int) -> Tensor:
        return forward(*given(part, number))

    def look(part: Part) -> None:
        if part.areas.wanted(x.shape[1]):
            part.areas.look(*seen(*given(part, 0)))

    return _mixed(forward(x, context), parts, x.shape[1], output, look)
