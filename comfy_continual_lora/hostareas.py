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
    def texts(self) -> tuple[Tensor, ...]:
        """The neutral prompt's features, then each concept's own."""
        return self.neutral, *self.own

    @property
    def places(self) -> list[slice]:
        """The positions of each of `texts` if they are joined."""
        ends = accumulate((text.shape[1] for text in self.texts), initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]

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
