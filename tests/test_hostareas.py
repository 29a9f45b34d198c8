"""Stage 8: areas through ComfyUI's attention patches, played here by the mini-SD's own U-Net: it has
to draw what `together` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_learn import random_adapter
from torch import Tensor

from comfy_continual_lora.adapters.adapter import attached
from comfy_continual_lora.areas import AreaSettings
from comfy_continual_lora.checkpoint.backbone import Backbone, FrozenText
from comfy_continual_lora.hostareas import (
    HostAreas,
    Part,
    Place,
    SceneText,
    followed,
    patched,
    patched_anima,
)
from comfy_continual_lora.mentions import Mentions, mentions
from comfy_continual_lora.together import drawn_together, noun_mask

NOUNS = {"V1": "mug", "V2": "fish", "V3": "star"}
PROMPTS = ["a V1 mug and a V2 fish on grass", "a V3 star, a V2 fish and a V1 mug"]


def _attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    q, k, v = (t.unflatten(2, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Layer:
    """A cross-attention that asks for patches as ComfyUI's does."""

    def __init__(self, number: int, options: dict[str, Any]) -> None:
        self.number, self.options = number, options

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        n, context, value = hidden_states, encoder_hidden_states, encoder_hidden_states
        options = {**self.options, "n_heads": attn.heads, "block": ("input", self.number)}
        for patch in self.options.get("patches", {}).get("attn2_patch", []):
            n, context, value = patch(n, context, value, options)
        replacing = self.options.get("patches_replace", {}).get("attn2", {})
        block: Any = ("input", self.number, 0)
        if block not in replacing:
            block = block[:2]
        parts = attn.to_q(n), attn.to_k(context), attn.to_v(value)
        run = replacing.get(block, _attend)
        return attn.to_out[1](attn.to_out[0](run(*parts, options)))


