"""Several learned things in one prompt of AUTOMATIC1111, reForge, Forge or Forge Neo, each in the area
where its noun is. Only these import this module.

    words and nouns     of the LoRAs that a generation uses, from their metadata
    prompts             wherever the web UI encodes one that names two of them, its `SceneText` is kept
    U-Net               rows of a batch whose context is a known `SceneText`'s are drawn by areas
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modules import (  # pyright: ignore[reportMissingImports] - only inside the web UI
    prompt_parser,
    shared,
)
from modules.prompt_parser import SdConditioning  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ..areas import FINE, AreaSettings, attend, mask_of
from ..hostareas import HostAreas, Part, SceneText, followed, patched, warn
from ..mentions import (
    Mentions,
    mentions,
    named,
    noun_positions,
)
from ..presets import PLAIN_NAME_PRESETS
from .loras import words_of
from .tokens import notes

OPTION = "continual_lora_apart"
INFOTEXT = "Concepts kept apart"
_OTHER_KIND = (
    "The LoRA of {} is for another kind of checkpoint than the one in use, so nothing is kept apart. "
    "Choose the checkpoint that it was learned on."
)


class Apart:
    """What is known from one generation to the next: the web UI keeps encoded prompts, too. And its
    model, so that what a generation that failed left of it is undone even after "Reload UI".
    """

    def __init__(self) -> None:
        self.scenes: deque[SceneText] = deque(maxlen=64)
        self.areas = HostAreas(AreaSettings())
        self.things: list[str] = []  # that the prompts of this batch name, if they are kept apart
        self.preset = "sd1"  # the kind of checkpoint that they were learned on
        self.undo: list[Callable[[], object]] = []

    def begin(self, p: Any) -> None:
        """Before the prompts of a batch are encoded."""
        self.end()
        p.extra_generation_params.pop(INFOTEXT, None)  # of the batch before
        nouns, preset = words_in_use()
        prompts = [*p.prompts, *(getattr(p, "hr_prompts", None) or [])]
        if nouns:
            unwanted = [*p.negative_prompts, *(getattr(p, "hr_negative_prompts", None) or [])]
            read_as = None if preset in PLAIN_NAME_PRESETS else _embeddings
            for note in notes([*prompts, *unwanted], nouns, read_as):
                _tell(p, note)
        if not getattr(shared.opts, OPTION, True) or not any(
            mentions(one, nouns) for one in prompts
        ):
            return
        if not _is_for(p.sd_model, preset):
            _tell(p, _OTHER_KIND.format(", ".join(named(prompts, nouns))))
            return
        self._encode_scenes(nouns, preset)
        encode_again(p, "cached_c", "cached_hr_c")  # their scenes were not kept
        self.areas = HostAreas(AreaSettings(FINE[preset]))
        self.things, self.preset = named(prompts, nouns), preset

    def before_sampling(self, p: Any) -> None:
        """Before each pass: the second one has other latents."""
        if not self.things:
            return
        self.areas.start()
        if not _is_for(p.sd_model, self.preset):  # of the second pass
            _tell(p, _OTHER_KIND.format(", ".join(self.things)))
            return
        if objects := getattr(p.sd_model, "forge_objects", None):
            objects.unet = self._forge_unet(objects.unet)
        else:
            self._follow(p.sd_model.model.diffusion_model)

    def finish(self, p: Any) -> None:
        """After a batch: the infotext says so if its things were kept apart."""
        if self.things and self.areas.found:
            p.extra_generation_params[INFOTEXT] = ", ".join(self.things)
        self.end()

    def end(self) -> None:
        """Leave the model as it was; also before the next batch, if something went wrong."""
        while self.undo:
            self.undo.pop()()
        self.things = []

    # --- prompts ----------------------------------------------------------------------------------

    def _encode_scenes(self, nouns: Mapping[str, str], preset: str) -> None:
        """Keep the `SceneText` of each prompt that is encoded until `end`, by whichever model: the
        second pass may have another, which is loaded after the first one.
        """
        encode_prompts = prompt_parser.get_learned_conditioning

        def encode(model: Any, *prompts: Any, **named: Any) -> Any:
            if not _is_for(model, preset):
                return encode_prompts(model, *prompts, **named)
            with self._scenes_kept(model, nouns):
                return encode_prompts(model, *prompts, **named)

        self.undo.append(_replaced(prompt_parser, "get_learned_conditioning", encode))

    @contextmanager
    def _scenes_kept(self, model: Any, nouns: Mapping[str, str]) -> Iterator[None]:
        """Inside the block the `SceneText` of each prompt that the model encodes is kept."""
        encode = model.get_learned_conditioning

        def encode_scenes(texts: Any) -> Any:
            encoded = encode(texts)
            if not getattr(texts, "is_negative_prompt", False):
                for text, features in zip(texts, _crossattn(encoded), strict=True):
                    if scene := mentions(text, nouns):
                        variants = SdConditioning([scene.neutral, *scene.own], copy_from=texts)
                        with _infotext_kept():
                            others = _crossattn(encode(variants))
                        self.scenes.append(_scene_text(model, scene, [features, *others]))
            return encoded

        undo = _replaced(model, "get_learned_conditioning", encode_scenes)
        try:
            yield
        finally:
            undo()

    def _scenes_of(self, context: Tensor) -> list[tuple[Any, SceneText] | None]:
        """What each row of a context (n, t, d) is drawn from, if that is known."""
        found: list[tuple[Any, SceneText] | None] = []
        for number in range(len(context)):
            row = context[number : number + 1]
            known = [one for one in reversed(self.scenes) if one.within(row)]
            # a prompt may begin with another one
            scene = max(known, key=lambda one: one.whole.shape[1], default=None)
            found.append(((number, id(scene)), scene) if scene else None)
        return found

    # --- the U-Net --------------------------------------------------------------------------------

    def _forge_unet(self, unet: Any) -> Any:
        """A copy of Forge's U-Net, or of Forge Neo's Anima, that draws by areas."""
        copied = unet.clone()
        before = copied.model_options.get("model_function_wrapper")
        parts_now: list[Part] = []
        is_anima = self._follow_layers(copied.model.diffusion_model, "cross_attn", parts_now)

        def call(apply_model: Callable[..., Tensor], asked: dict[str, Any]) -> Tensor:
            c = asked["c"]

            def run(parts: Sequence[Part]) -> Tensor:
                options = c.get("transformer_options", {})
                if not is_anima:
                    options = patched(options, parts, _attend)
                chosen = {**c, "transformer_options": options}
                if control := c.get("control"):  # the net takes what it uses out of these lists
                    chosen["control"] = {key: list(value) for key, value in control.items()}
                with _followed_in(parts_now, parts):
                    if before:
                        return before(apply_model, {**asked, "c": chosen})
                    return apply_model(asked["input"], asked["timestep"], **chosen)

            context = c["c_crossattn"].flatten(1, -2)  # Anima's has a dimension more
            return self.areas.call(self._scenes_of(context), asked["input"], context, run)

        copied.set_model_unet_function_wrapper(call)
        return copied

    def _follow(self, unet: Any) -> None:
        """Have AUTOMATIC1111's U-Net draw by areas until `end`."""
        parts_now: list[Part] = []
        self._follow_layers(unet, "attn2", parts_now)
        forward = unet.forward

        def call(
            x: Tensor, timesteps: Any = None, context: Any = None, *more: Any, **named: Any
        ) -> Any:
            def run(parts: Sequence[Part]) -> Tensor:
                with _followed_in(parts_now, parts):
                    return forward(x, timesteps, context, *more, **named)

            return self.areas.call(self._scenes_of(context), x, context, run)

        self.undo.append(_replaced(unet, "forward", call))

    def _follow_layers(self, net: Any, name: str, parts_now: Sequence[Part]) -> bool:
        """Have the net's layers of this name follow the parts until `end`; whether it has any."""
        while len(self.undo) > 1:  # those of an earlier pass
            self.undo.pop()()
        layers = [layer for path, layer in net.named_modules() if path.endswith(f".{name}")]
        for layer in layers:
            self.undo.append(_replaced(layer, "forward", _follower(layer, parts_now)))
        return bool(layers)


