"""The notebook runs from its first cell to its last, on the miniature."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "continual_lora.ipynb"


def _cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def _source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize("own", [False, True], ids=["examples", "own pictures"])
def test_it_runs(
    own: bool,
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown: list[Image.Image] = []
    display = ModuleType("IPython.display")
    display.display = shown.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setitem(sys.modules, "google.colab", None)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in _cells():
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or "install" in tags:
            continue
        exec(compile(_source(cell), NOTEBOOK.name, "exec"), names)
        if "parameters" in tags:
            names |= {"STEPS": 2, "CHECKPOINT": checkpoint}
            if own:
                names |= {"THINGS": [(pictures, "V7", "ball")], "OUT": "drive/MyDrive/kept"}
    assert len(shown) == (1 if own else 3)
    assert all(isinstance(one, Image.Image) for one in shown)
    kept = tmp_path / names["OUT"]
    assert (kept / "exported.zip").is_file()
    assert list((kept / "exported").glob("*.safetensors"))
    said = capsys.readouterr().out
    assert "learn 100 %" in said
    assert ("Learned V7 ball" if own else "Learned V2 ") in said


def test_it_holds_no_results() -> None:
    for cell in _cells():
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
