"""The retention benchmark itself, with one step per concept: its figures mean nothing, but they are
the same however the jobs are spread.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tables

from comfy_continual_lora import store

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "retention" / "run.py"
VARIANTS = "lora rank=2,joint"
TINY = ["--seeds", "0,1", "--concepts", "2", "--steps", "1", "--pictures", "2"]
pytestmark = pytest.mark.slow


def figures(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of plain LoRA and of one bound on two sequences of two concepts, without what the
    clock says.
    """
    command = [sys.executable, str(SCRIPT), str(out), "--methods", VARIANTS, *TINY, *arguments]
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env)
    rows = json.loads((out / "table.json").read_text())
    for row in rows:
        del row["seconds_per_concept"]
    return rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    figures(out, "--processes", "1")
    return out


def test_it_writes_its_tables_and_pictures_and_does_nothing_twice(alone: Path) -> None:
    assert {path.name for path in alone.iterdir()} >= {
        "table.json",
        "table.csv",
        "table.md",
        "matrices.json",
        "heat-maps.png",
        "first-concept.jpg",
    }
    drawn = {path: path.stat().st_mtime_ns for path in alone.rglob("drawn/**/*.png")}
    # R of two concepts has three cells; the bound draws two of them, as all are one stack's
    seeds, cells, pictures = 2, 3 + 2, 2
    assert len(drawn) == seeds * cells * pictures
    stacks = alone.rglob("lora*/*.concepts.safetensors")
    assert {store.open_stack(path).rank for path in stacks} == {2}
    figures(alone, "--processes", "1")
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("drawn/**/*.png")} == drawn


def test_a_table_of_what_is_done_runs_nothing(alone: Path, tmp_path: Path) -> None:
    whole = figures(alone, "--processes", "1")
    out = shutil.copytree(alone, tmp_path / "out")
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not json.loads(line)["run"].startswith("joint-2-1-")]
    assert len(kept) == len(lines) - 1
    (out / "rows.jsonl").write_text("".join(kept))
    assert figures(out, "--done", "--seeds", "0,1,2", "--processes", "1") == [
        row for row in whole if (row["method"], row["seed"]) != ("joint", 1)
    ]
    table = (out / "table.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in table[2:4]] == [
        ["| lora rank=2", "2"],
        ["| joint", "1"],
    ]
    with pytest.raises(subprocess.CalledProcessError):
        figures(tmp_path / "empty", "--done")


ENDS = {  # distances at the end, by method and seed
    ("lora", 0): [5.0, 7.0],
    ("lora", 1): [2.0, 2.0],
    ("c_lora", 0): [4.0, 4.0],
    ("c_lora", 2): [90.0, 90.0],
    ("retention", 0): [4.0, 4.0],
    ("retention", 2): [90.0, 80.0],
    ("joint", 0): [1.0, 5.0],
    ("joint", 1): [0.0, 0.0],
}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "seed": seed,
            "matrix": [[0.0, None], end],
            **dict.fromkeys(tables.PAPER_COLUMNS, end[0]),
        }
        for (method, seed), end in ENDS.items()
    ]


def test_methods_are_compared_at_the_seeds_that_both_have(rows: list[dict[str, Any]]) -> None:
    title, _, *lines = tables.paired_tests(rows)
    assert "by `retention`" in title
    assert lines == [
        "* `lora`: +2.0000, closer in 0 of 2, p = 0.5, corrected 1",
        "* `c_lora`: +2.5000, closer in 0 of 4, p = 1, corrected 1",
        "* `joint`: -1.0000, closer in 1 of 2, p = 1, corrected 1",
    ]
    assert tables.paired_tests(rows[:4]) == []
    for row in rows:
        row["method"] = row["method"].replace("retention", "retention rank=4")
    title = title.replace("retention", "retention rank=4")
    assert tables.paired_tests(rows) == [title, "", *lines]


def test_a_concept_that_two_seeds_have_counts_once(rows: list[dict[str, Any]]) -> None:
    """The reporting sequences of seeds 0 and 1 share the concept that is fourth and first."""
    own = [{**row, "matrix": [[1.0, 0.0, 0.0, 0.0]]} for row in rows[:2]]
    default = [{**row, "method": "retention", "matrix": [[0.0] * 4]} for row in own]
    lines = tables.paired_tests([*own, *default])
    assert lines[2].startswith("* `lora`: +0.2143, closer in 0 of 7,")  # 1 and a half, of seven


def test_signs_are_flipped_in_all_ways_and_corrected_for_their_number() -> None:
    assert tables.sign_flip_test(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert tables.sign_flip_test(np.array([1.0, 1.0, -1.0])) == 1
    many = tables.sign_flip_test(np.linspace(0.5, 1.5, 30))
    assert many == pytest.approx(1 / (1 + tables.SIGN_FLIPS))
    assert tables.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert tables.holm([0.9, 0.8]) == [1.0, 1.0]


def test_kendalls_tau_and_its_exact_p() -> None:
    """Of the six orders of three things one has no inversion and one has three."""
    assert tables.kendall(3, 3) == (1.0, 2 / 6)
    assert tables.kendall(3, 2) == (1 / 3, 1.0)
    tau, p = tables.kendall(10, 32)
    assert (round(tau, 3), round(p, 3)) == (0.422, 0.108)


def test_methods_are_ordered_beside_the_papers(rows: list[dict[str, Any]]) -> None:
    line = tables.orders_beside_paper(rows)[2]
    assert (
        line == "* a_mmd (1; tau 1.00, exact p = 1): here c_lora, lora; in the paper c_lora, lora"
    )


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("lore", "unknown method lore"),
        ("lora ranc=2", "ranc"),
        ("lora rank=0", "rank is 0; the range is"),
    ],
)
def test_a_mistaken_method_or_setting_is_refused_before_anything_runs(
    tmp_path: Path, variant: str, message: str
) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--methods", variant]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_ray_cluster_of_two_workers_gives_the_same_figures(alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert figures(tmp_path, "--ray", "--processes", "2") == figures(alone, "--processes", "1")
