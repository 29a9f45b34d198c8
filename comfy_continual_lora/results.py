"""What operations return: `summary()` for people, `as_json()` for programs. Light."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .files import STACKS, with_name
from .presets import CLIP_SKIP_2
from .progress import counted

if TYPE_CHECKING:
    from PIL.Image import Image

    from .classifier import Scores
    from .stack import ConceptRecord
    from .versions import Version


class Result(Protocol):
    """What an operation returns."""

    def summary(self) -> str:
        """For people: one sentence per line."""
        ...

    def as_json(self) -> Any:
        """For programs: paths as strings, null if there is no number."""
        ...


@dataclass(frozen=True)
class LearnResult:
    """`again`: the same request was learned before, so nothing was done now; `losses` are then those
    that the stack keeps. `scores`: of as many of its pictures as were asked for.
    """

    record: ConceptRecord
    losses: list[float]
    stack_file: Path
    again: bool = False
    scores: ScoreResult | None = None

    def summary(self) -> str:
        name = self.record.name
        if self.again:
            return (
                f"{name} is already on the stack, learned from the same pictures and settings on "
                f"{self.record.learned[:10]}; nothing was done."
            )
        pictures = counted(self.record.images, "picture")
        done = f"Learned {name} from {pictures}; stored in {self.stack_file}"
        if self.record.watched:
            done += f"\n{self._watched()}"
        if self.record.settings.get("clip_skip") == 2:
            done += f"\n{CLIP_SKIP_2}"
        return done if self.scores is None else f"{done}\n{self.scores.summary()}"

    def _watched(self) -> str:
        looks = {int(step): likeness for step, likeness, _ in self.record.watched}
        at = looks.get(self.record.steps, self.record.watched[-1][1])
        return (
            f"As of step {self.record.steps} it predicts the pictures held out {at:.1%} better "
            f"than the bare checkpoint (at most: {max(looks.values()):.1%})."
        )

    def as_json(self) -> dict[str, Any]:
        scores = self.scores and self.scores.as_json()["images"]
        return {
            **_concept(self),
            "noun": self.record.noun,
            "loss": self.record.loss,
            "watched": self.record.watched,
            **({"scores": scores} if scores else {}),
        }


@dataclass(frozen=True)
class ConsolidateResult:
    """`again` as in `LearnResult`; `earlier`: how many concepts came before."""

    record: ConceptRecord
    losses: list[float]
    stack_file: Path
    earlier: int = 0
    again: bool = False

    def summary(self) -> str:
        if self.again:
            return (
                f"{self.record.name} was already consolidated with the same pictures and settings; "
                "nothing was done."
            )
        return (
            f"Consolidated {self.record.name} with the {self.earlier} before it in "
            f"{counted(len(self.losses), 'step')}; stored in {self.stack_file}"
        )

    def as_json(self) -> dict[str, Any]:
        return _concept(self)


def _concept(result: LearnResult | ConsolidateResult) -> dict[str, Any]:
    return {
        "token": result.record.token,
        "losses": result.losses,
        "stack_file": str(result.stack_file),
        "again": result.again,
    }


@dataclass(frozen=True)
class SolveResult:
    """By concept: how much is lost of what its own adapter did to its prompts, as a share.

    Prompts that also name another concept are left out: the two have different targets there.
    """

    rank: int  # by the energy rule; the stack's LoRA may have more
    before: dict[str, float]
    after: dict[str, float]

    def summary(self) -> str:
        lines = [f"Solved for {len(self.after)} concepts at once, with rank {self.rank}."]
        for name, after in self.after.items():
            lines.append(
                f"{name}: {self.before[name]:.2%} of what it did was lost, now {after:.2%}"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ForgetResult:
    record: ConceptRecord
    stack_file: Path

    def summary(self) -> str:
        return (
            f"Forgot {self.record.name}: its word, its preview and what the LoRA knew of it are "
            f"gone from {self.stack_file}\n"
            "Files exported before still contain it. Undo brings it back; to remove it for good, "
            "keep no earlier version in the history."
        )

    def as_json(self) -> dict[str, Any]:
        return {"token": self.record.token, "noun": self.record.noun}


@dataclass(frozen=True)
class MergeResult:
    """`added`: how prompts name the new concepts; `renamed`: the new names of words both had."""

    added: list[str]
    renamed: dict[str, str]
    stack_file: Path

    def summary(self) -> str:
        if not self.added:
            return f"{self.stack_file} already has all concepts of the other; nothing was done."
        lines = [f"Put {', '.join(self.added)} on {self.stack_file}"]
        lines += [
            f"Its {old} is {new} here, since {old} was taken." for old, new in self.renamed.items()
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "stack_file": str(self.stack_file)}


@dataclass(frozen=True)
class ImportResult:
    """`rest`: what the LoRA changes besides, in words; `kept`: the file that has it."""

    record: ConceptRecord
    lora: Path
    again: bool = False
    rest: str = ""
    kept: Path | None = None

    def summary(self) -> str:
        done = f"{self.lora} is {'already' if self.again else 'now'} on the stack as {self.record.name}"
        if self.again and not self.kept:
            return f"{done}; nothing was done."
        if self.kept:
            strength = self.record.settings.get("strength", 1.0)  # early versions didn't store it
            return (
                f"{done}. In {self.kept}: its {self.rest}. Load that too, at strength {strength:g}."
            )
        return f"{done}. Left out: its {self.rest}." if self.rest else f"{done}."

    def as_json(self) -> dict[str, Any]:
        return {
            "token": self.record.token,
            "noun": self.record.noun,
            "again": self.again,
            "rest": self.rest,
            "kept": self.kept and str(self.kept),
        }


@dataclass(frozen=True)
class Scored:
    """One picture's scores; `label` is the token that its folder is named after, if any."""

    file: Path
    label: str | None
    scores: Scores

    @property
    def right(self) -> bool | None:
        return None if self.label is None else self.scores.best == self.label

    @property
    def probabilities(self) -> dict[str, float]:
        return dict(zip(self.scores.names, self.scores.probabilities, strict=True))


