"""Whether a checkpoint can be at a path, without opening it. Light."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from ..errors import CheckpointError
from ..listing import is_checkpoint

_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


def check_path(path: Path) -> None:
    """Errors: CheckpointError if no file or folder is there, and for a pickle."""
    advice = "Give the path of a .safetensors file or of a diffusers folder."
    if os.path.islink(path) and not os.path.exists(path):
        raise CheckpointError(f"{path} is a link that leads to nothing. {advice}")
    if not os.path.exists(path):
        raise CheckpointError(f"There is no checkpoint at {path}. {_nearest(path)}{advice}")
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is a pipe or a device. {advice}")
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise CheckpointError(
            f"{path} is a pickle ({path.suffix}): loading one can run any program hidden in it, "
            "so it is refused. Get the same model as .safetensors, or convert it in a program you "
            "trust (A1111: Checkpoint Merger, one model, safetensors)."
        )


def _nearest(path: Path) -> str:
    """A sentence about the checkpoint in the same folder whose name is nearest, if one is near."""
    try:
        names = [name for name in os.listdir(path.parent) if is_checkpoint(name)]
    except OSError:
        return ""
    near = get_close_matches(path.name, names, 1)
    return f"Did you mean {path.with_name(near[0])}? " if near else ""
