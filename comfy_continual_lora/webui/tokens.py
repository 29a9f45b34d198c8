"""What a web UI reads of learned words, and what there is to say about it. Light.

A web UI has an embedding for each word and looks for its tokens among a prompt's (`by_tokens`). It
can't be told where a word ends: in "V10" it reads V1 and a 0, as long as there is no V10.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

from ..mentions import not_learned, unknown_words, whole_words

_LETTER = r"[^\W\d_]"  # of any alphabet: CLIP's tokenizer cuts a text at everything else


def notes(
    prompts: Iterable[str], words: Collection[str], embeddings: Callable[[], Iterable[str]] | None
) -> list[str]:
    """What the prompts name that looks like one of `words` but is none, and what the web UI reads
    otherwise than other programs do.

    `embeddings` lists the names of the web UI's embeddings. It is asked only if something looks
    unknown: one of them may be meant. None on Anima, where words are plain text.
    """
    texts = list(dict.fromkeys(prompts))
    if embeddings is None:
        unknown = unknown_words(texts, words)
        return [not_learned(unknown, words)] if unknown else []
    otherwise: dict[str, str] = {}
    for text in texts:
        otherwise |= _read_otherwise(text, words)
    unknown = [
        word
        for word in unknown_words(texts, words)
        if not any(place.startswith(word.lower()) for place in otherwise)
    ]
    if not unknown and not otherwise:
        return []
    own = {word.lower() for word in words}
    every = "\n".join(texts).lower()
    foreign = [name for name in {name.lower() for name in embeddings()} - own if name in every]

    def is_foreign(text: str) -> bool:
        return any(text.lower() in name for name in foreign)

    told = [note for text, note in otherwise.items() if not is_foreign(text)]
    unknown = [word for word in unknown if not is_foreign(word)]
    return [*told, not_learned(unknown, words)] if unknown else told


def by_tokens(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for what the web UI reads as one of these words: its tokens wherever they are, the
    longest first. A letter that touches one of its letters makes other tokens, or seldom not; a digit
    doesn't.
    """
    each = []
    for word in sorted(words, key=len, reverse=True):
        before = f"(?<!{_LETTER})" if word[0].isalpha() else ""
        after = f"(?!{_LETTER})" if word[-1].isalpha() else ""
        each.append(f"{before}(?ai:{re.escape(word)}){after}")
    return re.compile("|".join(each))


def _read_otherwise(text: str, words: Collection[str]) -> dict[str, str]:
    """The note for each place where the web UI and `whole_words` differ, by the place's letters."""
    named = {match.start(): match[0] for match in whole_words(words).finditer(text)}
    read = {match.start(): match[0] for match in by_tokens(words).finditer(text)}
    told: dict[str, str] = {}
    for start in sorted({*named, *read}):
        if named.get(start) == read.get(start):
            continue
        word = read.get(start) or named[start]
        before = re.split(r"[^\w.-]", text[max(0, start - 64) : start])[-1]
        after = re.split(r"[^\w.-]", text[start : start + 128])[0]
        place = (before + after).strip(".-")
        if start in read:
            what = f"the web UI reads {word} and more: to it, a word ends at any digit or sign"
        else:
            what = f"the web UI does not read {word}: to it, a word ends at no letter"
        told[place.lower()] = (
            f'In "{place}" {what}. Write {word} with a space around it if it is meant, or leave it '
            "out."
        )
    return told
