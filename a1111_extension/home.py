"""Finds the package: beside this extension's files if they were copied, above them in a linked
clone. Nothing is added to sys.path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

EXTENSION = Path(__file__).parent
PACKAGE = "comfy_continual_lora"


def load_package() -> None:
    """Make `import comfy_continual_lora` work in this process.

    Errors: ImportError that says what to do.
    """
    if PACKAGE in sys.modules:
        return
    for root in (EXTENSION, EXTENSION.resolve().parent):
        start = root / PACKAGE / "__init__.py"
        if start.exists():
            spec = importlib.util.spec_from_file_location(
                PACKAGE, start, submodule_search_locations=[str(start.parent)]
            )
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            sys.modules[PACKAGE] = module
            spec.loader.exec_module(module)
            return
    raise ImportError(
        f"The package {PACKAGE} is missing from the extension in {EXTENSION}. Install it again: "
        "continual-lora install-webui WEBUI"
    )
