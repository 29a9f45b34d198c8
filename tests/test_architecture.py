"""The structure holds: imports point one way, and light modules import nothing heavy."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import comfy_continual_lora

PACKAGE = Path(comfy_continual_lora.__file__).parent
LIGHT = (
    "adapters",
    "cli",
    "cliconfig",
    "cliflags",
    "cliparser",
    "cliown",
    "cliprogress",
    "clirun",
    "cliterminal",
    "emphasis",
    "errors",
    "exported",
    "fields",
    "files",
    "history",
    "infotext",
    "keeping",
    "language",
    "listing",
    "mentions",
    "operations",
    "presets",
    "progress",
    "python_api",
    "requests",
    "results",
    "settings",
    "stackfile",
    "stackschema",
    "stacktensors",
    "upkeep",
    "versions",
    "waiting",
    "words",
    "worker",
    "__main__",
)
# Every module may import from its own layer and the ones after it.
LAYERS = (
    ("__main__",),
    ("cli", "comfy_nodes"),
    ("cliown",),
    ("clirun",),
    ("cliconfig", "cliflags", "cliprogress"),
    ("cliparser",),
    ("cliterminal",),
    ("demo", "python_api", "webui", "worker"),
    ("operations",),
    ("pipeline",),
    ("solving", "upkeep", "views"),
    ("plan", "prepare", "report", "reportpage"),
    ("methods",),
    ("consolidation", "dsc", "evaluate", "export", "fisher", "foreign", "history", "stock"),
    ("lorafile",),
    ("loraconfig",),
    ("concept", "early", "session"),
    ("infotext", "learn", "requests", "targets"),
    ("exported", "moments", "results", "sample", "solve", "training", "verdicts", "watch"),
    ("classifier", "hostareas", "likeness", "objective", "together"),
    ("mini",),
    ("ewc", "textspace"),
    ("penalty", "store"),
    ("keeping",),
    ("concepts", "diffusion", "lossscale", "metrics", "parallel", "snapshot", "stack"),
    ("stackfile", "versions"),
    ("stackschema",),
    ("stacktensors",),
    ("adapters",),
    ("checkpoint",),
    ("inventory",),
    ("imagefile",),
    ("listing", "settings", "words"),
    (
        "areas",
        "curves",
        "emphasis",
        "fields",
        "files",
        "language",
        "mentions",
        "presets",
        "progress",
        "waiting",
    ),
    ("errors",),
)


def _layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def _imports(path: Path) -> set[str]:
    """First part of every module of the package that a file imports."""
    depth = len(path.relative_to(PACKAGE).parts)
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level or not (node.module or "").startswith("comfy_continual_lora"), (
                f"{path}: import relatively, ComfyUI renames the package"
            )
            if node.level == depth:
                modules |= (
                    {node.module.split(".")[0]}
                    if node.module
                    else {alias.name for alias in node.names}
                )
    return modules


# an import of the package on one line
IMPORTED = re.compile(r"from (comfy_continual_lora[\w.]*) import ([\w, ]+)")
FILES = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    me = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in _imports(path) - {me, "__version__"}:
        assert _layer(me) <= _layer(other), f"{me} must not import {other}"


def test_every_module_says_what_it_is() -> None:
    assert all(ast.get_docstring(ast.parse(p.read_text())) for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", LIGHT[:-1])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'PIL', 'safetensors'}"
    code = (
        f"import sys, comfy_continual_lora.{module}; found = {heavy} & set(sys.modules); "
        f"sys.exit(f'imports {{found}}' if found else 0)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
        ).stderr
        == ""
    )


def test_programs_in_strings_and_pages_import_what_exists() -> None:
    """What a test hands to another Python, or a page tells to type, no checker reads."""
    root, wanted = PACKAGE.parent, set()
    for pattern in ("tests/*.py", "benchmarks/**/*.py", "*.md", "docs/**/*.md"):
        for path in root.glob(pattern):
            for module, names in IMPORTED.findall(path.read_text(encoding="utf-8")):
                wanted |= {(module, name.split(" as ")[0].strip()) for name in names.split(",")}
    assert ("comfy_continual_lora.comfy_nodes.words", "with_words") in wanted
    missing = []
    for module, name in sorted(wanted):
        package = importlib.import_module(module)
        if not hasattr(package, name) and importlib.util.find_spec(f"{module}.{name}") is None:
            missing.append(f"{module}.{name}")
    assert not missing
