"""A job of the retention benchmark: one method and one seed; and the file of finished rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from rivals import RIVALS
from subjects import Subject, of_folder, of_world
from words import HELD_OUT_FORMS, READ_BY_THE_MINI, UNLISTED_PLACES, Words
from words import split as split_words

from comfy_continual_lora.mini import world
from comfy_continual_lora.presets import METHODS
from comfy_continual_lora.settings import DrawSettings, LearnSettings
from comfy_continual_lora.textspace import PLACES

DRAWING = DrawSettings(steps=15, guidance=4.0)
BOUNDS = ("joint", "separate")
PICTURES = 16
STEPS = 200
# the numbers of concepts learned after which all of them are drawn: ever fewer
DRAWN_AFTER = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 75, 100, 150)
SETTINGS = {field.name for field in dataclasses.fields(LearnSettings)}


@dataclass(frozen=True)
class Real:
    """A checkpoint that somebody has, photographs of theirs, and a CLIP that judges."""

    checkpoint: Path
    photographs: Path
    clip: Path
    size: int = 512


@dataclass(frozen=True)
class Job:
    variant: str  # a method, rival or bound, with what differs: "lora rank=4 rate=1e-3"
    seed: int
    concepts: int
    pictures: int
    out: Path
    steps: int  # per concept
    split: str = "reporting"
    device: str = "cpu"
    common: tuple[str, ...] = ()  # "name=value" for every variant that does not say otherwise
    tuned: tuple[str, ...] = ()  # "name=value" found for this variant, over the common ones
    ends: bool = False  # draw each concept just learned and at the end, nothing between
    real: Real | None = None  # None: concepts of the mini-SD's world
    miniature: Path | None = None  # another checkpoint that draws that world; None: the mini-SD
    order: str = "mixed"  # of the world's concepts: subjects.ORDERS
    judges: Path = Path()  # folder of judges.py, for the world
    drawing_steps: int | None = None  # None: DRAWING's, with a real checkpoint 25

    @property
    def method(self) -> str:
        """The method, rival or bound, without what differs."""
        return self.variant.split()[0]

    @property
    def folder(self) -> Path:
        name = f"{self.variant.replace(' ', '-')}-{self.concepts}-{self.seed}-{self.steps}"
        if self.pictures != PICTURES:
            name += f"-{self.pictures}p"
        if self.order != "mixed":
            name += f"-{self.order}"
        return self.out / "runs" / name

    @property
    def choices(self) -> dict[str, Any]:
        """All that the variant, what was tuned for it, and what is common set."""
        chosen: dict[str, Any] = {}
        for change in (*self.common, *self.tuned, *self.variant.split()[1:]):
            name, _, text = change.partition("=")
            chosen[name] = _parsed(text)
        return chosen

    @property
    def base(self) -> str:
        """The method by which a bound, or a rival that merges, learns each concept alone."""
        return str(self.choices.get("base", "lora"))

    @property
    def settings(self) -> LearnSettings:
        """Rivals learn as plain LoRA does, bounds and merges as their base."""
        changes: dict[str, Any] = {"seed": self.seed, "steps": self.steps, "precision": "fp32"}
        if self.real:
            changes |= {"precision": "auto", "size": self.real.size}
        changes |= {name: value for name, value in self.choices.items() if name in SETTINGS}
        return LearnSettings(method=self.method if self.method in METHODS else self.base, **changes)

    @property
    def options(self) -> dict[str, float]:
        """A rival's own options."""
        declared = RIVALS[self.method].options if self.method in RIVALS else {}
        return {name: float(self.choices.get(name, value)) for name, value in declared.items()}

    @property
    def merges(self) -> bool:
        """Whether it merges what `alone` learned."""
        return self.method in RIVALS and not RIVALS[self.method].own_learning

    @property
    def alone(self) -> Job:
        """The job that learns each concept alone, whose adapters a rival merges."""
        variant = "separate" if self.base == "lora" else f"separate base={self.base}"
        names = SETTINGS & set(self.choices)
        tuned = tuple(f"{name}={json.dumps(self.choices[name])}" for name in sorted(names))
        return replace(self, variant=variant, tuned=tuned)

    @property
    def subjects(self) -> list[Subject]:
        if self.real is None:
            return of_world(self.split, self.seed, self.concepts, self.order)
        found = of_folder(self.real.photographs, self.seed, self.real.size)
        return found[: self.concepts]

    @property
    def sequence(self) -> list[world.Concept]:
        """The concepts, of the world."""
        return [subject.concept for subject in self.subjects if subject.concept]

    @property
    def words(self) -> tuple[Words, Words]:
        """Words of the world that stay in the protected lists, and words that can be left out."""
        return split_words([subject.noun for subject in self.subjects], self.seed)

    @property
    def tokens(self) -> list[str]:
        return [f"V{number}" for number in range(1, self.concepts + 1)]

    @property
    def names(self) -> list[str]:
        """How prompts name the concepts: "V1 mug"."""
        return [f"{t} {s.noun}" for t, s in zip(self.tokens, self.subjects, strict=True)]

    @property
    def drawn_after(self) -> list[int]:
        """After which concepts, counted from 0, all so far are drawn; the last is one of them."""
        counts = (self.concepts,) if self.ends else (*DRAWN_AFTER, self.concepts)
        return sorted({n - 1 for n in counts if n <= self.concepts})

    @property
    def strip(self) -> list[int]:
        """After which concepts, counted from 0, a strip of pictures shows the first one."""
        return sorted({0, *self.drawn_after})

    @property
    def cells(self) -> list[tuple[int, int]]:
        """The cells (i, j) of R that are measured: after concept i, concept j is drawn."""
        rows = {(i, j) for i in self.drawn_after for j in range(i + 1)}
        diagonal = {(j, j) for j in range(self.concepts)}
        return sorted(rows | diagonal)

    @property
    def drawing(self) -> DrawSettings:
        usual = DrawSettings(steps=25, size=self.real.size) if self.real else DRAWING
        return replace(usual, steps=self.drawing_steps or usual.steps)

    @property
    def prompts(self) -> list[str]:
        """One per picture, {} stands for the concept; with the places of the real pictures that
        were not learned from. `retention` protects prompts like these.
        """
        places = PLACES if self.real else list(world.BACKGROUNDS.values())
        return [f"a photo of a {{}} {places[n % len(places)]}" for n in range(self.pictures)]

    @property
    def held_out_prompts(self) -> list[str]:
        """As many, from words that no list has, but for the world's places."""
        places = UNLISTED_PLACES if self.real else list(world.BACKGROUNDS.values())
        forms = HELD_OUT_FORMS if self.real else READ_BY_THE_MINI
        return [
            forms[n % len(forms)].replace("[]", places[n % len(places)])
            for n in range(self.pictures)
        ]

    def prompts_about(self, number: int) -> list[str]:
        return [prompt.format(self.names[number]) for prompt in self.prompts]

    def held_out_prompts_about(self, number: int) -> list[str]:
        return [prompt.format(self.names[number]) for prompt in self.held_out_prompts]

    def check(self) -> None:
        """Errors: ValueError for an unknown method or option, SettingError for a setting."""
        known = (*METHODS, *RIVALS, *BOUNDS)
        if self.method not in known:
            raise ValueError(f"unknown method {self.variant}; known: {', '.join(known)}")
        allowed = SETTINGS | set(self.options) | {"base", "lists"}
        for name in self.choices:
            if name not in allowed:
                raise ValueError(f"{self.variant}: there is no setting or option {name}")
        if self.merges:
            own = {change.partition("=")[0] for change in self.variant.split()[1:]}
            if own & SETTINGS - set(self.options):
                raise ValueError(f"{self.variant}: it merges what `{self.alone.variant}` learned")
        self.settings.check()


def sequence(split: str, seed: int, count: int) -> list[world.Concept]:
    """The first `count` concepts of a split in the order of this seed."""
    return [one.concept for one in of_world(split, seed, count) if one.concept]


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
