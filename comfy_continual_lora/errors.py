"""What can go wrong, as a tree. Every message says what failed, where, what was expected, and what
to do.

ContinualLoraError
├── CheckpointError       the checkpoint: missing, a pickle, another architecture, keys missing
├── ConceptImagesError    the pictures: none found, unreadable, too large
├── TokenError            the concept's word: empty, taken, a known word, with spaces or slashes
├── SettingError          a setting out of its range
├── StackError            the concept stack: truncated, foreign, newer, made for another checkpoint,
locked, not writable
└── TrainingError         training itself: the loss is not a number, out of memory
Cancelled                 not an error: the user stopped, and the snapshot is kept
"""

from __future__ import annotations


class ContinualLoraError(Exception):
    """A user can act on it: front ends show the message alone, without a traceback."""


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
    """Raised by `on_progress` to stop a job; the job keeps what it had and lets it through."""
