"""The retention benchmark itself, with one step per concept: its figures mean nothing, but they are
the same however the jobs are spread.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import run
import selected
import tables
from change import Run
from judges import Budget, load_judges

from comfy_continual_lora import store

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "retention" / "run.py"
VARIANTS = "lora rank=2,joint"
TINY = [
    "--seeds",
    "0,1",
    "--concepts",
    "2",
    "--steps",
    "1",
    "--pictures",
    "2",
    "--drawing-steps",
    "2",
]
pytestmark = pytest.mark.slow


def figures(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of plain LoRA and of one bound on two sequences of two concepts, without what the
    clock says.
    """
    judges = ["--judges", str(out.parent / "judges")]
    load_judges(out.parent / "judges", Budget(16, 2, 2, 8))
    command = [sys.executable, str(SCRIPT), str(out), "--methods", VARIANTS, *TINY, *judges]
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], check=True, env=env)
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
    # R of two concepts has three cells; the bound draws two of them, as all are one stack's. Both
    # are drawn once more by prompts that nothing protects
    seeds, cells, pictures = 2, (3 + 2) + (2 + 2), 2
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


def test_loras_of_some_concepts_are_drawn_by_the_runs_own_prompts(
    alone: Path, tmp_path: Path
) -> None:
    (folder,) = alone.glob("runs/lora-rank=2-2-0-*")
    rows = selected.measure(Run(folder, 2), tmp_path, [1], 1)
    assert [row["size"] for row in rows] == [1, 2]
    for size, concept in ((1, 0), (1, 1), (2, 0), (2, 1)):
        drawn = tmp_path / "runs" / folder.name / "drawn" / f"{size}-{concept}"
        assert len(list(drawn.iterdir())) == 2


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


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """Without their intervals."""
    title, *lines = [line for line in tables.differences(rows) if line]
    return [title, *(re.sub(r" \(.*?\)", "", line) for line in lines)]


def test_methods_are_compared_at_the_seeds_that_both_have(rows: list[dict[str, Any]]) -> None:
    title, *lines = differences(rows)
    assert "from `retention`" in title
    assert lines == [
        "* `lora`: +2.0000, closer in 0 of 2, p = 0.5, corrected 1",
        "* `c_lora`: +2.5000, closer in 0 of 4, p = 1, corrected 1, equivalent",
        "* `joint`: -1.0000, closer in 1 of 2, p = 1, corrected 1",
    ]
    assert tables.differences(rows[:4]) == []
    for row in rows:
        row["method"] = row["method"].replace("retention", "retention rank=4")
    title = title.replace("retention", "retention rank=4")
    assert differences(rows) == [title, *lines]


def test_a_concept_that_two_seeds_have_counts_once(rows: list[dict[str, Any]]) -> None:
    """The reporting sequences of seeds 0 and 1 share the concept that is fourth and first."""
    own = [{**row, "matrix": [[1.0, 0.0, 0.0, 0.0]]} for row in rows[:2]]
    default = [{**row, "method": "retention", "matrix": [[0.0] * 4]} for row in own]
    assert "closer in 0 of 7" in differences([*own, *default])[1]


def pairs(values: list[list[float]]) -> pd.DataFrame:
    """Differences of concepts (columns) at seeds (lines), from a default of 1."""
    cells = [
        {"concept": f"c{n}", "seed": seed, "difference": value, "default": 1.0}
        for seed, line in enumerate(values)
        for n, value in enumerate(line)
    ]
    return pd.DataFrame(cells)


def test_an_interval_counts_concepts_and_seeds_not_cells() -> None:
    """The same ten concepts at three seeds, alike at each: no more is known than from one seed."""
    line = [float(value) for value in np.random.default_rng(0).normal(1, 1, 10)]
    once, thrice = (tables.mixed_mean(pairs([line] * seeds)) for seeds in (1, 3))
    noise = np.random.default_rng(1).normal(0, 0.05, (3, 10))
    noisy = tables.mixed_mean(pairs((np.array([line] * 3) + noise).tolist()))
    apart = tables.mixed_mean(pairs(np.random.default_rng(2).normal(1, 1, (3, 10)).tolist()))
    assert once[0] == pytest.approx(np.mean(line))
    assert noisy[0] == pytest.approx(once[0], abs=0.05)
    width = once[2] - once[1]
    assert noisy[2] - noisy[1] == pytest.approx(width, rel=0.2)  # Student's is a bit wider
    assert apart[2] - apart[1] < 0.8 * width  # where cells do differ, more of them say more
    assert thrice == pytest.approx(once)


def test_an_interval_is_found_where_the_model_has_none() -> None:
    """`separate` beside `retention`, three seeds of the test split, of which few concepts are two's."""
    names = list("abcdefdghijklmhcng")
    percent = [-2, -1, -15, 16, -4, -6, -23, -4, -5, -2, 13, 29, 1, 4, 1, -6, 3, 0]
    few = pd.DataFrame({"concept": names, "seed": [n // 6 for n in range(18)]})
    mean, low, high = tables.mixed_mean(few.assign(difference=[one / 100 for one in percent]))
    assert low < mean < high
    assert mean == pytest.approx(0.012, abs=0.001)


@pytest.mark.parametrize(
    ("low", "high", "same"), [(-0.1, 0.1, True), (-0.1, 0.3, False), (0.15, 0.35, False)]
)
def test_equivalent_is_more_than_no_difference_found(low: float, high: float, same: bool) -> None:
    assert tables.equivalent((low + high) / 2, low, high, margin=0.2) is same


def test_signs_are_flipped_in_all_ways() -> None:
    assert tables.sign_flip_test(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert tables.sign_flip_test(np.array([1.0, 1.0, -1.0])) == 1
    many = tables.sign_flip_test(np.linspace(0.5, 1.5, 30))
    assert 0 < many <= 2 / tables.SIGN_FLIPS


def test_methods_are_ordered_beside_the_papers(rows: list[dict[str, Any]]) -> None:
    line = tables.orders_beside_paper(rows)[2]
    assert line == "* a_mmd (tau 1.00, p = 1): here c_lora, lora; in the paper c_lora, lora"


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("lore", "unknown method lore"),
        ("lora ranc=2", "ranc"),
        ("lora rank=0", "rank is 0; the range is"),
        ("ties densiti=.2", "no setting or option densiti"),
        ("ties rank=4 rate=1e-3", "it merges what `separate` learned"),
    ],
)
def test_a_mistaken_method_or_setting_is_refused_before_anything_runs(
    tmp_path: Path,
    variant: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path), "--methods", variant])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_ray_cluster_of_two_workers_gives_the_same_figures(alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert figures(tmp_path, "--ray", "--processes", "2") == figures(alone, "--processes", "1")
