"""What the training loop asks of a method."""

from __future__ import annotations

from typing import Protocol


class Method(Protocol):
    id: str
    trains_adapter: bool  # besides the new word's vector, which every method trains
