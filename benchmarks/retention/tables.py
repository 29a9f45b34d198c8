"""The retention benchmark's tables: means over seeds, a paired test of each method against
`retention`, and the order of the methods beside the paper's.
"""

from __future__ import annotations

import csv
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jobs import sequence

from comfy_continual_lora.settings import LearnSettings

Row = dict[str, Any]

COLUMNS = (
    "a_mmd",
    "f_mmd",
    "bwt_mmd",
    "kid",
    "i2i",
    "t2i",
    "newest_mmd",
    "dc_accuracy",
    "both",
    "bled",
    "seconds_per_concept",
    "bytes_per_concept",
)
PAPER_COLUMNS = ("a_mmd", "f_mmd", "kid", "i2i", "t2i")
HIGHER_IS_BETTER = ("i2i", "t2i")
# Jha et al. 2025: SD1.4, CustomConcept101, six tasks, three seeds; in the order of PAPER_COLUMNS.
# Their units are not ours, so only orderings can be compared.
_PAPER_ROWS = {
    "textual_inversion": (185.74, 0, 205.69, 60.74, 22.86),
    "custom_diffusion": (121.89, 0.62, 179.4, 69.53, 22.55),
    "custom_diffusion_ewc": (121.02, 0.506, 177.99, 69.44, 22.58),
    "lora": (176.38, 0.052, 203.11, 61.30, 22.97),
    "c_lora": (117.2, 0.034, 173.8, 64.89, 23.07),
    "lora_ewc": (105.07, 0.008, 156.91, 73.19, 22.15),
    "lora_ewc_dc": (102.81, 0.00052, 154.25, 73.41, 22.97),
    "lora_dsc": (198.45, 0.049, 187.2, 73.36, 22.57),
    "lora_dsc_ewc": (98.0, 0.02, 143.92, 72.92, 22.89),
    "lora_dsc_ewc_dc": (94.1, 0.003, 140.18, 73.17, 22.84),
}
PAPER: dict[str, dict[str, float]] = {
    method: dict(zip(PAPER_COLUMNS, figures, strict=True))
    for method, figures in _PAPER_ROWS.items()
}
SIGN_FLIPS = 20_000


def write(out: Path, rows: Sequence[Row]) -> None:
    """Write table.json, table.csv, table.md and matrices.json."""
    plain = [{"device": "cpu", **row} for row in rows]
    for row in plain:
        row.pop("matrix")
        row.pop("over")
    matrices = [{key: row[key] for key in ("method", "seed", "matrix")} for row in rows]
    (out / "table.json").write_text(json.dumps(plain, indent=1) + "\n")
    (out / "matrices.json").write_text(json.dumps(matrices) + "\n")
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, plain[0].keys())
        writer.writeheader()
        writer.writerows(plain)
    lines = [*means(plain), "", *paired_tests(rows), "", *orders_beside_paper(plain)]
    (out / "table.md").write_text("\n".join(lines) + "\n")