class _AnimaLayer:
    """A cross-attention that asks for patches as that of ComfyUI's Anima does."""

    def __init__(self, _number: int, options: dict[str, Any]) -> None:
        self.options = options

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        n, context, value = hidden_states, encoder_hidden_states, encoder_hidden_states
        q = self._split(attn, attn.to_q(n))
        # self-attention, which stays what it is
        assert torch.equal(self._attended(q, q, q, attn.heads), _attend_heads(q, q, q, attn.heads))
        for patch in self.options.get("patches", {}).get("attn2_patch", []):
            out = patch(n, context, value, pe=None, attn_mask=None, extra_options=self.options)
            n, context, value = out["q"], out["k"], out["v"]
        k, v = self._split(attn, attn.to_k(context)), self._split(attn, attn.to_v(value))
        return attn.to_out[1](attn.to_out[0](self._attended(q, k, v, attn.heads)))

    def _attended(self, *given: Any) -> Tensor:
        override = self.options.get("optimized_attention_override")
        if override is None:
            return _attend_heads(*given, skip_reshape=True)
        return override(_attend_heads, *given, skip_reshape=True)

    @staticmethod
    def _split(attn: Any, projected: Tensor) -> Tensor:
        return projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def _attend_heads(q: Tensor, k: Tensor, v: Tensor, _heads: int, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _FollowedLayer:
    """A cross-attention whose forward follows the parts itself."""

    def __init__(self, _number: int, options: dict[str, Any]) -> None:
        self.parts = options["parts"]

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        def forward(hidden: Tensor, context: Tensor) -> Tensor:
            given = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
            return attn.to_out[1](attn.to_out[0](_attend(*given, {"n_heads": attn.heads})))

        def seen(hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor, int]:
            return attn.to_q(hidden), attn.to_k(context), attn.heads

        return followed(forward, seen, self.parts, hidden_states, encoder_hidden_states)


def _host(
    backbone: Backbone,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    layer: Callable[[int, dict[str, Any]], Any] = _Layer,
) -> Callable[[dict[str, Any]], Tensor]:
    """A host's call of its U-Net with some transformer_options."""

    def run(options: dict[str, Any]) -> Tensor:
        unet: Any = backbone.unet
        before = dict(unet.attn_processors)
        names = [name for name in before if ".attn2." in name]
        layers = {name: layer(number, options) for number, name in enumerate(names)}
        try:
            unet.set_attn_processor({**before, **layers})
            return backbone.predict(x, timestep, context)
        finally:
            unet.set_attn_processor(before)

    return run


class _Case:
    """A batch of two pictures of one prompt, without and with it, on a net with an adapter."""

    def __init__(self, backbone: Backbone, prompt: str = PROMPTS[0]) -> None:
        self.backbone = backbone
        generator = torch.Generator().manual_seed(4)
        words = {
            token: backbone.word_start(noun, generator, 2)
            + torch.randn(1, backbone.word_width, generator=generator) * 0.02
            for token, noun in NOUNS.items()
        }
        self.text = FrozenText(backbone, words)
        scene = mentions(prompt, NOUNS)
        assert isinstance(scene, Mentions)
        self.mentions = scene
        self.scene = SceneText(
            scene.tokens,
            self.text([prompt]),
            self.text([scene.neutral]),
            tuple(self.text([own]) for own in scene.own),
            noun_mask(backbone, scene),
        )
        self.encoded = self.scene.whole  # what the host has of the prompt
        self.x = torch.randn(2, 4, 8, 12, generator=generator)
        self.timestep = torch.tensor([600, 600])
        self.unwanted = self.text(["blurry"])

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the host calls its U-Net with: x, timestep, context."""
        context = torch.cat([self.unwanted.expand(2, -1, -1), self.encoded.expand(2, -1, -1)])
        return torch.cat([self.x] * 2), torch.cat([self.timestep] * 2), context

    def by_patches(
        self, areas: HostAreas, steps: int = 2, options: dict[str, Any] | None = None
    ) -> Tensor:
        return self.by(areas, _Layer, lambda parts: patched(options or {}, parts, _attend), steps)

    def by(
        self,
        areas: HostAreas,
        layer: Callable[[int, dict[str, Any]], Any],
        options: Callable[[Sequence[Part]], dict[str, Any]],
        steps: int = 2,
    ) -> Tensor:
        """As a host draws it whose layers are of this kind and have these options."""
        x, timestep, both = self.batch()
        run, output = _host(self.backbone, x, timestep, both, layer), x
        for _ in range(steps):
            output = areas.call(
                [None, ("id", self.scene)], x, both, lambda parts: run(options(parts))
            )
        return output

    def by_processors(self, steps: int = 2, masks: Tensor | None = None) -> Tensor:
        scenes = [self.mentions] * 2
        arguments = (self.backbone, self.text, scenes, (8, 12), AreaSettings(), masks)
        with drawn_together(*arguments) as together:
            output = self.x
            for _ in range(steps):
                unwanted = self.unwanted.expand(2, -1, -1)
                output = together.predict(self.x, self.timestep, unwanted)
        return output


@pytest.fixture
def net(backbone: Backbone) -> Any:
    with torch.no_grad(), attached(backbone, random_adapter(backbone, "lora", 1)):
        yield backbone


def _areas(masks: Tensor | None = None) -> HostAreas:
    return HostAreas(AreaSettings(), masks)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_other_ways_to_follow_draw_the_same(net: Backbone, prompt: str) -> None:
    """By a function that computes all attention, which another extension has, too, and by forwards."""
    case, counted = _Case(net, prompt), []

    def foreign(attend: Any, *given: Any, **named: Any) -> Tensor:
        counted.append(named["skip_reshape"])
        return attend(*given, **named)

    wanted = case.by_processors()
    options = {"optimized_attention_override": foreign}
    by_override = case.by(_areas(), _AnimaLayer, lambda parts: patched_anima(options, parts))
    assert torch.allclose(by_override, wanted, atol=1e-4)
    assert all(counted)
    assert counted
    by_forwards = case.by(_areas(), _FollowedLayer, lambda parts: {"parts": parts})
    assert torch.allclose(by_forwards, wanted, atol=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_patches_and_processors_draw_the_same(net: Backbone, prompt: str) -> None:
    case, areas = _Case(net, prompt), _areas()
    assert torch.allclose(case.by_patches(areas), case.by_processors(), atol=1e-4)
    assert [tuple(one.shape) for one in areas.found] == [(2, len(case.scene.tokens), 8, 12)]
    areas.start()
    assert areas.found == []


def test_given_masks_are_used_whatever_their_size(net: Backbone) -> None:
    masks = torch.zeros(2, 3, 5)
    masks[0, :, :3] = masks[1, :, 3:] = 1
    case = _Case(net)
    given = case.by_processors(masks=masks[None])
    assert torch.allclose(case.by_patches(_areas(masks)), given, atol=1e-4)
    assert not torch.allclose(given, case.by_processors(), atol=1e-3)


def test_a_part_of_the_picture_has_its_part_of_the_masks(net: Backbone) -> None:
    """Of latents twice as wide, whose right half the prompt is for."""
    masks = torch.zeros(2, 1, 4)
    masks[0, :, :3] = masks[1, :, 3:] = 1
    case, areas = _Case(net), _areas(masks)
    height, width = case.x.shape[-2:]
    key = "a part"
    areas.places[key] = Place((height, 2 * width), slice(None), slice(width, None))
    context = case.scene.whole.expand(len(case.x), -1, -1)
    seen: list[Tensor] = []

    def run(parts: Sequence[Part]) -> Tensor:
        seen.extend(part.areas.at(height * width) for part in parts)
        return case.x

    areas.call([(key, case.scene)], case.x, context, run)
    (left,) = (one[0].unflatten(1, (height, width)) for one in seen)
    assert torch.equal(left[0, :, 0], torch.ones(height))
    assert torch.equal(left[1, :, -1], torch.ones(height))
    (found,) = areas.found
    assert found.shape == (1, 2, height, 2 * width)
    assert found[..., :width].count_nonzero() == 0
    assert torch.allclose(found[0, :, :, width:], left)


@pytest.mark.parametrize("what", ["changed", "too many masks", "no noun"])
def test_what_can_t_be_kept_apart_is_drawn_the_plain_way_and_said_once(
    net: Backbone, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    case, areas = _Case(net), _areas(torch.ones(3, 4, 4) if what == "too many masks" else None)
    scene = case.scene
    if what == "changed":
        case.encoded = 1.01 * scene.whole
    if what == "no noun":
        nouns = scene.nouns.clone()
        nouns[1] = 0
        case.scene = replace(scene, nouns=nouns)
    drawn = case.by_patches(areas)
    assert torch.allclose(drawn, net.predict(*case.batch()), atol=1e-4)
    said = {
        "changed": "their prompt was changed after it was encoded",
        "too many masks": "3 masks were given for 2 things",
        "no noun": "the noun of V2 was not found in the prompt",
    }[what]
    assert [said in record.getMessage() for record in caplog.records] == [True]


def _alone(backbone: Backbone, case: _Case, context: Tensor, scene: SceneText) -> Tensor:
    """The prompt's pictures, drawn by areas from a context (1, t, d)."""
    context = context.expand(2, -1, -1)
    run, areas = _host(backbone, case.x, case.timestep, context), _areas()
    return areas.call(
        [("id", scene)], case.x, context, lambda parts: run(patched({}, parts, _attend))
    )


def test_text_that_was_added_to_a_prompt_is_drawn_too(net: Backbone) -> None:
    """As ComfyUI's Conditioning (Concat) does it; a host may then repeat the whole."""
    case = _Case(net)
    added, other = case.text(["at night"]), case.text(["in watercolour"])
    longer = torch.cat([case.scene.whole, added], 1)
    with_added = replace(
        case.scene,
        whole=longer,
        neutral=torch.cat([case.scene.neutral, added], 1),
        own=tuple(torch.cat([own, added], 1) for own in case.scene.own),
        nouns=F.pad(case.scene.nouns, (0, added.shape[1])),
    )
    expected = _alone(net, case, longer, with_added)
    assert torch.allclose(_alone(net, case, longer, case.scene), expected, atol=1e-5)
    assert torch.allclose(
        _alone(net, case, longer.repeat(1, 3, 1), case.scene), expected, atol=1e-4
    )
    without = _alone(net, case, case.scene.whole, case.scene)
    assert not torch.allclose(expected, without, atol=1e-3)
    otherwise = torch.cat([case.scene.whole, other], 1)
    assert not torch.allclose(_alone(net, case, otherwise, case.scene), expected, atol=1e-3)


def test_a_context_that_repeats_the_prompt_adds_nothing(net: Backbone) -> None:
    scene = _Case(net).scene
    assert scene.within(scene.whole.repeat(2, 3, 1)) is scene
    assert scene.within(scene.whole.half().repeat(1, 2, 1)) is scene
    assert scene.within(torch.cat([scene.whole, scene.own[0]])) is None
    assert scene.within(torch.cat([scene.own[0], scene.whole], 1)) is None


def test_other_extensions_patches_stay_in_force(net: Backbone) -> None:
    """One that scales what a layer attends to, for the whole batch, and one that changes context."""
    case, calls = _Case(net), []

    def scaled(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        calls.append(len(q))
        return 0.5 * _attend(q, k, v, options)

    def context(n: Tensor, context: Tensor, value: Tensor, _: Any) -> tuple[Tensor, ...]:
        return n, context, 2 * value

    plain = _areas()
    expected = case.by_patches(plain)
    layers = {("input", number): scaled for number in range(40)}
    options = {"patches": {"attn2_patch": [context]}, "patches_replace": {"attn2": layers}}
    areas = _areas()
    changed = case.by_patches(areas, options=options)
    assert set(calls) == {4}
    assert not torch.allclose(changed, expected, atol=1e-2)
    assert options["patches"]["attn2_patch"] == [context]
    assert set(options["patches_replace"]["attn2"]) == set(layers)
