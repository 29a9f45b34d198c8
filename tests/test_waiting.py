"""Our own processes say how threads wait before torch is imported; a host's process is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_continual_lora import cli
from comfy_continual_lora.waiting import LOOKS

ROOT = Path(__file__).parents[1]
NAMES = ("OMP_WAIT_POLICY", *LOOKS)
# Ends at the first import of torch, and says what is set there
UNTIL_TORCH = f"""
import json, os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            found = {{name: os.environ[name] for name in {NAMES} if name in os.environ}}
            os.write(2, json.dumps(found).encode())
            os._exit(0)

sys.meta_path.insert(0, Watch())
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def _set_at_torch(module: str, *words: str, given: str = "", **users: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH, module, *words],
        input=given,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**plain, **users},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr)


def test_the_command_line_says_it_before_torch_is_imported(tmp_path: Path) -> None:
    assert _set_at_torch("comfy_continual_lora", "mini", str(tmp_path / "a")) == LOOKS


def test_the_worker_says_it_before_torch_is_imported(tmp_path: Path) -> None:
    request = {"checkpoint": str(tmp_path), "prompts": ["a mug"]}
    line = json.dumps({"jobs": [{"job": "draw", "request": request}]}) + "\n"
    assert _set_at_torch("comfy_continual_lora.worker", given=line) == LOOKS


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays_and_nothing_is_added(name: str, tmp_path: Path) -> None:
    value = "active" if name == "OMP_WAIT_POLICY" else "7"
    words = ("comfy_continual_lora", "mini", str(tmp_path / "a"))
    assert _set_at_torch(*words, **{name: value}) == {name: value}


def test_a_program_that_calls_the_command_line_keeps_its_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["list", str(tmp_path)]) == 0
    assert not os.environ.keys() & set(NAMES)
