"""A checkpoint file or folder -> `Backbone`.

Weights are memory-mapped and read once, straight into their dtype and to their device; nothing is
downloaded. Families: SD1.x (the mini-SD is one), SD2.x and SDXL; see `families`. Weights that the
family does not use are ignored, missing ones are named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError
from .backbone import Backbone
from .folder import folder_family, folder_layout, load_folder, open_unet
from .layout import Fingerprint, Layout, open_safetensors
from .narrow import dtype_for
from .single_file import file_layout, load_file

_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


def load_backbone(path: str | Path, *, device: str = "auto", precision: str = "fp32") -> Backbone:
    """Load a checkpoint for learning and drawing.

    `precision` (a setting) is the U-Net's; the VAE is float32 (SDXL's overflows in float16).
    Errors: CheckpointError for a missing file, a pickle, another architecture, a damaged file or
    missing weights.
    """
    path = Path(path)
    target = pick_device(device)
    dtype = dtype_for(precision, target)
    load = load_folder if path.is_dir() else load_file
    with open_checkpoint(path) as (layout, file):
        return load(path, layout, file, target, dtype)


def fingerprint(path: Path) -> str:
    """`Backbone.fingerprint`, read without the rest.

    Errors: CheckpointError as in `load_backbone`.
    """
    digest = Fingerprint()
    with open_checkpoint(path) as (layout, file):
        for name in layout.unet.names:
            if digest.covers(name):
                digest.add(name, layout.unet.read(file, name))
    return digest.hexdigest()


def pick_device(name: str) -> torch.device:
    """The device of a setting: "auto" is CUDA, then Apple's MPS, then the CPU.

    Errors: CheckpointError for a device that can't be used here.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise CheckpointError(
                f"The device {name!r} can't be used here: {error}. Use auto, cpu, cuda or mps."
            ) from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def open_checkpoint(path: Path) -> Iterator[tuple[Layout, Any]]:
    """A checkpoint's layout and its open file (a folder's: the U-Net's).

    Errors: CheckpointError as in `load_backbone`.
    """
    _check_path(path)
    if not path.is_dir():
        with open_safetensors(path) as file:
            yield file_layout(path, file), file
        return
    try:
        family = folder_family(path)
        with open_unet(path) as file:
            yield folder_layout(path, family, file), file
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The diffusers folder {path} can't be loaded: {error}") from None


def _check_path(path: Path) -> None:
    """Errors: CheckpointError if nothing is there, and for a pickle."""
    if not path.exists():
        raise CheckpointError(
            f"There is no checkpoint at {path}. Give the path of a .safetensors file or of a "
            "diffusers folder."
        )
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise CheckpointError(
            f"{path} is a pickle ({path.suffix}): loading one can run any program hidden in it, "
            "so it is refused. Get the same model as .safetensors, or convert it in a program you "
            "trust (A1111: Checkpoint Merger, one model, safetensors)."
        )
