"""The question before a destructive click: a sentence on what it will do.

Light: it only reads headers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import versions
from ..progress import counted
from ..stackfile import read_header
from .host import JobRequest, place_of


@dataclass(frozen=True)
class Question:
    """What the user is asked, and the job that follows a yes."""

    sentence: str  # everything the job will do
    yes: str  # the label of the button that starts it
    job: JobRequest


def undo(checkpoint: Path, stack: Path, _: object = None) -> Question:
    """Errors: ValueError and StackError if there is nothing to undo."""
    # The version first: if the stack changes in between, the worker refuses instead of undoing
    # something else.
    current = versions.in_use(stack)
    sentence = versions.undo_preview(stack)
    if current is None or sentence.startswith("There is nothing"):
        raise ValueError(sentence)
    request = {**place_of(checkpoint, stack), "version": current.number}
    return Question(sentence, "Yes, undo it", ("undo", request))


def forget(checkpoint: Path, stack: Path, token: object) -> Question:
    """Errors: ValueError for a word that is not on the stack; StackError."""
    concepts = read_header(stack)["concepts"] if stack.exists() else []
    tokens = [one["token"] for one in concepts]
    concept = next((one for one in concepts if one["token"] == token), None)
    if concept is None:
        problem = "No word was entered on the left"
        if token:
            problem = f"The word {token} is not on the stack"
        raise ValueError(f"{problem}; the stack holds {', '.join(tokens) or 'no concept'}.")
    rest = ", ".join(other for other in tokens if other != token) or "no concept"
    sentence = (
        f"This removes {token} {concept['noun']}, learned on {concept['learned'][:10]} from "
        f"{counted(concept['images'], 'picture')}, and what later adapters know of it. "
        f"The stack then holds {rest}. It can be undone as long as the history keeps this version."
    )
    request = {**place_of(checkpoint, stack), "token": token}
    return Question(sentence, "Yes, forget it", ("forget", request))


def restore(checkpoint: Path, stack: Path, number: object) -> Question:
    """Errors: ValueError for a version that is not kept, or is in use; StackError."""
    available = versions.versions(stack)
    chosen = next((one for one in available if one.number == number), None)
    current = next((one for one in available if one.current), None)
    if chosen is None:
        numbers = ", ".join(str(one.number) for one in available if not one.current)
        raise ValueError(
            f"There is no version {number} in the history. Available: {numbers or 'none'}."
        )
    if chosen.current:
        raise ValueError(f"Version {number} is the one in use.")
    sentence = (
        f"This goes back to version {chosen.number} of {chosen.when[:10]}: {chosen.change}. "
        f"The stack then holds {', '.join(chosen.tokens) or 'no concept'}."
    )
    if current:
        sentence += f" Version {current.number}, which is in use now, stays in the history."
    request = {**place_of(checkpoint, stack), "version": chosen.number}
    return Question(sentence, "Yes, go back to it", ("restore", request))


QUESTIONS: dict[str, Callable[[Path, Path, object], Question]] = {
    "undo": undo,
    "forget": forget,
    "restore": restore,
}
