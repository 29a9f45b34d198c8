"""Which files are checkpoints, by their names and the names of their weights. Light.

in: a folder, a stack - out: its checkpoints, its checkpoint.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from .files import OWN_FOLDER, STACKS

# Weights of a checkpoint's net, or of Anima's; not those of a LoRA, which may begin alike
_OF_NET = re.compile(
    r"(state_dict\.)*(model\.diffusion_model\.(?!.*(lora|lokr|hada|diff$)).*"
    r"|(net\.)?llm_adapter\.out_proj\.weight)"
)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints in a folder and those below it, by path; what is removed meanwhile is left out, and
    what lies in our own folders.

    A file without a net, such as a LoRA, an embedding or a VAE, is none. One that can't be read may
    be: whoever opens it says why it can't.
    """
    found: list[Path] = []
    for inner, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != OWN_FOLDER]
        found += [Path(inner, name) for name in names if is_checkpoint(name)]
    return sorted(path for path in found if weights_are(_of_net, path) is not False)


def _of_net(names: Iterable[str]) -> bool:
    return any(map(_OF_NET.fullmatch, names))


def weights_are(kind: Callable[[Iterable[str]], bool], path: Path) -> bool | None:
    """What `kind` says of the names of a file's weights; None for a file that can't be read.

    It is asked once, until the file changes: pages and nodes list the same files again and again.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):  # a pipe could be read for ever
        return None
    return _weights_are(kind, path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=10_000)
def _weights_are(
    kind: Callable[[Iterable[str]], bool], path: Path, _size: int, _time: int
) -> bool | None:
    names = weight_names(path)
    return None if names is None else kind(names)


def weight_names(path: Path) -> list[str] | None:
    """The names of a safetensors file's weights, of which none is read; None for any other file."""
    from safetensors import SafetensorError, safe_open  # not light

    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return None


def is_checkpoint(name: str) -> bool:
    """Whether a file of this name is a checkpoint, not a stack of one."""
    return name.endswith(".safetensors") and not name.endswith(STACKS)


def checkpoint_of(stack: Path, checkpoints: Collection[Path]) -> Path | None:
    """Which of these checkpoints a stack beside them is of: of a.b.concepts.safetensors it is
    a.b.safetensors, or else a.safetensors, where its name is b.
    """
    stem = stack.name.removesuffix(STACKS)
    while stem:
        if (checkpoint := stack.with_name(f"{stem}.safetensors")) in checkpoints:
            return checkpoint
        stem = stem.rpartition(".")[0]
    return None