APART = Apart()  # of this process


def _replaced(holder: Any, name: str, value: object) -> Callable[[], None]:
    """Set an attribute of a module or a model; what is returned sets it back."""
    before = holder.__dict__.get(name)
    setattr(holder, name, value)

    def undo() -> None:
        if before is None:
            holder.__dict__.pop(name, None)
        else:
            setattr(holder, name, before)

    return undo


def _follower(layer: Any, parts: Sequence[Part]) -> Callable[..., Tensor]:
    """A cross-attention's forward that follows the parts of the call that runs."""
    forward = layer.forward

    def seen(hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor, int]:
        if hasattr(layer, "compute_qkv"):  # Anima's; they are (n, places, heads, d)
            query, key, _ = layer.compute_qkv(hidden, context)
            return query.flatten(2), key.flatten(2), layer.n_heads
        return layer.to_q(hidden), layer.to_k(context), layer.heads

    def follow(x: Tensor, context: Any = None, *more: Any, **named: Any) -> Tensor:
        if not parts or more or named.get("mask") is not None:
            return forward(x, context, *more, **named)

        def plain(hidden: Tensor, text: Tensor) -> Tensor:
            return forward(hidden, context=text, **named)

        return followed(plain, seen, parts, x, context)

    return follow


@contextmanager
def _followed_in(parts_now: list[Part], parts: Sequence[Part]) -> Iterator[None]:
    """Inside the block the layers with this list follow these parts."""
    parts_now[:] = parts
    try:
        yield
    finally:
        parts_now.clear()


