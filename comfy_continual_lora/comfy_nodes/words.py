"""Learned words in ComfyUI's prompts: a CLIP that understands them. Only ComfyUI imports this module."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import StackError

if TYPE_CHECKING:
    from torch import Tensor

# ComfyUI's names for those of SD1, SD2 and SDXL, in the order of a word's vector
TEXT_ENCODERS = ("clip_l", "clip_h", "clip_g")


def with_words(clip: Any, words: Mapping[str, Tensor]) -> Any:
    """A copy of a CLIP that understands the learned words anywhere in a prompt, including inside
    weights.

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
    pattern = re.compile(
        rf"(?<!\w)(?<!embedding:)({'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE
    )
    parts = {token.lower(): word.split(widths, 1) for token, word in words.items()}
    extended = clip.clone()
    extended.tokenizer = copy.copy(clip.tokenizer)
    for number, (name, tokenizer) in enumerate(inner.items()):
        vectors = {token: part[number] for token, part in parts.items()}
        setattr(extended.tokenizer, name, _extended(tokenizer, pattern, vectors))
    return extended


def _extended(tokenizer: Any, pattern: re.Pattern[str], vectors: Mapping[str, Tensor]) -> Any:
    """A copy of one text encoder's tokenizer in which the words that match `pattern` stand for
    vectors (k, d).
    """

    class Words(type(tokenizer)):
        def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
            return super().tokenize_with_weights(
                pattern.sub(r" embedding:\1 ", text), *args, **kwargs
            )

        def _try_get_embedding(self, embedding_name: str) -> Any:
            # (vectors, leftover); newer versions put the name between them
            embedding = super()._try_get_embedding(embedding_name)
            name, _, leftover = embedding_name.partition(" ")
            if name.lower() not in vectors:
                return embedding
            return (vectors[name.lower()], *embedding[1:-1], leftover)

    extended = copy.copy(tokenizer)
    extended.__class__ = Words
    extended.embedding_directory = extended.embedding_directory or []
    return extended
