"""What ComfyUI's registry gets: its metadata, and that nothing in it is of the kinds that scans flag."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
IGNORED = [
    line
    for line in (REPOSITORY / ".comfyignore").read_text().splitlines()
    if line and not line.startswith("#")
]


def published() -> list[Path]:
    """The tracked files that .comfyignore leaves."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return [
        REPOSITORY / name
        for name in listed.stdout.splitlines()
        if not any(name == one or name.startswith(f"{one}/") for one in IGNORED)
    ]


def test_the_name_keeps_the_rules() -> None:
    """https://docs.comfy.org/registry/specifications; it can't be changed once it is published."""
    name = PROJECT["project"]["name"]
    assert name == "comfy-continual-lora"
    assert re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])*", name)
    assert "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["project"]["version"])


def test_addresses_are_of_one_repository() -> None:
    urls, comfy = PROJECT["project"]["urls"], PROJECT["tool"]["comfy"]
    repository = urls["Repository"]
    assert repository.endswith(f"/{PROJECT['project']['name']}")
    assert all(url.startswith(repository) for url in urls.values())
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    for kind in ("Icon", "Banner"):
        assert comfy[kind].startswith(raw)
        assert (REPOSITORY / comfy[kind].removeprefix(raw)).exists()
    assert comfy["PublisherId"]
    assert comfy["requires-comfyui"] == ">=0.8.0"


def test_what_the_nodes_do_not_need_is_left_out() -> None:
    assert {"tests", "benchmarks", "docs", ".ci", "a1111_extension"} <= set(IGNORED)
    assert "comfy_continual_lora/webui" in IGNORED
    for name in IGNORED:
        assert (REPOSITORY / name).exists(), name
    files = {path.relative_to(REPOSITORY).as_posix() for path in published()}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"} <= files
    for folder in ("comfy_continual_lora", "web", "workflows", "locales", "subgraphs"):
        assert any(name.startswith(f"{folder}/") for name in files), folder


def test_nothing_published_runs_programs_or_text() -> None:
    """No eval, no exec, no other program: nothing installs anything at run time."""
    for path in published():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__"), path
            program = r"(os\.(system|popen|exec\w*|spawn\w*)|subprocess\.(?!list2cmdline)\w+)"
            assert not re.fullmatch(program, called), path


def test_the_nodes_need_nothing_that_is_left_out() -> None:
    for path in published():
        if path.suffix == ".py" and path.name not in ("cli.py", "cliown.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert "webui" not in (node.module or ""), path
