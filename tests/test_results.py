"""The figures of the results page are those of the benchmark's rows."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs import read_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "retention" / "results"
Columns = dict[str, Callable[[dict[str, Any]], float | None]]
# the table's columns after the method's name and the paper's figure
COLUMNS: Columns = {
    "A_MMD": lambda row: 1000 * row["a_mmd"],
    "F_MMD": lambda row: 1000 * row["f_mmd"],
    "newest": lambda row: 1000 * row["newest_mmd"],
    "I2I": lambda row: row["i2i"],
    "DC accuracy": lambda row: _percent(row["dc_accuracy"]),
    "both shapes": lambda row: _percent(row["both"]),
    "MB a concept": lambda row: row["bytes_per_concept"] / 1e6,
}

# those of the table with equal tuning, after the method's name
TUNED: Columns = {
    "A_MMD": lambda row: 1000 * row["a_mmd"],
    "encoder": lambda row: row["second"],
    "named": lambda row: _percent(row["named"]),
    "encoder, written": lambda row: row["held_out_second"],
    "named, written": lambda row: _percent(row["held_out_named"]),
    "leak, listed": lambda row: row["leak_listed"],
    "leak, written": lambda row: row["leak_written"],
    "drift": lambda row: 1000 * row["drift_listed"],
    "MB a concept": lambda row: row["bytes_per_concept"] / 1e6,
}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _table(first: str, page: Path = ROOT / "docs" / "results.md") -> list[list[str]]:
    """The cells of the page's table whose first line begins like this, its header first."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(first))
    rows = []
    for line in lines[start:]:
        if not line.lstrip().startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return [rows[0], *rows[2:]]


def _rows(folder: str) -> list[dict[str, Any]]:
    return list(read_rows(RESULTS / folder).values())


def _agrees(cell: str, values: Sequence[float]) -> bool:
    """Mean and, if the cell has it, spread, to the digits that the cell has."""
    numbers = re.findall(r"-?\d*\.?\d+", cell)
    expected = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
    return all(
        abs(float(number) - value) <= 0.5001 * 10 ** -len(number.partition(".")[2])
        for number, value in zip(numbers, expected, strict=False)
    )


@pytest.mark.parametrize(
    ("first", "columns", "folder"),
    [("| method | paper's A_MMD", COLUMNS, ""), ("| method, tuned", TUNED, "test-100")],
)
def test_the_tables_of_six_concepts(first: str, columns: Columns, folder: str) -> None:
    header, *table = _table(first)
    before = len(header) - len(columns)
    assert header[before:] == list(columns)
    rows = _rows(folder)
    assert {cells[0].strip("`") for cells in table} == {row["method"] for row in rows}
    for cells in table:
        own = [row for row in rows if row["method"] == cells[0].strip("`")]
        seeds = int(cells[1]) if header[1] == "seeds" else 3
        assert len(own) == len({row["seed"] for row in own}) == seeds, cells[0]
        for (name, value), cell in zip(columns.items(), cells[before:], strict=True):
            values = [v for row in own if (v := value(row)) is not None]
            assert bool(cell) == bool(values), (cells[0], name)
            assert not values or _agrees(cell, values), (cells[0], name, cell, values)


def test_the_table_of_harder_sequences() -> None:
    """Its first column is a seed of the table with equal tuning."""
    mixed, rows = (read_rows(RESULTS / folder) for folder in ("test-100", "harder"))
    orders = ("", "-one-noun", "-near-duplicates", "-adversarial")
    _, *table = _table("| of six concepts, one seed")
    assert {cells[0].strip("`") for cells in table} == {row["method"] for row in rows.values()}
    assert len(rows) == len(table) * (len(orders) - 1)
    for method, *cells in table:
        for order, cell in zip(orders, cells, strict=True):
            row = (rows if order else mixed)[f"{method.strip('`')}-6-1-100{order}"]
            values = [1000 * row["a_mmd"], row["second"], 100 * row["named"]]
            for number, value in zip(cell.split(","), values, strict=True):
                assert _agrees(number, [value]), (method, order)


def test_the_table_of_text_features_of_another_width() -> None:
    second = ROOT / "benchmarks" / "second"
    figures = json.loads((second / "wide.json").read_text())
    _, *table = _table("| text features |", second / "README.md")
    assert [cells[0] for cells in table] == list(figures)
    for width, *cells in table:
        alone, together = figures[width]["rows"]
        values = [100 * together["lost"], alone["a_mmd"], together["a_mmd"], together["rank"]]
        for cell, value in zip(cells, values, strict=True):
            assert _agrees(cell, [value]), (width, cell)


@pytest.mark.parametrize(("first", "folder"), [("twenty", "long"), ("fifty", "fifty")])
def test_the_table_of_longer_rows(first: str, folder: str) -> None:
    header, *table = _table("| after | `lora`")
    (cells,) = (one for one in table if one[0].startswith(first))
    rows = _rows(folder)
    for method, cell in zip(header[1:], cells[1:], strict=True):
        own = sorted((r["seed"], r["a_mmd"]) for r in rows if r["method"] == method.strip("`"))
        assert cell == ", ".join(f"{1000 * distance:.1f}" for _, distance in own), method


def test_the_table_of_two_in_one_prompt() -> None:
    ways = {
        "`--mixed`": "mixed",
        "as it is drawn": "areas",
        "`--beside`": "beside",
        "a picture each": "alone",
    }
    rows = json.loads((RESULTS / "together" / "pairs.json").read_text())
    _, *table = _table("  | two in one prompt")
    assert [cells[0] for cells in table] == list(ways)
    for name, *cells in table:
        for kind, (bled, near) in zip(
            ("different nouns", "one noun"), (cells[:2], cells[2:]), strict=True
        ):
            own = [row for row in rows if (row["way"], row["kind"]) == (ways[name], kind)]
            assert len(own) == 3
            for judge, cell in zip(("bled", "bled_2"), bled.split(","), strict=True):
                assert _agrees(cell, [100 * row[judge] for row in own]), (name, kind, judge)
            assert _agrees(near, [row["near"] for row in own]), (name, kind)


def test_a_figure_that_is_not_measured_is_noticed() -> None:
    assert _agrees("1.5 ± 0.5", [1.0, 1.5, 2.0])
    assert not _agrees("1.6 ± 0.5", [1.0, 1.5, 2.0])
    assert not _agrees("1.5 ± 0.6", [1.0, 1.5, 2.0])
