"""The retention benchmark itself, with one step a concept: its figures mean nothing, but they are
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

import pytest

from benchmarks.retention import run
from comfy_continual_lora import store

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "retention" / "run.py"
pytestmark = pytest.mark.slow


def figures(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of plain LoRA and of one bound on two sequences of two concepts, but for what the
    clock says.
    """
    tiny = [
        "--methods",
        "lora rank=2,joint",
        "--seeds",
        "0,1",
        "--concepts",
        "2",
        "--steps",
        "1",
        "--pictures",
        "2",
    ]
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(SCRIPT), str(out), *tiny, *arguments], check=True, env=env)
    return [
        {k: v for k, v in row.items() if k != "seconds_per_concept"}
        for row in json.loads((out / "table.json").read_text())
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    figures(out, "--processes", "1")
    return out


def test_it_writes_its_tables_and_pictures_and_does_nothing_twice(alone: Path) -> None:
    assert {p.name for p in alone.iterdir()} >= {
        "table.json",
        "table.csv",
        "table.md",
        "matrices.json",
        "heat-maps.png",
        "first-concept.jpg",
    }
    drawn = {p: p.stat().st_mtime_ns for p in alone.rglob("drawn/**/*.png")}
    assert (
        len(drawn) == 2 * (3 + 2) * 2
    )  # seeds, versions (all of the bound's are one stack's), pictures
    assert {store.open_stack(p).rank for p in alone.rglob("lora*/*.concepts.safetensors")} == {2}
    figures(alone, "--processes", "1")
    assert {p: p.stat().st_mtime_ns for p in alone.rglob("drawn/**/*.png")} == drawn


def test_a_table_of_what_is_done_runs_nothing(alone: Path, tmp_path: Path) -> None:
    whole = figures(alone, "--processes", "1")
    out = shutil.copytree(alone, tmp_path / "out")
    rows = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    rest = [
        row for row in rows if (json.loads(row)["method"], json.loads(row)["seed"]) != ("joint", 1)
    ]
    assert len(rest) == len(rows) - 1
    (out / "rows.jsonl").write_text("".join(rest))
    assert figures(out, "--done", "--seeds", "0,1,2", "--processes", "1") == [
        row for row in whole if (row["method"], row["seed"]) != ("joint", 1)
    ]
    assert [line.split(" | ")[:2] for line in (out / "table.md").read_text().splitlines()[2:4]] == [
        ["| lora rank=2", "2"],
        ["| joint", "1"],
    ]
    with pytest.raises(subprocess.CalledProcessError):
        figures(tmp_path / "empty", "--done")


def test_methods_are_compared_at_the_seeds_that_both_have() -> None:
    ends = {
        ("lora", 0): [5.0, 7.0],
        ("lora", 1): [2.0, 2.0],
        ("c_lora", 0): [4.0, 4.0],
        ("c_lora", 2): [90.0, 90.0],
    }
    ends |= {
        ("retention", 0): [4.0, 4.0],
        ("retention", 2): [90.0, 80.0],
        ("joint", 0): [1.0, 5.0],
        ("joint", 1): [0.0, 0.0],
    }
    rows = [
        {
            "method": m,
            "seed": seed,
            "matrix": [[0.0, None], end],
            **dict.fromkeys(run.PAPER["lora"], end[0]),
        }
        for (m, seed), end in ends.items()
    ]
    against, _, *pairs = run._paired(rows)
    assert "by `retention`" in against
    told, values = zip(*(line.split(", p = ") for line in pairs), strict=True)
    assert told == (
        "* `lora`: +2.0000, nearer in 0 of 2",
        "* `c_lora`: +2.5000, nearer in 0 of 4",
        "* `joint`: -1.0000, nearer in 1 of 2",
    )
    assert [float(p) for p in values] == pytest.approx(
        [0.5, 1, 1], abs=0.02
    )  # of all ways to flip the signs, by drawing some
    assert run._paired(rows[:4]) == []
    with_settings = [
        {**row, "method": row["method"].replace("retention", "retention rank=4")} for row in rows
    ]
    assert run._paired(with_settings) == [
        against.replace("retention", "retention rank=4"),
        "",
        *pairs,
    ]
    assert run._beside_paper(rows)[2] == "* a_mmd (1): here c_lora, lora; in the paper c_lora, lora"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("lore", "unknown method lore"),
        ("lora ranc=2", "ranc"),
        ("lora rank=0", "rank is 0; the range is"),
    ],
)
def test_a_mistaken_row_is_told_before_anything_runs(tmp_path: Path, row: str, told: str) -> None:
    refused = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "--methods", row],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert told in refused.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_ray_cluster_of_two_workers_gives_the_same_figures(alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert figures(tmp_path, "--ray", "--processes", "2") == figures(alone, "--processes", "1")
