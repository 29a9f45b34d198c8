"""Stage 2: which words and class nouns a concept may have. Light."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import SettingError, StackError, TokenError, excerpt
from .files import TOKEN, is_reserved
from .mentions import named

NOUN_WORDS, NOUN_LETTERS = 8, 80  # prompts say much more, within the encoder's 77 positions
VOCABULARY = Path(__file__).parent / "checkpoint" / "tokenizer" / "vocab.json"
# What may stand before a noun, and is none
ARTICLES = r"(?:an?|the|this|that|these|those|some|my|our|your)"
_ADVICE = "Choose a short word of your own, such as V1."


def name_of(token: str, noun: str) -> str:
    """How prompts name a concept: "V1 mug"."""
    return f"{token} {noun}".strip()


def name_in(record: Mapping[str, Any]) -> str:
    """How prompts name the concept of a record in a stack's header."""
    return name_of(record["token"], record["noun"] if record["with_noun"] else "")


def position_of(token: str, tokens: Sequence[str]) -> int:
    """Where a word, in any case, is among those of a stack.

    Errors: StackError if it is not there.
    """
    for number, one in enumerate(tokens):
        if one.lower() == token.lower():
            return number
    raise StackError(
        f"There is no concept {token!r} on the stack. It has: {', '.join(tokens) or 'none'}."
    )


def check_spelling(token: str) -> None:
    """Raise TokenError unless `token` can be used in prompts and file names of every host."""
    if not token.strip():
        raise TokenError(f"`token` is empty. {_ADVICE}")
    if is_reserved(token):
        raise TokenError(
            f"`token` {token!r} can't be a file name on Windows, where it is a device. {_ADVICE}"
        )
    if not TOKEN.fullmatch(token):
        raise TokenError(
            f"`token` {excerpt(token)} may contain only letters, digits, - and _ (at most 64): it "
            f"becomes a word and a file name. {_ADVICE}"
        )
    if not any(letter.isalpha() for letter in token):
        raise TokenError(
            f"`token` {excerpt(token)} has no letter, so it would be read in every prompt with a "
            f"number or a sign like it. {_ADVICE}"
        )
    if token.startswith("-"):
        raise TokenError(
            f"`token` {excerpt(token)} begins with -, so commands would take it for a flag. {_ADVICE}"
        )


def check_noun(noun: str, token: str, *, required: bool = False) -> None:
    """Raise SettingError unless `noun` says in one line and a few words what the thing is; it may
    be empty if it is not `required`.
    """
    if required and not noun.strip():
        raise SettingError(
            "`noun` is empty. Say in one or two words what the thing is, such as teapot or cat."
        )
    problem = ""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in noun):
        problem = "is not a single line of text"
    elif len(noun) > NOUN_LETTERS or len(noun.split()) > NOUN_WORDS:
        problem = f"has more than {NOUN_WORDS} words or {NOUN_LETTERS} letters"
    elif noun.strip() and not any(letter.isalpha() for letter in noun):
        problem = "has no letter"
    elif re.fullmatch(rf"(?:{ARTICLES}\s+)*{ARTICLES}", noun.strip(), re.IGNORECASE):
        problem = "is an article alone"
    elif token and named([noun], [token]):
        problem = f"contains {token} itself"
    if problem:
        raise SettingError(
            f"`noun` {excerpt(noun)} {problem}. Say in one or two words what the thing is, such as "
            "teapot or cat; what a single picture shows belongs into its caption."
        )


def check_token(token: str, taken: Iterable[str], is_known_word: Callable[[str], bool]) -> None:
    """Raise TokenError unless `token` can name a new concept on a stack with the `taken` tokens."""
    check_spelling(token)
    if token.lower() in {t.lower() for t in taken}:
        raise TokenError(
            f"`token` {token!r} is already taken by a concept of this stack. Choose another, replace "
            "that concept (`replace`) if it is the newest, or take it off first (`forget`)."
        )
    if is_known_word(token):
        raise TokenError(
            f"`token` {token!r} is a word the checkpoint already knows; prompts that use it would "
            f"change meaning. {_ADVICE}"
        )


def check_apart(token: str, noun: str, others: Mapping[str, str]) -> None:
    """Make sure that the prompts of this concept and of the others name one each; `others` has the
    class nouns of the others by word.

    Errors: TokenError for a word that another's noun names, SettingError for a noun that names
    another's word.
    """
    for word, other in others.items():
        if named([other], [token]):
            raise TokenError(
                f"`token` {token!r} is a word of {name_of(word, other)}, a concept of this stack, whose "
                f"prompts would name both. {_ADVICE}"
            )
    if words := named([noun], others):
        raise SettingError(
            f"`noun` {excerpt(noun)} contains {words[0]}, another concept of this stack, so prompts "
            "would name both. Say in one or two words what the thing is, such as teapot or cat."
        )


def check_newest(token: str, newest: str) -> None:
    """Raise TokenError unless the newest concept, whose word is given, is the one to be replaced."""
    if newest.lower() != token.lower():
        raise TokenError(
            f"{token} can't be replaced: {newest} was learned after it and builds on it. Forget "
            f"{token} first (`forget`), or choose another word."
        )


def is_ordinary(token: str) -> bool:
    """`Backbone.is_known_word` for CLIP's tokenizer, which most checkpoints have, without loading
    it: a word is one token if the vocabulary holds it.
    """
    return f"{token.lower()}</w>" in _vocabulary()


@functools.cache
def _vocabulary() -> frozenset[str]:
    return frozenset(json.loads(VOCABULARY.read_text(encoding="utf-8")))
