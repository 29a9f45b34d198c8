"""Learned words in ComfyUI's prompts: a CLIP that understands them, and that says of a prompt with
several learned things what each is drawn from. Only ComfyUI imports this module.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..areas import mask_of
from ..errors import StackError
from ..hostareas import SceneText
from ..mentions import (
    EMBEDDING,
    Mentions,
    mentions,
    not_learned,
    noun_positions,
    unknown_words,
    whole_words,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# ComfyUI's names for those of SD1, SD2 and SDXL, in the order of a word's vector
TEXT_ENCODERS = ("clip_l", "clip_h", "clip_g")
ANIMA_ENCODER = "t5xxl"  # whose tokens are the positions of Anima's text features
KEY = "continual_lora"  # of a `SceneText` or a `SceneStates` in a conditioning


@dataclass(frozen=True, eq=False)
class SceneStates:
    """What a prompt about several learned things is drawn from on Anima, whose conditioner is a part of
    MODEL: what CLIP gave for the whole prompt, the neutral one and each concept's own; `nouns`:
    positions of each concept's nouns in the neutral one.
    """

    tokens: tuple[str, ...]
    encoded: tuple[dict[str, Any], ...]
    nouns: list[list[int]]

    def text(self, model: Any, device: torch.device) -> SceneText:
        """Text features by the conditioner of a ComfyUI model, as its `extra_conds` makes them."""
        dtype = model.get_dtype_inference()
        whole, neutral, *own = (
            model.diffusion_model.preprocess_text_embeds(
                one["cond"].to(device=device, dtype=dtype),
                one["t5xxl_ids"][None].to(device),
                one["t5xxl_weights"][None, :, None].to(one["cond"]).to(device=device, dtype=dtype),
            )
            for one in self.encoded
        )
        nouns = mask_of(self.nouns, neutral.shape[1])
        return SceneText(self.tokens, whole, neutral, tuple(own), nouns)


def with_words(
    clip: Any, words: Mapping[str, Tensor], nouns: Mapping[str, str] | None = None
) -> Any:
    """A copy of a CLIP that understands the learned words anywhere in a prompt, including inside
    weights. With `nouns`, the class noun of each word, prompts that name several get a `SceneText`.

    ComfyUI writes such words as "embedding:NAME", with a file for each; here the prompt is rewritten
    that way, and the vectors come from the stack.
    """
    if not words:
        return clip
    inner = {
        name: getattr(clip.tokenizer, name)
        for name in TEXT_ENCODERS
        if hasattr(clip.tokenizer, name)
    }
    if not inner:
        raise StackError(
            "This CLIP has no CLIP text encoder, so it can't use the stack's words. Use the CLIP "
            "of the stack's own checkpoint."
        )
    widths = [tokenizer.embedding_size for tokenizer in inner.values()]
    if (width := next(iter(words.values())).shape[1]) != sum(widths):
        raise StackError(
            f"The vectors of the stack's words have {width} numbers, this CLIP's {sum(widths)}: "
            "they belong to another kind of checkpoint. Use the CLIP of the stack's own checkpoint."
        )
    whole = whole_words(words)
    pattern = re.compile(f"{EMBEDDING}|{whole.pattern}", whole.flags)
    parts = {token: word.split(widths, 1) for token, word in words.items()}
    extended = clip.clone()
    extended.tokenizer = copy.copy(clip.tokenizer)
    for number, (name, tokenizer) in enumerate(inner.items()):
        vectors = {token: part[number] for token, part in parts.items()}
        setattr(extended.tokenizer, name, _extended(tokenizer, pattern, vectors))
    return _scenes_told(extended, next(iter(inner)), words, nouns)


def with_names(clip: Any, names: Sequence[str], nouns: Mapping[str, str] | None = None) -> Any:
    """A copy of Anima's CLIP, to which learned words are plain text. With `nouns`, the class noun of
    each, prompts that name several get a `SceneStates`.
    """
    if not names:
        return clip
    if not hasattr(clip.tokenizer, ANIMA_ENCODER):
        raise StackError(
            "This CLIP is not Anima's. Load qwen_3_06b_base.safetensors with Load CLIP, type "
            "stable_diffusion."
        )
    extended = clip.clone()
    extended.tokenizer = copy.copy(clip.tokenizer)
    return _scenes_told(extended, ANIMA_ENCODER, names, nouns)


def _scenes_told(
    clip: Any, encoder: str, words: Iterable[str], nouns: Mapping[str, str] | None
) -> Any:
    """`clip`, a copy with a tokenizer of its own, that tells of scenes with things of these nouns;
    `encoder`: the text encoder whose tokens are the positions of text features.
    """
    _tell_of_taken(words, getattr(clip.tokenizer, "learned_words", ()))
    known = {**getattr(clip, "learned_nouns", {}), **nouns} if nouns else {}
    clip.tokenizer = _with_scenes(clip.tokenizer, encoder, words, known)
    if nouns:
        clip.learned_nouns = known
        clip.__class__ = _clip_with_scenes(type(clip))
    return clip


def _extended(tokenizer: Any, pattern: re.Pattern[str], vectors: Mapping[str, Tensor]) -> Any:
    """A copy of one text encoder's tokenizer in which the words that are group 1 of `pattern` stand
    for vectors (k, d).
    """

    def as_embedding(match: re.Match[str]) -> str:
        return f" embedding:{match[1]} " if match[1] else match[0]

    class Words(type(tokenizer)):
        def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
            return super().tokenize_with_weights(pattern.sub(as_embedding, text), *args, **kwargs)

        def _try_get_embedding(self, embedding_name: str) -> Any:
            # (vectors, leftover); newer versions put the name between them
            embedding = super()._try_get_embedding(embedding_name)
            name, _, leftover = embedding_name.partition(" ")
            if name.lower() not in by_name:
                return embedding
            return (by_name[name.lower()], *embedding[1:-1], leftover)

    by_name = {token.lower(): vector for token, vector in vectors.items()}
    extended = copy.copy(tokenizer)
    extended.__class__ = Words
    extended.embedding_directory = extended.embedding_directory or []
    return extended


# --- several learned things in one prompt ---------------------------------------------------------


class _Tokens(list[Any]):
    """The tokens of one text encoder, with what they are of."""

    scene: Mentions
    nouns: list[list[int]]  # positions of each concept's nouns in the neutral prompt
    neutral: list[Any]
    own: list[list[Any]]


def _with_scenes(
    tokenizer: Any, encoder: str, words: Iterable[str], nouns: Mapping[str, str]
) -> Any:
    """A copy of a CLIP's tokenizer whose tokens of a prompt with several learned things are `_Tokens`;
    it tells of words that only look like learned ones.

    `encoder`: the name of one of its text encoders; `nouns`: none, to let looks mix.
    """

    class WithScenes(type(tokenizer)):
        def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
            def tokens_of(prompt: str) -> dict[str, Any]:
                return super(WithScenes, self).tokenize_with_weights(prompt, *args, **kwargs)

            if type(self) is WithScenes:  # else another stack's words were added after these
                _tell_of_unknown(text, self.learned_words)
            tokens, scene = tokens_of(text), mentions(text, known)
            if scene is None:
                return tokens
            neutral, own = tokens_of(scene.neutral), [tokens_of(one) for one in scene.own]
            entries = [token[0] for chunk in neutral[tokens_name] for token in chunk]
            ids = [entry if isinstance(entry, int) else -1 for entry in entries]
            positions = noun_positions(scene, ids, ids_of)
            for name, chunks in tokens.items():
                one = tokens[name] = _Tokens(chunks)
                one.scene, one.neutral, one.nouns = scene, neutral[name], positions
                one.own = [prompt[name] for prompt in own]
            return tokens

    plain = getattr(tokenizer, encoder)
    tokens_name = encoder.removeprefix("clip_")  # the tokens of clip_l are called l

    def ids_of(text: str) -> list[int]:
        return plain.tokenizer(text, add_special_tokens=False)["input_ids"]

    known = dict(nouns)
    extended = copy.copy(tokenizer)
    extended.__class__ = WithScenes
    extended.learned_words = (*getattr(tokenizer, "learned_words", ()), *words)
    return extended


def _tell_of_taken(words: Iterable[str], before: Iterable[str]) -> None:
    """Warn of words that the CLIP had from another node."""
    taken = {word.lower() for word in before}
    if again := [word for word in words if word.lower() in taken]:
        from .host import tell

        tell(
            f"This CLIP knows {' and '.join(again)} already, from an Apply Concepts before this one. "
            "Prompts mean what this one applies, with the LoRAs of both. Give one of two concepts "
            "another word, or apply a stack once."
        )


def _tell_of_unknown(text: str, words: Sequence[str]) -> None:
    """Warn at the node that encodes the prompt, and in the console."""
    if unknown := unknown_words([text], words):
        from .host import tell

        tell(not_learned(unknown, words))


@cache
def _clip_with_scenes(kind: type) -> type:
    """A kind of CLIP that encodes `_Tokens` with their `SceneText`; its copies do so too."""
    if hasattr(kind, "encodes_scenes"):
        return kind

    class WithScenes(kind):
        encodes_scenes = True

        def clone(self, *args: Any, **kwargs: Any) -> Any:
            copied = super().clone(*args, **kwargs)
            copied.__class__ = type(self)
            copied.learned_nouns = self.learned_nouns
            return copied

        def encode_from_tokens(
            self, tokens: Any, return_pooled: Any = False, return_dict: bool = False, **more: Any
        ) -> Any:
            def encoded(chosen: Any) -> Any:
                return super(WithScenes, self).encode_from_tokens(
                    chosen, return_pooled=return_pooled, return_dict=return_dict, **more
                )

            result, first = encoded(tokens), _scene_in(tokens)
            if not return_dict or first is None:
                return result
            others = [encoded(one) for one in _other_prompts(self.tokenizer, tokens)]
            return {**result, KEY: _scene_of(first, [result, *others])}

        def encode_from_tokens_scheduled(self, tokens: Any, *more: Any, **named: Any) -> Any:
            """ComfyUI encodes without `encode_from_tokens` where hooks change CLIP from one part of
            sampling to the next, a conditioning for each part.
            """

            def encoded(chosen: Any) -> Any:
                return super(WithScenes, self).encode_from_tokens_scheduled(chosen, *more, **named)

            parts = encoded(tokens)
            is_hooked = self.patcher.forced_hooks is not None and self.use_clip_schedule
            if not is_hooked or ANIMA_ENCODER in tokens or (first := _scene_in(tokens)) is None:
                return parts
            others = [encoded(one) for one in _other_prompts(self.tokenizer, tokens)]
            for part in zip(parts, *others, strict=True):
                part[0][1][KEY] = _scene_of(first, [{"cond": cond} for cond, _ in part])
            return parts

    return WithScenes


def _scene_in(tokens: Mapping[str, Any]) -> _Tokens | None:
    """What the first text encoder is given, if all are given prompts about the same learned things."""
    first = next((one for one in tokens.values() if isinstance(one, _Tokens)), None)
    if first is None:
        return None
    names = first.scene.tokens
    if all(isinstance(one, _Tokens) and one.scene.tokens == names for one in tokens.values()):
        return first
    from .host import tell

    tell(
        f"{' and '.join(names)} are drawn mixed, because not every text encoder is given a prompt that "
        "names them in this order. Write the same learned things into each."
    )
    return None


def _other_prompts(tokenizer: Any, tokens: Mapping[str, _Tokens]) -> list[dict[str, Any]]:
    """The tokens of the neutral prompt, then of each concept's own; as many chunks for each text
    encoder, as far as the longest prompt needs.
    """
    first = next(iter(tokens.values()))
    prompts = [
        {name: one.neutral for name, one in tokens.items()},
        *({name: one.own[k] for name, one in tokens.items()} for k in range(len(first.own))),
    ]
    empty: dict[str, Any] = {}
    for prompt in prompts:
        longest = max(map(len, prompt.values()))
        for name, chunks in prompt.items():
            if missing := longest - len(chunks):
                empty = empty or tokenizer.tokenize_with_weights("")
                prompt[name] = [*chunks, *empty[name] * missing]
    return prompts


def _scene_of(first: _Tokens, encoded: Sequence[dict[str, Any]]) -> SceneText | SceneStates:
    """`encoded`: what CLIP gives for the whole prompt, for the neutral one and for each concept's own."""
    names = first.scene.tokens
    if "t5xxl_ids" in encoded[0]:  # Anima's
        return SceneStates(names, tuple(encoded), first.nouns)
    whole, neutral, *own = (one["cond"] for one in encoded)
    return SceneText(names, whole, neutral, tuple(own), mask_of(first.nouns, neutral.shape[1]))
