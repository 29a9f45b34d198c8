"""What an export wrote: for people, for programs, and what its user has to know. Light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .presets import CLIP_SKIP_2

CARD = (".json", ".preview.jpg")  # the endings of the files beside a LoRA that A1111 shows


@dataclass(frozen=True)
class Exported:
    """What was written."""

    lora: Path | None  # a file, or PEFT's folder; None if the stack has only words
    embeddings: list[Path]
    triggers: list[str]  # how prompts name each concept
    renamed: dict[str, str]  # by word: its embedding's name, if another file has the word's
    superseded: list[Path]  # earlier exports of the same stack that still exist
    removed: list[Path]  # earlier exports of the same stack that were removed on request
    clip_skip: int = 1  # of the stack
    # names of which diffusers would read the first vector alone, if this is for diffusers
    capitals: Sequence[str] = ()

    @property
    def files(self) -> list[Path]:
        """All that was written: the LoRA with its card, and the embeddings."""
        lora = [self.lora] if self.lora else []
        beside = [
            file.with_suffix(ending)
            for file in lora
            if file.suffix == ".safetensors"  # not PEFT's folder, whose name may have a dot
            for ending in CARD
        ]
        return [*lora, *(path for path in beside if path.exists()), *self.embeddings]

    def summary(self) -> str:
        """The files, the triggers, and the notes."""
        lines = [str(path) for path in (self.lora, *self.embeddings) if path]
        if self.triggers:
            line = f"In prompts: {', '.join(self.triggers)}"
            words = ", ".join(f"embedding:{path.stem}" for path in self.embeddings)
            lines.append(f"{line} (ComfyUI: {words})" if words else line)
        return "\n".join([*lines, *self.notes]) or "There is no concept to export."

    def as_json(self) -> dict[str, Any]:
        """Paths as strings."""
        return {
            "lora": str(self.lora) if self.lora else None,
            "embeddings": [str(path) for path in self.embeddings],
            "triggers": self.triggers,
            "renamed": self.renamed,
            "superseded": [str(path) for path in self.superseded],
            "removed": [str(path) for path in self.removed],
            "notes": self.notes,
        }

    @property
    def notes(self) -> list[str]:
        """What the user has to know, one sentence each."""
        notes = [
            f"Another file there is named {word}, so the word is exported as {name}: use {name} in "
            "prompts."
            for word, name in self.renamed.items()
        ]
        if self.clip_skip == 2:
            notes.append(CLIP_SKIP_2)
        if self.capitals:
            names = ", ".join(self.capitals)
            notes.append(
                "diffusers reads only the first vector of a word with capitals. Load the embeddings of "
                f'{names} in lower case (token="{self.capitals[0].lower()}"), and write them so in '
                "prompts."
            )
        if self.removed:
            names = ", ".join(path.name for path in self.removed)
            notes.append(f"Removed earlier exports of this stack: {names}.")
        if self.superseded:
            names = ", ".join(path.name for path in self.superseded)
            notes.append(f"Earlier exports of this stack still exist and can be removed: {names}.")
        return notes
