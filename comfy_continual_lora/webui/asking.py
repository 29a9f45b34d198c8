"""What a click that takes something away will do, in a sentence that is shown before it is done.

Light: it reads headers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import versions
from ..stackfile import read_header
from .host import JobRequest, place_of


@dataclass(frozen=True)
class Question:
    """`sentence`: all that will be done; `yes`: the words of the button that does it; `job`: for
    the worker.
    """

    sentence: str
    yes: str
    job: JobRequest


def undo(checkpoint: Path, stack: Path, _: object = None) -> Question:
    """Errors: ValueError and StackError if there is nothing to undo."""
    # Its number first: should the stack change in between, the worker refuses, rather than undo
    # something else.
    now = versions.in_use(stack)
    sentence = versions.undo_preview(stack)
    if now is None or sentence.startswith("There is nothing"):
        raise ValueError(sentence)
    return Question(
        sentence, "Yes, undo it", ("undo", {**place_of(checkpoint, stack), "version": now.number})
    )


def forget(checkpoint: Path, stack: Path, token: object) -> Question:
    """Errors: ValueError for a word that is not on the stack; StackError."""
    concepts = read_header(stack)["concepts"] if stack.exists() else []
    known = [one["token"] for one in concepts]
    one = next((one for one in concepts if one["token"] == token), None)
    if one is None:
        problem = f"The word {token} is not on the stack" if token else "No word is on the left"
        raise ValueError(f"{problem}; it holds {', '.join(known) or 'no concept'}.")
    rest = ", ".join(other for other in known if other != token) or "no concept"
    sentence = (
        f"This takes {token} {one['noun']} off, learned on {one['learned'][:10]} from "
        f"{one['images']} pictures, and what later adapters know of it. "
        f"The stack then holds {rest}. It can be undone as long as the history keeps this version."
    )
    return Question(
        sentence, "Yes, forget it", ("forget", {**place_of(checkpoint, stack), "token": token})
    )


def restore(checkpoint: Path, stack: Path, number: object) -> Question:
    """Errors: ValueError for a number that is not kept, or is in use; StackError."""
    known = versions.versions(stack)
    one = next((one for one in known if one.number == number), None)
    now = next((one for one in known if one.current), None)
    if one is None:
        numbers = ", ".join(str(other.number) for other in known if not other.current)
        raise ValueError(
            f"There is no version {number} in the history. There are: {numbers or 'none'}."
        )
    if one.current:
        raise ValueError(f"Version {number} is the one in use.")
    kept = f" Version {now.number}, which is in use now, stays in the history." if now else ""
    sentence = (
        f"This goes back to version {one.number} of {one.when[:10]}: {one.change}. "
        f"The stack then holds {', '.join(one.tokens) or 'no concept'}.{kept}"
    )
    return Question(
        sentence,
        "Yes, go back to it",
        ("restore", {**place_of(checkpoint, stack), "version": one.number}),
    )


QUESTIONS: dict[str, Callable[[Path, Path, object], Question]] = {
    "undo": undo,
    "forget": forget,
    "restore": restore,
}