@dataclass(frozen=True)
class ScoreResult:
    images: list[Scored]
    chart: Path | None = None

    @property
    def accuracy(self) -> float | None:
        """Share of the labelled pictures whose best concept is their label."""
        judged = [one.right for one in self.images if one.right is not None]
        return sum(judged) / len(judged) if judged else None

    def summary(self) -> str:
        """Pictures by their files' names, with their folders' if there are several."""
        lines, several = [], len({one.file.parent for one in self.images}) > 1
        for one in self.images:
            folder = f"{with_name(one.file.parent).name}/" if several else ""
            name = f"{folder}{one.file.name}"
            shares = "  ".join(f"{word} {p:.2f}" for word, p in one.probabilities.items())
            unsure = "" if one.scores.sure else "(not sure)"
            lines.append(f"{name:<24} {shares}  {unsure}".rstrip())
        judged = [one.right for one in self.images if one.right is not None]
        if judged:
            lines.append(f"right: {sum(judged)} of {len(judged)} ({self.accuracy:.0%})")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "images": [
                {
                    "file": str(one.file),
                    "label": one.label,
                    "best": one.scores.best,
                    "right": one.right,
                    "sure": one.scores.sure,
                    "probabilities": one.probabilities,
                    "margin": [one.scores.margin, one.scores.margin_low, one.scores.margin_high],
                }
                for one in self.images
            ],
            "accuracy": self.accuracy,
            "chart": str(self.chart) if self.chart else None,
        }


@dataclass(frozen=True)
class Drawn:
    """`texts`: what its PNG says of it, by name (`infotext`)."""

    prompt: str
    seed: int
    image: Image
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DrawResult:
    """`files`: where the pictures are, and a grid of several; empty if no folder was given."""

    pictures: list[Drawn]
    files: list[Path]

    def summary(self) -> str:
        return "\n".join(map(str, self.files)) or f"Drew {counted(len(self.pictures), 'picture')}."

    def as_json(self) -> dict[str, Any]:
        return {"files": [str(path) for path in self.files]}


@dataclass(frozen=True)
class RenameResult:
    """`name`: how prompts name the concept now; `unfinished`: files of runs about either word, which
    are not continued any more.
    """

    token: str
    to: str
    name: str
    stack_file: Path
    unfinished: list[Path]

    def summary(self) -> str:
        lines = [
            f"Renamed {self.token} to {self.to}: prompts say {self.name} from now on.",
            f"Files exported before still say {self.token}; export again for the new word.",
        ]
        if self.unfinished:
            names = ", ".join(path.name for path in self.unfinished)
            lines.append(f"Unfinished runs that no longer fit, and can be removed: {names}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        paths = {
            "stack_file": str(self.stack_file),
            "unfinished": [str(path) for path in self.unfinished],
        }
        return {**dataclasses.asdict(self), **paths}


