"""What a measurement ran on, and where its result goes."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def described(threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    packages = ("torch", "diffusers", "transformers", "peft")
    return {
        "cpu": next(models, platform.processor()),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in packages},
    }


def write_result(name: str, row: dict[str, Any]) -> None:
    """To results/<date>-<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y-%m-%d')}-{name}.json"
    path.write_text(json.dumps(row, indent=1) + "\n")
