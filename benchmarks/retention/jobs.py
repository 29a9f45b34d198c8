"""A job of the retention benchmark: one method and one seed; and the file of finished rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from comfy_continual_lora.mini import world
from comfy_continual_lora.settings import DrawSettings, LearnSettings

BOUNDS = ("joint", "separate")
PICTURES = 16
DRAWING = DrawSettings(steps=15, guidance=4.0)
# the numbers of concepts learned after which all of them are drawn: ever fewer
DRAWN_AFTER = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 75, 100, 150)


@dataclass(frozen=True)
class Job:
    variant: str  # a method or a bound, with settings that differ: "lora rank=4 rate=1e-3"
    seed: int
    concepts: int
    pictures: int
    out: Path
    steps: int  # per concept
    split: str = "reporting"
    device: str = "cpu"

    @property
    def method(self) -> str:
        """The method or bound, without the settings that differ."""
        return self.variant.split()[0]

    @property
    def folder(self) -> Path:
        name = f"{self.variant.replace(' ', '-')}-{self.concepts}-{self.seed}-{self.steps}"
        if self.pictures != PICTURES:
            name += f"-{self.pictures}p"
        return self.out / "runs" / name

    @property
    def settings(self) -> LearnSettings:
        """The bounds learn as plain LoRA does."""
        changes: dict[str, Any] = {"seed": self.seed, "steps": self.steps, "precision": "fp32"}
        for change in self.variant.split()[1:]:
            name, _, text = change.partition("=")
            changes[name] = _parsed(text)
        return LearnSettings(method="lora" if self.method in BOUNDS else self.method, **changes)

    @property
    def sequence(self) -> list[world.Concept]:
        return sequence(self.split, self.seed, self.concepts)

    @property
    def tokens(self) -> list[str]:
        return [f"V{number}" for number in range(1, self.concepts + 1)]

    @property
    def names(self) -> list[str]:
        """How prompts name the concepts: "V1 mug"."""
        return [f"{t} {c.noun}" for t, c in zip(self.tokens, self.sequence, strict=True)]

    @property
    def drawn_after(self) -> list[int]:
        """After which concepts, counted from 0, all so far are drawn; the last is one of them."""
        return sorted({n - 1 for n in (*DRAWN_AFTER, self.concepts) if n <= self.concepts})

    @property
    def cells(self) -> list[tuple[int, int]]:
        """The cells (i, j) of R that are measured: after concept i, concept j is drawn."""
        rows = {(i, j) for i in self.drawn_after for j in range(i + 1)}
        diagonal = {(j, j) for j in range(self.concepts)}
        return sorted(rows | diagonal)

    @property
    def prompts(self) -> list[str]:
        """One per picture, {} stands for the concept; with the places of the real pictures that
        were not learned from.
        """
        places = list(world.BACKGROUNDS.values())
        return [f"a photo of a {{}} {places[n % len(places)]}" for n in range(self.pictures)]


def sequence(split: str, seed: int, count: int) -> list[world.Concept]:
    """The first `count` concepts of a split in the order of this seed."""
    concepts = world.concepts(split, max(world.CONCEPTS_PER_SPLIT, count))
    order = np.random.default_rng(seed).permutation(len(concepts))
    return [concepts[int(i)] for i in order[:count]]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# --- finished rows: OUT/rows.jsonl, one JSON object a line, named by its run's folder --------------


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Every row of a results folder by the name of its run's folder; none if there is no file."""
    path = out / "rows.jsonl"
    lines = _whole_lines(path.read_text()) if path.exists() else []
    return {row.pop("run"): row for row in map(json.loads, lines)}


def append_row(out: Path, run: str, row: Mapping[str, Any]) -> None:
    """One process at a time; what a killed process left of its line is cut off first."""
    with FileLock(out / ".rows.jsonl.lock"), (out / "rows.jsonl").open("a+b") as file:
        file.seek(0)
        lines = _whole_lines(file.read().decode())
        file.truncate(len("\n".join(lines).encode()))
        start = "\n" if lines else ""
        file.write(f"{start}{json.dumps({'run': run, **row})}\n".encode())


def _whole_lines(text: str) -> list[str]:
    """The lines of a file of rows, without the part of one that a killed process leaves."""
    *lines, last = text.split("\n")
    with contextlib.suppress(ValueError):
        json.loads(last)
        lines.append(last)
    return lines
