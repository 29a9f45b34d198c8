"""Learned words in ComfyUI's prompts: a CLIP that understands them. Only ComfyUI imports this module."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import StackError

if TYPE_CHECKING:
    from torch import Tensor

# as ComfyUI calls those of SD1, SD2 and SDXL, in the order of a word's vector
TEXT_ENCODERS = ("clip_l", "clip_h", "clip_g")


def with_words(clip: Any, words: Mapping[str, Tensor]) -> Any:
    """A copy of a CLIP that understands the learned words wherever they stand in a prompt, weights
    and all.

    ComfyUI knows such words as "embedding:NAME" with a file for each; here the prompt is rewritten
    so, and the vectors come from the stack.
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
            "This CLIP has no CLIP text encoder, so it can't take the stack's words. Use the "
            "CLIP of the stack's own checkpoint."
        )
    widths = [tokenizer.embedding_size for tokenizer in inner.values()]
    if (long := next(iter(words.values())).shape[1]) != sum(widths):
        raise StackError(
            f"The vectors of the stack's words have {long} numbers, this CLIP's {sum(widths)}: "
            "they belong to another kind of checkpoint."
        )
    pattern = re.compile(
        rf"(?<!\w)(?<!embedding:)({'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE
    )
    parts = {token.lower(): word.split(widths, 1) for token, word in words.items()}
    done = clip.clone()
    done.tokenizer = copy.copy(clip.tokenizer)
    for number, (name, tokenizer) in enumerate(inner.items()):
        setattr(
            done.tokenizer,
            name,
            _knowing(tokenizer, pattern, {token: part[number] for token, part in parts.items()}),
        )
    return done


def _knowing(tokenizer: Any, pattern: re.Pattern[str], known: Mapping[str, Tensor]) -> Any:
    """A copy of one text encoder's tokenizer for which the words that match `pattern` stand for
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
            if name.lower() not in known:
                return embedding
            return (known[name.lower()], *embedding[1:-1], leftover)

    knowing = copy.copy(tokenizer)
    knowing.__class__ = Words
    knowing.embedding_directory = knowing.embedding_directory or []
    return knowing
