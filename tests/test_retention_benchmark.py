"""The retention benchmark itself, with one step a concept: its figures mean nothing, but they are the same however the jobs are spread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from comfy_continual_lora import store

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "retention" / "run.py"
pytestmark = pytest.mark.slow


def figures(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of plain LoRA and of one bound on two sequences of two concepts, but for what the clock says."""
    tiny = ["--methods", "lora rank=2,joint", "--seeds", "0,1", "--concepts", "2", "--steps", "1", "--pictures", "2"]
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(SCRIPT), str(out), *tiny, *arguments], check=True, env=env)
    return [{k: v for k, v in row.items() if k != "seconds_per_concept"} for row in json.loads((out / "table.json").read_text())]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    figures(out, "--processes", "1")
    return out


def test_it_writes_its_tables_and_pictures_and_does_nothing_twice(alone: Path) -> None:
    assert {p.name for p in alone.iterdir()} >= {"table.json", "table.csv", "table.md", "matrices.json", "heat-maps.png", "first-concept.png"}
    drawn = {p: p.stat().st_mtime_ns for p in alone.rglob("drawn/**/*.png")}
    assert len(drawn) == 2 * (3 + 2) * 2  # seeds, versions (all of the bound's are one stack's), pictures
    assert {store.open_stack(p).rank for p in alone.rglob("lora*/*.concepts.safetensors")} == {2}
    figures(alone, "--processes", "1")
    assert {p: p.stat().st_mtime_ns for p in alone.rglob("drawn/**/*.png")} == drawn


@pytest.mark.parametrize(("row", "told"), [("lore", "unknown method lore"), ("lora ranc=2", "ranc"), ("lora rank=0", "rank is 0; the range is")])
def test_a_mistaken_row_is_told_before_anything_runs(tmp_path: Path, row: str, told: str) -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), "--methods", row], capture_output=True, text=True)
    assert run.returncode == 2
    assert told in run.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_ray_cluster_of_two_workers_gives_the_same_figures(alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert figures(tmp_path, "--ray", "--processes", "2") == figures(alone, "--processes", "1")