def means(rows: Sequence[Row]) -> list[str]:
    """A Markdown table with a row for each method."""
    lines = ["| method | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method in methods_of(rows):
        own = [row for row in rows if row["method"] == method]
        cells = [_mean_and_deviation(_values(own, column)) for column in COLUMNS]
        lines.append(f"| {method} | {len(own)} | " + " | ".join(cells) + " |")
    return lines


def methods_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _values(rows: Sequence[Row], column: str) -> list[float]:
    """What is known of a column; a GPU's seconds are not comparable and left out."""
    if column == "seconds_per_concept":
        rows = [row for row in rows if row["device"] == "cpu"]
    return [row[column] for row in rows if row[column] is not None]


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = 0 if abs(values[0]) >= 100 else 1 if abs(values[0]) >= 10 else 4
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _seeds(rows: Sequence[Row]) -> dict[str, set[int]]:
    """The seeds of each method; they differ while a table is still being made."""
    return {
        method: {row["seed"] for row in rows if row["method"] == method}
        for method in methods_of(rows)
    }


def paired_tests(rows: Sequence[Row]) -> list[str]:
    """How each method's distances at the end, R[N, j], differ from those of the default method, at
    the same seeds and concepts.

    A concept that several seeds have is one: its differences are averaged first. If the default
    method is there with settings only ("retention vectors=1"), the shortest such row is taken.
    """
    ends = {(row["method"], row["seed"]): row["matrix"][-1] for row in rows}
    seeds = _seeds(rows)
    defaults = [method for method in seeds if method.split()[0] == LearnSettings().method]
    default = min(defaults, key=len, default="")
    differences = {}
    for method in seeds:
        shared = sorted(seeds[method] & seeds.get(default, set()))
        if method != default and shared:
            by_concept: dict[str, list[float]] = {}
            for seed in shared:
                concepts = sequence("reporting", seed, len(ends[default, seed]))
                pairs = zip(concepts, ends[method, seed], ends[default, seed], strict=True)
                for concept, own, other in pairs:
                    by_concept.setdefault(concept.name, []).append(own - other)
            differences[method] = np.array([np.mean(pair) for pair in by_concept.values()])
    if not differences:
        return []
    probabilities = [sign_flip_test(one) for one in differences.values()]
    title = (
        f"Distance of each concept at the end minus the distance by `{default}`, at the seeds that "
        "both have, a concept counted once. p: of all ways to flip signs; corrected by Holm:"
    )
    lines = [title, ""]
    for (method, own), p, corrected in zip(
        differences.items(), probabilities, holm(probabilities), strict=True
    ):
        closer = int((own < 0).sum())
        lines.append(
            f"* `{method}`: {own.mean():+.4f}, closer in {closer} of {len(own)}, p = {p:.2g}, "
            f"corrected {corrected:.2g}"
        )
    return lines


def sign_flip_test(differences: np.ndarray) -> float:
    """p: of all ways to flip the signs of the differences, the share with so large a mean
    (two-sided).

    Up to sixteen differences all ways are tried. Of more, SIGN_FLIPS ways are drawn, and the signs
    as they are count as one of them, so that p is never 0.
    """
    count = len(differences)
    if count <= 16:
        signs = np.array(list(itertools.product((-1, 1), repeat=count)))
    else:
        drawn = np.random.default_rng(0).choice([-1, 1], (SIGN_FLIPS, count))
        signs = np.concatenate([np.ones((1, count)), drawn])
    as_large = np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-9)
    return float(as_large.mean())


def holm(probabilities: Sequence[float]) -> list[float]:
    """p values corrected for their number. Source: Holm 1979."""
    corrected, largest = [0.0] * len(probabilities), 0.0
    order = sorted(range(len(probabilities)), key=lambda n: probabilities[n])
    for done, n in enumerate(order):
        largest = max(largest, min(1.0, probabilities[n] * (len(order) - done)))
        corrected[n] = largest
    return corrected


def kendall(count: int, same_order: int) -> tuple[float, float]:
    """tau of two orders of `count` things that agree on so many pairs, and its exact p: the share of
    all orders that are at least so far from chance (two-sided).
    """
    inversions = [1]  # how many orders of the first n things have so many inversions
    for n in range(2, count + 1):
        longer = [0] * (len(inversions) + n - 1)
        for number, orders in enumerate(inversions):
            for more in range(n):
                longer[number + more] += orders
        inversions = longer
    pairs = count * (count - 1) // 2
    score = abs(2 * same_order - pairs)
    as_far = sum(o for number, o in enumerate(inversions) if abs(pairs - 2 * number) >= score)
    return (2 * same_order - pairs) / pairs, as_far / sum(inversions)


def orders_beside_paper(rows: Sequence[Row]) -> list[str]:
    """For each figure the paper has too: the methods in order, here (at the seeds that all of them
    have) and there.
    """
    seeds = {method: own for method, own in _seeds(rows).items() if method in PAPER}
    shared = set.intersection(*seeds.values()) if seeds else set()
    if not shared or len(seeds) < 2:
        return []
    ours: dict[str, dict[str, float]] = {}
    for method in seeds:
        own = [row for row in rows if row["method"] == method and row["seed"] in shared]
        ours[method] = {c: sum(row[c] for row in own) / len(own) for c in PAPER_COLUMNS}
    pairs = list(itertools.combinations(ours, 2))
    title = (
        f"The paper's methods from best to worst at seed {', '.join(map(str, sorted(shared)))}; "
        f"of their {len(pairs)} pairs so many are in the paper's order:"
    )
    lines = [title, ""]
    for column in PAPER_COLUMNS:
        same_order = sum(
            (ours[a][column] - ours[b][column]) * (PAPER[a][column] - PAPER[b][column]) > 0
            for a, b in pairs
        )
        here, there = (_ranking(ours, figures, column) for figures in (ours, PAPER))
        tau, p = kendall(len(ours), same_order)
        lines.append(
            f"* {column} ({same_order}; tau {tau:.2f}, exact p = {p:.2g}): here {here}; in the paper "
            f"{there}"
        )
    return lines


def _ranking(methods: Iterable[str], figures: dict[str, dict[str, float]], column: str) -> str:
    """The methods from best to worst."""
    reverse = column in HIGHER_IS_BETTER
    return ", ".join(sorted(methods, key=lambda m: figures[m][column], reverse=reverse))
