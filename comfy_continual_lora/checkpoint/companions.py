"""Where the other files of an Anima are, whose net has a file of its own: in the folders of ComfyUI
and Forge, or beside it.

    models/diffusion_models/anima.safetensors        the net, and the conditioner
    models/text_encoders/qwen_3_06b_base.safetensors
    models/vae/qwen_image_vae.safetensors
    comfy/text_encoders/{qwen25_tokenizer,t5_tokenizer}/      part of ComfyUI itself

    models/Stable-diffusion/anima.safetensors                 in Forge Neo
    models/text_encoder/qwen_3_06b_base.safetensors
    models/VAE/qwen_image_vae.safetensors
    backend/huggingface/circlestone-labs/Anima/{tokenizer,tokenizer_2}/      the same tokenizers

CONTINUAL_LORA_HOST has folders of a ComfyUI or Forge Neo that is elsewhere, or of the files themselves:
a web UI tells its worker, and whoever keeps the net apart can.

Nothing is downloaded. Source of the names: folder_paths.py of ComfyUI 0.33, modules_forge/main_entry.py
of Forge Neo 2.26, and the files of circlestone-labs/Anima.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files import HOST
from .layout import holds_tokenizer

# folders above the net's that are searched: subfolders, diffusion_models, models, ComfyUI
_LEVELS = 4
_IN_COMFYUI, _IN_NEO = "comfy/text_encoders", "backend/huggingface/circlestone-labs/Anima"
# their names in ComfyUI, also beside the net, and in Forge Neo
QWEN_TOKENIZER, T5_TOKENIZER = ("qwen25_tokenizer", "tokenizer"), ("t5_tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class _Companion:
    """A file beside the net's."""

    what: str
    folders: tuple[str, ...]  # in models; first ComfyUI's, last Forge Neo's
    pattern: str  # of names in lower case
    published: str  # its name as published


TEXT_ENCODER = _Companion(
    "text encoder, Qwen3-0.6B,",
    ("text_encoders", "clip", "text_encoder"),
    r"qwen[-_. ]?3.*(?<!\d)0[._]?6b",
    "qwen_3_06b_base.safetensors",
)
VAE = _Companion("VAE", ("vae", "VAE"), r"qwen[-_. ]?image.*vae", "qwen_image_vae.safetensors")


def companion(net: Path, wanted: _Companion) -> Path:
    """The file that belongs to this net: from the nearest folder that has one.

    Errors: CheckpointError if there is none, or several and none has the published name.
    """
    searched = [net.parent]
    for folder in _above(net):
        searched += [folder / name for name in wanted.folders if (folder / name).is_dir()]
    if host := sys.modules.get("folder_paths"):  # this runs in ComfyUI, which may have others
        searched += map(Path, host.get_folder_paths(wanted.folders[0]))
    named = [folder for folder in _hosts() if folder.is_dir() and folder not in searched]
    for folder in (*searched, *named):
        # what may hold more than models is not searched in depth
        is_flat = folder == net.parent or folder in named
        found = sorted(
            file
            for file in (folder.iterdir() if is_flat else folder.rglob("*"))
            if file.suffix == ".safetensors" and re.search(wanted.pattern, file.stem.lower())
        )
        exact = [file for file in found if file.name == wanted.published]
        if len(exact or found) == 1:
            return (exact or found)[0]
        if found:
            raise CheckpointError(
                f"{net} needs a {wanted.what} and there are several: "
                f"{', '.join(map(str, found[:4]))}. Put a copy of the right one into {net.parent}, or "
                f"call it {wanted.published}."
            )
    raise CheckpointError(
        f"{net} is Anima, whose {wanted.what} is read from a file of its own, which was not found. "
        f"Looked for one such as {wanted.published} in {_list([*searched, *named])}. Put it into "
        f"models/{wanted.folders[0]} of ComfyUI or models/{wanted.folders[-1]} of Forge Neo, or beside "
        f"the net, or name that program's folder in {HOST}."
    )


def tokenizer_folder(net: Path, names: tuple[str, str]) -> Path:
    """The tokenizer of these names: beside the net, or where ComfyUI or Forge Neo is.

    Errors: CheckpointError if there is none.
    """
    name, in_neo = names
    searched = [net.parent / name]
    for folder in _above(net):
        searched += [folder / _IN_COMFYUI / name, folder / _IN_NEO / in_neo]
    if host := sys.modules.get("comfy"):  # this runs in ComfyUI, whose models may be elsewhere
        searched += [Path(path) / "text_encoders" / name for path in host.__path__]
    for folder in searched:
        if holds_tokenizer(folder):
            return folder
    raise CheckpointError(
        f"{net} needs the tokenizer {name}, which was not found in {_list(searched)}. ComfyUI has it "
        f"as {_IN_COMFYUI}/{name}, Forge Neo as {_IN_NEO}/{in_neo}: copy that folder to "
        f"{net.parent / name}, or name the program's folder in {HOST}."
    )


def _above(net: Path) -> Sequence[Path]:
    """The folder of the net and those above it, and those of the host that is elsewhere."""
    above = [net.absolute().parent, *net.absolute().parent.parents][: _LEVELS + 1]
    hosts = _hosts()
    return [*above, *hosts, *(host / "models" for host in hosts)]


def _hosts() -> list[Path]:
    return [Path(one).expanduser() for one in os.environ.get(HOST, "").split(os.pathsep) if one]


def _list(folders: Iterable[Path]) -> str:
    return ", ".join(map(str, dict.fromkeys(folders)))
