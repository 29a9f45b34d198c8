"""The exceptions. Every message says what failed, where, what was expected, and what to do.

ContinualLoraError
├── CheckpointError       the checkpoint: missing, a pickle, another architecture, keys missing
├── ConceptImagesError    the pictures: none found, unreadable, too large
├── TokenError            the concept's word: empty, taken, a known word, with spaces or slashes
├── SettingError          a setting or a field of a request that is invalid
├── StackError            the concept stack: truncated, foreign, newer, made for another checkpoint,
│                         locked, not writable
└── TrainingError         training itself: the loss is not a number, out of memory
Cancelled                 not an error: the user stopped, and the snapshot is kept

Messages and notes have settings, fields of requests and operations in backquotes, `rate`, `undo`.
Each front end replaces them by what its user sees (`spelled`).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any


def spelled(text: str, names: Mapping[str, str] | None = None) -> str:
    """A message or note with a front end's names, such as "--lr", in place of those in backquotes;
    without `names`, with the names as they are.
    """
    if names is None:
        return re.sub(r"`(\w+)`", r"\1", text)
    return re.sub(r"`(\w+)`", lambda match: names.get(match[1], match[0]), text)


class ContinualLoraError(Exception):
    """An error that a user can act on: front ends show the message without a traceback.

    `str` omits the backquotes of the message.
    """

    # Hosts show it before the message. The real one begins with a long path inside ComfyUI.
    __module__ = "continual_lora"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__module__ = ContinualLoraError.__module__

    def __reduce__(self) -> tuple[Any, ...]:
        return _error_of, (type(self).__name__, self.args)

    @property
    def marked(self) -> str:
        """The message with names in backquotes."""
        return str(self.args[0]) if self.args else ""

    def spelled(self, names: Mapping[str, str]) -> str:
        """The message with a front end's names."""
        return spelled(self.marked, names)

    def __str__(self) -> str:
        return spelled(self.marked)


def _error_of(kind: str, args: tuple[Any, ...]) -> ContinualLoraError:
    """An error from a pickle: no module has the name that the classes show."""
    return globals().get(kind, ContinualLoraError)(*args)


class CheckpointError(ContinualLoraError):
    pass


class ConceptImagesError(ContinualLoraError):
    pass


class TokenError(ContinualLoraError):
    pass


class SettingError(ContinualLoraError):
    pass


class StackError(ContinualLoraError):
    pass


class TrainingError(ContinualLoraError):
    pass


class Cancelled(Exception):
    """Raised by `on_progress` to stop a job; the job keeps its snapshot and re-raises it."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def excerpt(value: object) -> str:
    """A value from outside as a message shows it: shortened, however long or deeply nested it is."""
    return _REPR.repr(value)