def _attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    for name in ("backend.attention", "ldm_patched.ldm.modules.attention"):
        if module := sys.modules.get(name):
            attention = getattr(module, "attention_function", None) or module.optimized_attention
            return attention(q, k, v, options["n_heads"])
    return attend(q, k, v, options["n_heads"])


def encode_again(processing: Any, *caches: str) -> None:
    """Have the web UI forget prompts that it keeps encoded from one generation to the next.

    A cache has two places, or three: Forge keeps the infotext of the prompts beside them.
    """
    for name in caches:
        if cache := getattr(processing, name, None):
            cache[:] = [None] * len(cache)


def _tell(p: Any, note: str) -> None:
    p.comment(note)  # shown under the picture, but not to users of the API
    warn(note)


# --- words and their places ----------------------------------------------------------------------


def _is_for(model: Any, preset: str) -> bool:
    """Whether a web UI's model is of the kind that a LoRA of this preset is for, as far as its text is
    concerned: where a prompt's words are in other models' text features is not known here.
    """
    if preset == "anima":
        return hasattr(model, "text_processing_engine_anima")
    return not hasattr(model, "text_processing_engine_t5") and _text_engine(model) is not None


def _embeddings() -> Iterator[str]:
    """The names of the web UI's embeddings, ours and others."""
    return (path.stem for path in Path(shared.cmd_opts.embeddings_dir).rglob("*.*"))


def words_in_use() -> tuple[dict[str, str], str]:
    """The class nouns of the words of all LoRAs that are loaded, by the names of their embeddings, and
    the kind of checkpoint they are for.
    """
    nouns: dict[str, str] = {}
    preset = "sd1"
    for network in getattr(sys.modules.get("networks"), "loaded_networks", []):
        own, of = words_of(Path(getattr(network.network_on_disk, "filename", "")))
        if own and of in FINE:
            nouns, preset = {**nouns, **own}, of
    return nouns, preset


def _crossattn(encoded: Any) -> list[Tensor]:
    """The text features of each prompt, (1, t, d)."""
    features = encoded["crossattn"] if isinstance(encoded, dict) else encoded
    if isinstance(features, list):  # Anima's
        return features
    return list(features.split(1))


def _scene_text(model: Any, scene: Mentions, texts: Sequence[Tensor]) -> SceneText:
    """`texts`: features of the whole prompt, of the neutral one and of each concept's own."""
    whole, neutral, *own = texts
    if engine := getattr(model, "text_processing_engine_anima", None):
        ids = [
            int(token) for chunk in engine.tokenize_line(scene.neutral) for token in chunk.t5_tokens
        ]
        positions = noun_positions(scene, ids, lambda noun: engine.tokenize([noun])[1][0])
    else:
        engine = _text_engine(model)
        chunks, _ = engine.tokenize_line(scene.neutral)
        ids = [int(token) for chunk in chunks for token in chunk.tokens]
        positions = noun_positions(scene, ids, lambda noun: engine.tokenize([noun])[0])
    nouns = mask_of(positions, neutral.shape[1])
    return SceneText(scene.tokens, whole, neutral, tuple(own), nouns)


@contextmanager
def _infotext_kept() -> Iterator[None]:
    """A web UI lists the words of all it encodes in the infotext; inside the block it does not."""
    kept = [(shown, dict(shown)) for shown in _infotexts()]
    try:
        yield
    finally:
        for shown, before in kept:
            shown.clear()
            shown.update(before)


def _infotexts() -> Iterator[dict[str, Any]]:
    """Where a web UI notes what goes into the infotext while it encodes prompts."""
    module = sys.modules.get
    hijack = getattr(module("modules.sd_hijack"), "model_hijack", None)
    neo = getattr(module("backend.args"), "dynamic_args", None)
    for holder, name in (
        (hijack, "extra_generation_params"),  # AUTOMATIC1111, reForge
        (module("backend.text_processing.classic_engine"), "last_extra_generation_params"),  # Forge
        (neo, "last_extra_generation_params"),
    ):
        if isinstance(shown := getattr(holder, name, None), dict):
            yield shown


def _text_engine(model: Any) -> Any:
    """The first text encoder with its tokenizer; None for a model that has no CLIP-L or CLIP-H."""
    for name in ("text_processing_engine", "text_processing_engine_l", "cond_stage_model"):
        if hasattr(engine := getattr(model, name, None), "tokenize_line"):
            return engine
    embedders = getattr(getattr(model, "conditioner", None), "embedders", [None])
    return embedders[0]
