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
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable


class ContinualLoraError(Exception):
    """An error that a user can act on: front ends show the message without a traceback.

    The message has settings and fields of requests in backquotes, `rate`, which `str` omits.
    """

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The message with a front end's names for settings, such as "--lr"."""
        return re.sub(r"`(\w+)`", lambda match: spell(match[1]), str(self.args[0]))

    def __str__(self) -> str:
        return self.spelled(str) if self.args else ""


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
