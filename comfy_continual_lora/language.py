"""Stage 4: a wide sample of language - what an adapter must leave alone is more than a list of words.

A solve that holds a list of words alone moves what it takes from them into directions of text space
that no listed word uses, which other words do use. So most of the ordinary moment comes from what the
checkpoint itself can be told, words and tokens of its tokenizer's vocabulary, and some of it from
every direction there is (`textspace.shrunk`).

in: a tokenizer - out: prompts, the same for the same tokenizer. `textspace.ordinary_prompts` has the
rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from .presets import TEMPLATES

# More change the leak into words in no list little: benchmarks/LOG.md, 2026-11-28.
PROMPTS = 1024
LANGUAGE = 0.9  # their share of all ordinary prompts
SEED = 2410

STYLES = (
    "oil painting",
    "watercolor",
    "pencil sketch",
    "3d render",
    "anime screencap",
    "line art",
    "pixel art",
    "comic book page",
    "polaroid",
    "macro shot",
    "aerial view",
    "stained glass",
    "low poly",
    "ukiyo-e",
    "impressionism",
    "cyberpunk",
    "art nouveau",
    "concept art, trending on artstation",
)
# as users of checkpoints trained on tagged anime pictures write them
TAGS = (
    "masterpiece",
    "best quality",
    "highres",
    "absurdres",
    "1girl",
    "1boy",
    "2girls",
    "solo",
    "looking at viewer",
    "long hair",
    "short hair",
    "blue eyes",
    "smile",
    "full body",
    "upper body",
    "outdoors",
    "indoors",
    "simple background",
    "white background",
    "from behind",
    "from above",
    "sitting",
    "standing",
    "school uniform",
    "no humans",
    "depth of field",
    "cowboy shot",
    "monochrome",
    "chibi",
    "official art",
)
NEGATIVE = (
    "worst quality",
    "low quality",
    "normal quality",
    "lowres",
    "bad anatomy",
    "bad hands",
    "missing fingers",
    "extra digit",
    "fewer digits",
    "cropped",
    "jpeg artifacts",
    "signature",
    "watermark",
    "username",
    "blurry",
    "text",
    "error",
    "deformed",
    "ugly",
    "mutated hands",
    "out of frame",
    "duplicate",
    "poorly drawn face",
    "extra limbs",
    "disfigured",
    "bad proportions",
)
FORMS = (
    *TEMPLATES,
    "a {} in the {}",
    "a {} with a {}",
    "the {} of a {}",
    "a {} and a {}",
    "a {} on a {}",
    "portrait of {}",
    "two {} near the {}",
    "a {} made of {}",
    "{} by {}",
    "{}, {} style",
)
MAX_TOKENS = 75  # a prompt's, without its start and end


def language_prompts(tokenizer: Any, count: int = PROMPTS) -> list[str]:
    """`count` prompts that name no concept: sentences, tags, negative prompts, and single tokens in
    a row, of 1 to 75 tokens.

    Words are drawn evenly from the whole words of the tokenizer's vocabulary, tokens from all of it.
    """
    rng = random.Random(SEED)
    vocabulary = tokenizer.get_vocab()
    words = _whole_words(vocabulary)
    special = set(tokenizer.all_special_ids)
    tokens = sorted(number for number in vocabulary.values() if number not in special)

    def phrase() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.choice((1, 1, 2, 2, 3))))

    def sentence() -> str:
        form = rng.choice(FORMS)
        text = form.format(*(phrase() for _ in range(form.count("{}"))))
        return f"{text}, {rng.choice(STYLES)}" if rng.random() < 0.3 else text

    def tags() -> str:
        number = rng.randint(2, 30)
        return ", ".join(
            rng.choice(TAGS) if rng.random() < 0.4 else phrase() for _ in range(number)
        )

    def negative() -> str:
        return ", ".join(rng.sample(NEGATIVE, rng.randint(1, len(NEGATIVE))))

    def tokens_in_a_row() -> str:
        return tokenizer.decode(rng.choices(tokens, k=rng.randint(1, MAX_TOKENS)))

    kinds: Sequence[Callable[[], str]] = (sentence, tags, negative, tokens_in_a_row)
    chosen = rng.choices(kinds, weights=(3, 2, 1, 4), k=count)
    return [make() for make in chosen]


def _whole_words(vocabulary: dict[str, int]) -> list[str]:
    """Words of three letters or more that are one token, in order: CLIP marks where they end, T5 where
    they begin.
    """
    words = (
        token.removesuffix("</w>").removeprefix("▁")
        for token in vocabulary
        if token.endswith("</w>") or token.startswith("▁")
    )
    return sorted(word for word in words if len(word) > 2 and word.isascii() and word.isalpha())
