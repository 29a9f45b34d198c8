"""Stage 8: the syntax of prompts that are drawn: weights, BREAK, and chunks of 75 tokens. Light.

    (word)        1.1 times the weight         (word:1.3)   1.3 times
    [word]        1 / 1.1 times                \\( \\) \\[ \\]  brackets themselves
    BREAK         what follows begins a chunk

in: a prompt - out: its texts with their weights, and its tokens in chunks. A text encoder takes 75
tokens between start and end; longer prompts are encoded a chunk at a time, and cross-attention sees
all chunks. Captions that are learned from are not read this way: their brackets are text.

Source: AUTOMATIC1111's wiki, Features, "Attention/emphasis", "Infinite prompt length" and "BREAK
keyword"; modules/prompt_parser.py and modules/sd_hijack_clip.py of its 1.10, with default options.
A BREAK within brackets ends a chunk here, where it is read as a word there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import SettingError, excerpt

CHUNK = 75  # tokens between start and end
BACKTRACK = 20  # what follows a comma so close to a chunk's end goes into the next one
STRONGER = 1.1
DEEPEST = 100  # brackets in brackets
_MARKS = re.compile(
    r"\\[\\()\[\]]?"  # a backslash takes the meaning from what follows
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*\)"
    r"|[()\[\]:]"
    r"|[^\\()\[\]:]+"
)
# text without : or |, but for brackets with a weight; and when it is to change
_PART = r"(?:[^\\()\[\]:|]|\\.|\([^()\[\]|]*\)|\[[^()\[\]:|]*\])*"
_WHEN = r"\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s*"
# what web UIs read besides: extra networks, prompt editing ([from:to:when], [to:when], [from::when])
# and alternating words, composition
_UNREAD = re.compile(
    rf"<\w+:[^<>]+>|(?<!\\)\[(?:(?:{_PART}:){{1,2}}{_WHEN}|{_PART}(?:\|{_PART})+)\]|\bAND\b"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Text:
    """A part of a prompt, and how strongly it is meant."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Token:
    """`vector`: which of the words' vectors replaces the id's, counted over all words; or -1."""

    id: int
    vector: int = -1
    weight: float = 1.0


def weighted_texts(prompt: str, *, breaks: bool = True) -> list[Text | None]:
    """The prompt's parts in order; None where it has BREAK, unless without `breaks` that is text.

    Brackets that are not closed reach to the end; those that were not opened are text.
    Errors: SettingError for more than 100 brackets in each other.
    """
    texts: list[str | None] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(bracket: str, factor: float) -> None:
        """Multiply the weights from the bracket that was opened last."""
        for number in range(opened[bracket].pop(), len(weights)):
            weights[number] *= factor

    def add(text: str | None) -> None:
        texts.append(text)
        weights.append(1.0)

    for match in _MARKS.finditer(prompt):
        mark, factor = match[0], _number(match["weight"])
        if mark.startswith("\\"):
            add(mark[1:])
        elif mark in opened:
            opened[mark].append(len(texts))
            if len(opened[mark]) > DEEPEST:
                raise SettingError(
                    f"The prompt {excerpt(prompt)} has more than {DEEPEST} brackets in each other. "
                    "Write the weight as a number, as in (a V1 dog:1.2)."
                )
        elif factor is not None and opened["("]:
            weigh("(", factor)
        elif mark == ")" and opened["("]:
            weigh("(", STRONGER)
        elif mark == "]" and opened["["]:
            weigh("[", 1 / STRONGER)
        else:
            for number, text in enumerate(_BREAK.split(mark) if breaks else [mark]):
                if number:
                    add(None)
                add(text)
    while opened["("]:
        weigh("(", STRONGER)
    while opened["["]:
        weigh("[", 1 / STRONGER)
    return _joined(texts, weights)


def unread(prompt: str) -> list[str]:
    """The prompt's parts that web UIs read in a way of their own, and that are text here."""
    return _UNREAD.findall(prompt)


def _number(text: str | None) -> float | None:
    """None for what is no finite number."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _joined(texts: Sequence[str | None], weights: Sequence[float]) -> list[Text | None]:
    """Neighbours of the same weight are one text, so that brackets cut no word in two."""
    joined: list[Text | None] = []
    for text, weight in zip(texts, weights, strict=True):
        before = joined[-1] if joined else None
        if text is None:
            joined.append(None)
        elif before is not None and before.weight == weight:
            joined[-1] = Text(before.text + text, weight)
        else:
            joined.append(Text(text, weight))
    return joined


def chunks(units: Iterable[Sequence[Token] | None], comma: int) -> list[list[Token]]:
    """Tokens in chunks of at most 75, at least one chunk.

    units: one token each, or all of a learned word, which stay in one chunk; None for BREAK.
    comma: the id of the comma's token.
    """
    done: list[list[Token]] = []
    chunk: list[Token] = []
    behind_comma = 0  # where what follows the last comma begins
    for unit in units:
        if unit is None:
            done.append(chunk)
            chunk, behind_comma = [], 0
            continue
        is_comma = unit[0].id == comma
        near = behind_comma and CHUNK - behind_comma < BACKTRACK
        if len(chunk) == CHUNK and near and not is_comma:
            done.append(chunk[:behind_comma])
            chunk, behind_comma = chunk[behind_comma:], 0
        if len(chunk) + len(unit) > CHUNK:
            done.append(chunk)
            chunk, behind_comma = [], 0
        chunk = [*chunk, *unit]
        if is_comma:
            behind_comma = len(chunk)
    if chunk or not done:
        done.append(chunk)
    return done
