"""What the package's messages say, read from its source: all strings that are no docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import comfy_continual_lora

PACKAGE = Path(comfy_continual_lora.__file__).parent
# what only the command line says, and what is said while it installs something
COMMAND_LINE = (
    "cli.py",
    "cliconfig.py",
    "cliflags.py",
    "cliown.py",
    "cliparser.py",
    "cliprogress.py",
    "clirun.py",
    "cliterminal.py",
    "demo.py",
    "infotext.py",
    "reportpage.py",
)
INSTALLING = ("webui/install.py", "webui/environment.py", "webui/a1111.py", "mini/pretrain.py")


def sentences(*left_out: str) -> Iterator[tuple[str, str]]:
    """The strings of all modules but these, each with its module: f-strings with {} in place of
    what they show.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if module in left_out:
            continue
        tree = ast.parse(path.read_text())
        skipped = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                skipped.add(node.value)  # a docstring
            if isinstance(node, ast.JoinedStr):
                skipped |= set(node.values)
                parts = (
                    str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values
                )
                yield module, "".join(parts)
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and node not in skipped:
                yield module, node.value


def marked_names() -> set[str]:
    """The names that messages have in backquotes."""
    found = set()
    for module, text in sentences():
        if module != "adapters/lora.py":  # PEFT's own warning
            found |= set(re.findall(r"`(\w+)`", text))
    return found