@dataclass(frozen=True)
class UndoResult:
    """What was undone."""

    change: str
    token: str  # of the concept it was about
    noun: str
    tokens: list[str]  # on the stack now
    version: int  # the number of the version that was undone

    def summary(self) -> str:
        return (
            f"Undone: {self.change}. The stack now holds "
            f"{', '.join(self.tokens) or 'no concept'}.\n"
            f"What was undone is version {self.version} of the history and can be restored."
        )

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RestoreResult:
    version: Version

    def summary(self) -> str:
        tokens = ", ".join(self.version.tokens) or "no concept"
        return (
            f"The stack is at version {self.version.number} ({self.version.change}) and holds "
            f"{tokens}."
        )

    def as_json(self) -> dict[str, Any]:
        one = self.version
        return {"version": one.number, "change": one.change, "tokens": one.tokens}


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.0f} kB"


@dataclass(frozen=True)
class HistoryResult:
    """The versions that are kept, the newest first."""

    versions: list[Version]
    stack_file: Path

    def summary(self) -> str:
        if not self.versions:
            return f"Nothing has been learned yet: there is no stack {self.stack_file}"
        lines = []
        for one in self.versions:
            mark = "*" if one.current else " "
            when = one.when[:16].replace("T", " ")
            lines.append(
                f"{mark} {one.number:>3}  {when:<16}  {_size(one.size):>8}  {one.change}  "
                f"[{', '.join(one.tokens)}]"
            )
        others = [one.size for one in self.versions if not one.current]
        last = "* is in use."
        if others:
            kept = "1 other version takes" if len(others) == 1 else f"{len(others)} others take"
            last += f" {kept} {_size(sum(others))}; restore NUMBER goes to one."
        return "\n".join([*lines, last])

    def as_json(self) -> list[dict[str, Any]]:
        return [{**dataclasses.asdict(one), "file": str(one.file)} for one in self.versions]


@dataclass(frozen=True)
class InfoResult:
    """`concepts`: the records as the stack's header holds them; `fingerprint` and `rank` are None if
    nothing was learned.
    """

    concepts: list[dict[str, Any]]
    stack_file: Path
    fingerprint: str | None
    rank: int | None
    trainable_parameters: int
    clip_skip: int = 1

    def summary(self) -> str:
        if self.fingerprint is None:
            return f"Nothing has been learned yet. It will be stored in {self.stack_file}"
        widths = [max([len(one[key]) for one in self.concepts] or [0]) for key in ("token", "noun")]
        lines = [str(self.stack_file)]
        for one in self.concepts:
            name = "  ".join(
                one[k].ljust(w) for k, w in zip(("token", "noun"), widths, strict=True)
            )
            when = one["learned"][:16].replace("T", " ")
            counts = f"{counted(one['images'], 'picture')}, {counted(one['steps'], 'step')}"
            how = f"{counts}, {one['method']}, {when}"
            lines.append(f"  {name}  {how}")
        if not self.concepts:
            lines.append("  no concepts yet")
        lines.append(
            f"rank {self.rank}, {self.trainable_parameters:,} trainable parameters, checkpoint "
            f"{self.fingerprint[:12]}"
        )
        if self.clip_skip != 1:
            lines.append(f"clip skip {self.clip_skip}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "stack_file": str(self.stack_file)}


@dataclass(frozen=True)
class Listed:
    """A checkpoint's stack, or one whose checkpoint is not beside it as a file; `names`: how prompts
    name what is learned.
    """

    checkpoint: Path | None
    stack_file: Path | None = None
    names: Sequence[str] = ()
    problem: str = ""


@dataclass(frozen=True)
class ListResult:
    folder: Path
    rows: list[Listed]

    def summary(self) -> str:
        lines = []
        for row in self.rows:
            stack = row.stack_file
            file = row.checkpoint or stack
            own = row.checkpoint and stack and stack.name == f"{row.checkpoint.stem}{STACKS}"
            also = f" ({stack.name})" if row.checkpoint and stack and not own else ""
            lines.append(f"{file}{also}")
            lines.append(f"    {row.problem or ', '.join(row.names) or 'nothing learned yet'}")
        return "\n".join(lines) or f"There is no checkpoint in {self.folder}."

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "checkpoint": str(row.checkpoint) if row.checkpoint else None,
                "stack_file": str(row.stack_file) if row.stack_file else None,
                "names": list(row.names),
                "problem": row.problem or None,
            }
            for row in self.rows
        ]
