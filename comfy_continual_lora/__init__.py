"""Teach a Stable Diffusion checkpoint one personal concept after another.

`ContinualLora` is the Python API (python_api.py). To read the code, start at `pipeline.py`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import Cancelled, ContinualLoraError
    from .progress import Progress
    from .python_api import ContinualLora

__version__ = "0.1.0"
__all__ = ["Cancelled", "ContinualLora", "ContinualLoraError", "Progress"]
_MODULES = {
    "Cancelled": "errors",
    "ContinualLora": "python_api",
    "ContinualLoraError": "errors",
    "Progress": "progress",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
