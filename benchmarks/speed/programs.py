"""Others' programs on this machine, each with its own venv or .venv."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Program(NamedTuple):
    name: str
    variable: str  # says where it is
    folder: str  # where else it is looked for, in the home folder
    known_by: str  # a file it has


PROGRAMS = {
    "comfyui": Program("ComfyUI", "COMFYUI_PATH", "comfy/ComfyUI", "main.py"),
    "kohya": Program("sd-scripts", "KOHYA_PATH", "sd-scripts", "train_network.py"),
    "published": Program(
        "Diffusion Classifier",
        "DIFFUSION_CLASSIFIER_PATH",
        "diffusion-classifier",
        "eval_prob_adaptive.py",
    ),
}


def checkout(key: str) -> Path:
    """Where somebody else's program is; FileNotFoundError if it is not there."""
    program = PROGRAMS[key]
    path = Path(os.environ.get(program.variable) or Path.home() / program.folder)
    if not (path / program.known_by).exists():
        raise FileNotFoundError(f"no {program.name} at {program.variable} or ~/{program.folder}")
    return path.resolve()
