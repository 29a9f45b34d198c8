"""What the training loop asks of a method."""

from __future__ import annotations

from typing import Protocol


class Method(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def trains_adapter(self) -> bool:
        """Whether it trains the LoRA, besides the new word's vector, which every method trains."""
        ...
