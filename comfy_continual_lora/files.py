"""Names of files that the backend and every front end agree on. Light: front ends inside a host ask it too."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import StackError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
STACKS = ".concepts.safetensors"


def stack_path(checkpoint: str | Path, name: str = "") -> Path:
    """`<checkpoint stem>.concepts.safetensors` in the checkpoint's folder; for a diffusers folder beside that folder.

    A checkpoint may have several stacks, told apart by `name`. Errors: StackError for a name that can't be part of a file's.
    """
    checkpoint = Path(checkpoint)
    if name and not re.fullmatch(r"[\w-]{1,64}", name):
        raise StackError(f"The stack's name {name!r} may hold only letters, digits, - and _ (at most 64): it becomes part of a file name.")
    stem = checkpoint.stem if checkpoint.is_file() else checkpoint.name
    return checkpoint.with_name(f"{stem}.{name}{STACKS}" if name else f"{stem}{STACKS}")


def snapshots_of(stack: Path, token: str) -> list[Path]:
    """The snapshots of all unfinished runs of a token, earlier versions' names included."""
    start = f"{stack.name.removesuffix('.safetensors')}.{token}."
    if not stack.parent.is_dir():
        return []
    return sorted(p for p in stack.parent.iterdir() if p.name.startswith(start) and p.name.endswith("snapshot"))
