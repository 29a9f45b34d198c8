"""What `evaluate` found: how like the user's pictures each concept is, in numbers and in words.

R[i, j] = likeness of concept j, drawn after concept i was learned, to its reference (i >= j)
floor   = likeness of what the checkpoint without the stack draws for the class noun
own     = likeness of the reference pictures to each other
near[j] = (R[N, j] - floor[j]) / (own[j] - floor[j])    0: any thing of its noun
                                                        1: as another picture of it
kept[j] = (R[N, j] - floor[j]) / (R[j, j] - floor[j])   1: as when it had just been learned
          none if it was at the floor when it had just been learned: there is nothing to keep
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

# what concepts are compared with, in words
REFERENCES = {
    "pictures": "your pictures",
    "features": "what the stack keeps of your pictures",
    "thumbnail": "the thumbnail of its first picture",
    "drawn": "what was drawn when it was new",
}
# Shares of the way from the class noun to the user's own pictures. On the mini-SD .3 has nothing of
# the thing, .75 is a blob of one of its colours, .84 and more is the thing (benchmarks/LOG.md)
WELL, PARTLY = 0.8, 0.5
FADED = 0.7  # share kept


@dataclass(frozen=True)
class RetentionReport:
    """n concepts: their names in prompts; likeness R (n, n), NaN if i < j; floor, kept (n,); DC
    scores of the references (n,), NaN without scores; own (n,), NaN for a reference of one picture;
    spread (n,): the standard error of R[N, j] - floor[j]; what each is compared with (REFERENCES).

    pictures[i, j] are those of concept j drawn after concept i, counted from 0.
    """

    names: list[str]
    likeness: Tensor
    floor: Tensor
    recognised: Tensor
    pictures: dict[tuple[int, int], list[Image]]
    own: Tensor
    spread: Tensor
    reference: list[str]
    chart: Path | None = None

    def summary(self) -> str:
        """One line per concept: its likeness when just learned and now, the class noun's likeness,
        its pictures' to each other, the share kept, the DC score now. Then a verdict on each.
        """
        lines = ["concept                  noun   learned    now   own    kept  DC score"]
        for j, name in enumerate(self.names):
            learned, now = _column(self.likeness[j, j]), _column(self.likeness[-1, j])
            kept = _or_dash(100 * float(self.kept[j]), ".0f", 4, " %")
            lines.append(
                f"{name[:24]:<24}{_column(self.floor[j])}  {learned} {now}{_column(self.own[j])} "
                f"{kept}    {_column(self.recognised[j])}"
            )
        return "\n".join([*lines, "", *self.verdicts, self.verdict])

    def as_json(self) -> dict[str, Any]:
        """`kept`: a share for each concept in order, null if there is no share."""
        values = {
            "likeness": self.likeness,
            "floor": self.floor,
            "own": self.own,
            "near": self.near,
            "kept": self.kept,
            "recognised": self.recognised,
        }
        plain = {name: _without_nan(tensor.tolist()) for name, tensor in values.items()}
        words = {"verdicts": self.verdicts, "verdict": self.verdict, "reference": self.reference}
        chart = str(self.chart) if self.chart else None
        return {"concepts": self.names, **plain, **words, "table": self.summary(), "chart": chart}

    @property
    def kept(self) -> Tensor:
        """NaN for a concept that never was like the pictures even in part: nothing is to be kept."""
        learned = self.likeness.diagonal() - self.floor
        share = (self.likeness[-1] - self.floor) / learned
        there = learned > torch.clamp(2 * self.spread, min=0.01)
        there &= ~(self._near(self.likeness.diagonal()) < PARTLY)
        return torch.where(there, share, torch.nan)

    @property
    def near(self) -> Tensor:
        """How far from the class noun to the user's own pictures. A single picture does not say how
        alike several are, so it is as if they were the same, which is the farthest: it is at least as
        near as this. NaN without any.
        """
        return self._near(self.likeness[-1])

    def _near(self, likeness: Tensor) -> Tensor:
        """likeness (n,), of each concept."""
        compared = torch.tensor([one != "drawn" for one in self.reference])
        way = torch.where(compared, self.own.nan_to_num(1.0), torch.nan) - self.floor
        return torch.where(way > 0.01, (likeness - self.floor) / way, torch.nan)

    def shade(self, i: int, j: int) -> float:
        """How good R[i, j] is to look at: 0 if it is less than "partly", 1 from where it is "well";
        without the user's pictures, 1 is as when it was new.
        """
        near = float(self._near(self.likeness[i])[j])
        if near == near:
            return min(1.0, max(0.0, (near - PARTLY) / (WELL - PARTLY)))
        floor, now, new = (float(x[j]) for x in (self.floor, self.likeness[i], self.likeness[j]))
        return min(1.0, max(0.0, (now - floor) / max(new - floor, 0.01)))

    @property
    def grades(self) -> list[str]:
        """For each concept: "well", "partly", "floor" (like any thing of its noun) or "unknown"
        (compared with nothing of the user's).
        """
        return [self._grade(j) for j in range(len(self.names))]

    def _grade(self, j: int) -> str:
        if self.reference[j] == "drawn":
            return "unknown"
        near, gain = float(self.near[j]), float(self.likeness[-1, j] - self.floor[j])
        if gain <= 2 * float(self.spread[j]) or near < PARTLY:
            return "floor"
        return "partly" if near < WELL else "well"

    @property
    def verdicts(self) -> list[str]:
        """A sentence for each concept."""
        return [self._verdict(j, grade) for j, grade in enumerate(self.grades)]

    def _verdict(self, j: int, grade: str) -> str:
        name, kept = self.names[j], float(self.kept[j])
        compared = ""
        if self.reference[j] != "pictures":
            compared = f" (compared with {REFERENCES[self.reference[j]]})"
        faded = f", but it has faded: {100 * kept:.0f} % is left" if kept < FADED else ""
        if grade == "well":
            return f"{name}: looks like your pictures{compared}{faded}."
        if grade == "partly":
            least = "at least " if self.own[j].isnan() else ""
            return f"{name}: looks like your pictures {least}in part{compared}{faded}."
        if grade == "unknown":
            still = f"drawn as when it was new, to {100 * kept:.0f} %" if kept == kept else "drawn"
            return f"{name}: {still}; whether it looks like the thing is not known."
        if kept == kept:
            return f"{name}: forgotten; it looks like any thing of its kind again{compared}."
        return f"{name}: not learned; it looks like any thing of its kind{compared}."

    @property
    def verdict(self) -> str:
        """A sentence on the whole stack, and what to do."""
        grades, count = self.grades, len(self.names)
        bad = [name for name, grade in zip(self.names, grades, strict=True) if grade == "floor"]
        some = [name for name, grade in zip(self.names, grades, strict=True) if grade == "partly"]
        known = [grade for grade in grades if grade != "unknown"]
        if not known:
            return "Whether it is good is not known: give your pictures to compare with."
        if bad:
            return (
                f"In all: not good. {_listed(bad)} {'has' if len(bad) == 1 else 'have'} to be learned "
                "again, with more steps or better pictures."
            )
        shares = zip(self.names, self.kept.tolist(), strict=True)
        faded = [name for name, share in shares if share < FADED]
        if faded:
            since = "it was" if len(faded) == 1 else "they were"
            return f"In all: fair. {_listed(faded)} faded since {since} learned."
        if some:
            once = any(own != own for own in self.own.tolist())
            better = "; compared with all your pictures it would be told better" if once else ""
            return f"In all: fair. More steps or pictures may bring {_listed(some)} nearer{better}."
        return "In all: good." if count > 1 else "Good."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _column(value: Tensor) -> str:
    return _or_dash(float(value), ".2f", 6)


def _or_dash(value: float, form: str, width: int, unit: str = "") -> str:
    """A number right-aligned, or a dash for NaN."""
    return ("-" if value != value else f"{value:{form}}{unit}").rjust(width + len(unit))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if value != value else value
