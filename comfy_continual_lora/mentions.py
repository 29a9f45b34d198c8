"""Stage 8: which learned things a prompt names, and the prompts that are needed to keep them apart.

    "a V1 dog and a V2 cat on grass"
    neutral     "a dog and a cat on grass"
    own         "a V1 dog and a cat on grass", "a dog and a V2 cat on grass"

in: a prompt, and the class noun of every learned word - out: `Mentions`. Text alone, so that any
host's syntax (weights, BREAK, line breaks) passes through as it is. Light.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

UNKNOWN_NOUN = "thing"  # of imported concepts, which may have none
# Where a learned word begins and ends (`whole_words`)
_BEGIN = r"(?<![0-9A-Za-z_])(?<![0-9A-Za-z_]-)"
_END = r"(?=(?:-[A-Za-z]{2,})*(?:--|-?(?![0-9A-Za-z_-])))(?!\.[0-9])"
_RUN = re.compile(r"[0-9A-Za-z_]+(?:-[0-9A-Za-z_]+)*")  # what looks like one word
EMBEDDING = r"embedding:[^\s,()]+"  # ComfyUI's name for an embedding
_DECIMAL = re.compile(r"\.[0-9]")  # behind "v2"
# "V8 engine", "V8 Mustang", "V12 sports car"
_ENGINE = re.compile(
    r"V(?:6|8|10|12|16)[\s-]+(?:[A-Z]|(?:[\w-]+\s+)?(?:engine|motor|car|truck|bike)s?\b)"
)
_NAME_BEFORE = re.compile(r"[^.!?\s]\s+[A-Z]\w{2,}\s+$")  # "in Realistic Vision ", before "V5"
# a noun after one of these belongs to something else: "a V1 on a mug"
_ENDS = (
    "a|an|the|and|or|with|without|of|in|on|at|by|to|from|near|under|over|behind|beside|next|is|are"
    "|break"
)
# brackets and quotes between a word and its noun: "(V1:1.2) dog", "V1 (fluffy dog)"
_WEIGHT = r"\s*:\s*[\d.]+\s*"
_CLOSED = rf"(?:(?:{_WEIGHT})?\\?[)\]}}]|[\"”]|'(?!\w))*"
_OPENED = r"(?:\\?[(\[{]|[\"“'])*"
_PAIRS = {"(": ")", "[": "]", "{": "}", '"': '"', "“": "”", "'": "'"}
_OPENS = re.compile(r"(\\?)([(\[{\"“'])\s*$")
_GAP = re.compile(r"(?:,|:(?!\s*[\d.]+\s*\)))?[\s-]*")


@dataclass(frozen=True)
class Mentions:
    """Two or more learned things of one prompt.

    `tokens` are the words in the order in which they are first named; `own` has a prompt for each of
    them, with its word wherever the prompt has it and class nouns in place of the others; `nouns`
    has the places of each one's nouns in `neutral`, as (start, end) in characters; `whole` is the
    prompt.
    """

    tokens: tuple[str, ...]
    whole: str
    neutral: str
    own: tuple[str, ...]
    nouns: tuple[tuple[tuple[int, int], ...], ...]


def mentions(prompt: str, nouns: Mapping[str, str]) -> Mentions | None:
    """What the prompt names of the words in `nouns` (word -> class noun); None for fewer than two
    different ones. A word counts as a whole word, in any case.

    A word is followed by its noun, with at most two words between them ("V1 dog", "V1 fluffy dogs",
    "(V1:1.2) dog"), or stands alone; then the noun takes its place.
    """
    matches = _matches(prompt, nouns)
    tokens = tuple(dict.fromkeys(token for _, token in matches))
    if len(tokens) < 2:
        return None
    neutral, places = _rewritten(prompt, matches, nouns, "")
    own = tuple(_rewritten(prompt, matches, nouns, token)[0] for token in tokens)
    spans = tuple(
        tuple(span for span, (_, one) in zip(places, matches, strict=True) if one == token)
        for token in tokens
    )
    return Mentions(tokens, prompt, neutral, own, spans)


def noun_positions(
    scene: Mentions, ids: Sequence[object], ids_of: Callable[[str], Sequence[int]]
) -> list[list[int]]:
    """Where the nouns of each concept are among the neutral prompt's tokens, as positions in `ids`;
    none for nouns that are not among them, because the prompt was too long.

    `ids_of` tokenizes a text. Positions are those of the tokens themselves, whatever syntax a host
    takes out of a prompt: if the text before a "dog" has its token twice, it is the third one. (A
    compound may end in it: CLIP's "schoolgirl" is "school" and "girl".)
    """
    found: list[list[int]] = []
    for places in scene.nouns:
        found.append([])
        for start, end in places:
            wanted = ids_of(scene.neutral[start:end])
            before = re.sub(rf"{EMBEDDING}|[()\[\]{{}}]", " ", scene.neutral[:start])
            number = len(_starts(ids_of(before), wanted))
            if number < len(firsts := _starts(ids, wanted)):
                found[-1] += range(firsts[number], firsts[number] + len(wanted))
    return found


def _starts(ids: Sequence[object], wanted: Sequence[object]) -> list[int]:
    """Where these tokens are among the others."""
    count = len(wanted)
    places = range(len(ids) - count + 1)
    return [first for first in places if list(ids[first : first + count]) == list(wanted)]


def noun_not_found(prompt: str, unseen: Sequence[str]) -> str:
    """The note for a prompt among whose tokens the nouns of these words are not."""
    return (
        f'The noun of {" and ".join(unseen)} was not found in the prompt "{_shown(prompt)}", so it is '
        "drawn without keeping its things apart. Write the noun behind its word, between spaces."
    )


def not_read(prompt: str, end: str) -> str:
    """The note for a prompt that is not drawn and whose end no text encoder reads."""
    return (
        f'The prompt "{_shown(prompt)}" is too long: the text encoder does not read its end, '
        f'"{end[:200]}". Shorten it, or begin with what matters most.'
    )


def only_in_web_uis(marks: Sequence[str]) -> str:
    """The note for `emphasis.unread`."""
    return (
        f"{', '.join(marks)[:200]} is read as ordinary text here: <lora:...>, AND and prompt editing "
        "are understood by web UIs alone. What the stack knows needs no <lora:...>."
    )


def _shown(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else f"{prompt[:57]}..."


def not_in_use(token: str) -> str:
    """The note for a word that a prompt names but whose concept was left out."""
    return (
        f"The prompts name {token}, which is on the stack but not among the concepts in use: it is "
        "drawn as an ordinary word. Add it to those in use, or leave it out of the prompts."
    )


def previewed(preview_prompts: str, names: Iterable[str]) -> list[str]:
    """What previews show from left to right: the prompts of the setting, which has | between them, or
    without any a photo of each of these concepts, as prompts name them.
    """
    own = [prompt.strip() for prompt in preview_prompts.split("|") if prompt.strip()]
    return own or [f"a photo of a {name}" for name in names]


def named(prompts: Iterable[str], words: Collection[str]) -> list[str]:
    """Which of the words the prompts name."""
    found = {token for prompt in prompts for _, token in _matches(prompt, words)}
    return [word for word in words if word in found]


def split(text: str, words: Collection[str]) -> list[str]:
    """The text cut at its learned words: every second part is one, as it is spelled there."""
    return whole_words(words).split(text) if words else [text]


def in_other_words(text: str, names: Mapping[str, str]) -> str:
    """The text with other words for the learned ones; `names` has all that it may name."""
    parts = split(text, names)
    other = {old.lower(): new for old, new in names.items() if new != old}
    parts[1::2] = [other.get(word.lower(), word) for word in parts[1::2]]
    return "".join(parts)


def _matches(prompt: str, words: Collection[str]) -> list[tuple[re.Match[str], str]]:
    """Where a prompt has which word, in order, with what makes ComfyUI read it as an embedding.

    The names of other embeddings are none of ours, whatever they begin with.
    """
    if not words:
        return []
    spelled = {token.lower(): token for token in words}
    word = whole_words(words)
    either = re.compile(
        rf"embedding:{word.pattern}(?=[\s,:()\[\]]|$)|{EMBEDDING}|{word.pattern}", word.flags
    )
    found = ((match, match[1] or match[2]) for match in either.finditer(prompt))
    return [(match, spelled[one.lower()]) for match, one in found if one]


def whole_words(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for these words wherever a text names one, in any case; group 1 is the word.

    The one rule for prompts, captions, renaming and hosts. The longest of the words at a place is
    meant. No letter, digit or _ touches it: "V1's" and "(V1:1.2)" name V1, while V10, V1_a and V1.5
    don't. Hyphens join names, so V1-a, V1-2 and my-V1 are other words than V1; but with words of two
    letters or more behind it, V1-coloured and V1-ball say something of V1, if they are not learned
    themselves. Case is ASCII's: a long s is no s.
    """
    longest_first = sorted(words, key=len, reverse=True)
    either = "|".join(map(re.escape, longest_first))
    return re.compile(f"{_BEGIN}({either}){_END}", re.IGNORECASE | re.ASCII)


def unknown_words(prompts: Iterable[str], words: Collection[str]) -> list[str]:
    """What the prompts name that looks like a learned word but is none of `words`, each once.

    It has another number than they have (V3 if there is a V1), is one of them with more behind it
    (V1-b, V1s) or before it (my-V1), or is V and a number, as every example calls its concepts. What
    ordinary prompts have is left aside: v2.0, V8 engine, and names with v2 or V5 behind them as long
    as no such word is learned; so are ComfyUI's embeddings and what web UIs write in <>.
    """
    known = {word.lower() for word in words}
    beginnings, endings = tuple(known), tuple(f"-{word}" for word in words)
    numbered = {word.rstrip("0123456789") for word in known if word[-1:].isdigit()} - {""}
    read = whole_words(words) if words else None
    found: dict[str, str] = {}
    for prompt in prompts:
        text = re.sub(rf"<[^<>]*>|{EMBEDDING}", " ", prompt, flags=re.IGNORECASE)
        for run in _RUN.finditer(text):
            # the rule looks two characters ahead
            first = read and read.search(text, run.start(), run.end() + 2)
            if first and first.start() < run.end():
                continue
            word = _without_compound(run[0])
            lower = word.lower()
            stem = lower.rstrip("0123456789")
            if lower in known:
                is_unknown = False
            elif stem != lower and (stem in numbered or stem == "v"):
                is_unknown = not _is_ordinary(text, run.start(), word, stem in numbered)
            else:
                is_unknown = word.endswith(endings) or (
                    lower.startswith(beginnings) and any(_extends(lower, one) for one in known)
                )
            if is_unknown:
                found.setdefault(lower, word)
    return list(found.values())


def _without_compound(run: str) -> str:
    """What a run of letters names, without what it says of it: "V3" of "V3-coloured"."""
    parts = run.split("-")
    while len(parts) > 1 and len(parts[-1]) > 1 and parts[-1].isalpha():
        parts.pop()
    return "-".join(parts)


def _is_ordinary(text: str, start: int, word: str, is_series: bool) -> bool:
    """Whether a word that ends in a number is ordinary language; `is_series`: learned ones are
    numbered like it.
    """
    if _DECIMAL.match(text, start + len(word)) or _ENGINE.match(text, start):
        return True
    is_name = word[0] == "v" or _NAME_BEFORE.search(text, max(0, start - 80), start)
    return bool(is_name) and not is_series


def _extends(run: str, word: str) -> bool:
    """Whether a run of letters is a learned word with more behind it: V1-b, V1_x, V1s."""
    if not run.startswith(word) or run == word:
        return False
    return run[len(word)] in "-_" or word[-1].isdigit()


def not_learned(unknown: Sequence[str], words: Collection[str]) -> str:
    """The note for `unknown_words`."""
    several = len(unknown) > 1
    learned = f"learned: {', '.join(words)}" if words else "nothing is learned yet"
    return (
        f"{' and '.join(unknown)} {'are not learned words' if several else 'is not a learned word'} "
        f"({learned}), so {'they are' if several else 'it is'} read as ordinary text."
    )


def _rewritten(
    prompt: str, matches: list[tuple[re.Match[str], str]], nouns: Mapping[str, str], kept: str
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt with class nouns in place of all words but `kept`, and where each word's noun is;
    for `kept`, where the word is if it stands alone.
    """
    text, at, places = "", 0, []
    for match, token in matches:
        noun = nouns[token] or UNKNOWN_NOUN
        text += prompt[at : match.start()]
        at = behind = match.end()
        follows = _noun_after(prompt[behind:], noun, nouns)
        if follows is None:
            word = match[0] if token == kept else noun
            places.append((len(text), len(text) + len(word)))
            text += word
            continue
        if token == kept:
            text += match[0]
        else:  # the noun is there already
            text, at = _without_brackets(text, prompt, behind)
            gap = _GAP.match(prompt, at)
            at = gap.end() if gap else at
        start, end = (len(text) + place - (at - behind) for place in follows)
        places.append((start, end))
    return text + prompt[at:], places


def _without_brackets(text: str, prompt: str, at: int) -> tuple[str, int]:
    """The text before a word and where the prompt goes on behind it, without the brackets and quotes
    that hold nothing but the word.
    """
    while opens := _OPENS.search(text):
        weight = rf"(?:{_WEIGHT})?" if opens[2] == "(" else ""
        closes = re.escape(opens[1] + _PAIRS[opens[2]])
        closed = re.compile(rf"{weight}\s*{closes}").match(prompt, at)
        if closed is None:
            break
        text, at = text[: opens.start()], closed.end()
    return text, at


def _noun_after(rest: str, noun: str, nouns: Mapping[str, str]) -> tuple[int, int] | None:
    """Where the noun of a word is in the text that follows the word."""
    stops = "|".join([_ENDS, *map(re.escape, nouns)])
    between = rf"(?:\s+{_OPENED}(?!(?:{stops})(?!\w))[\w'-]+{_CLOSED}){{0,2}}?"
    match = re.match(
        rf"{_CLOSED}(?:[,:](?=\s)|{between})[\s-]+{_OPENED}({re.escape(noun)}(?:e?s)?)(?!\w)",
        rest,
        re.IGNORECASE,
    )
    return match.span(1) if match else None
