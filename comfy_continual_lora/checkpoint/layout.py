"""What a checkpoint holds, known before its weights are read.

in: an open safetensors file - out: `Layout`, nets on the meta device with the names of their weights
in the file, from which `Part.fill` reads them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..errors import CheckpointError
from .backbone import KV_MODULES
from .families import Family, TextPart
from .text import TextEncoder

NOT_QUANTISED = "It looks like a quantised copy; get the model in float32, float16 or bfloat16."

# (diffusers names) -> {diffusers name: name in the file}
Naming = Callable[[Iterable[str]], dict[str, str]]


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Errors: CheckpointError for a file that can't be read, now or while the block reads it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be read as safetensors ({error}). Expected a complete .safetensors "
            "file; download or copy it again."
        ) from None


@dataclass(frozen=True)
class Part:
    """A net without its weights, on the meta device."""

    path: Path
    module: Any
    names: Mapping[str, str]  # {name of a weight: its name in the file}, K and V first

    def read(self, file: Any, name: str) -> Tensor:
        """One weight in the dtype it is stored in and in the net's shape.

        Errors: CheckpointError for another shape, and for integers.
        """
        stored_name = self.names[name]
        tensor = _read(file, stored_name, name)
        expected = self.module.get_parameter(name).shape
        if tensor.shape != expected and tensor.numel() != expected.numel():
            raise CheckpointError(
                f"{self.path}: {stored_name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected)}."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self.path}: {stored_name} holds {tensor.dtype} numbers, not the weights of a "
                f"net. {NOT_QUANTISED}"
            )
        return tensor.reshape(expected)

    def fill(self, file: Any, put: Callable[[nn.Module, str, Tensor], None]) -> Any:
        """Read every weight, hand it to `put` and return the net."""
        for name in self.names:
            put(self.module, name, self.read(file, name))
        return self.module


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is.

    In a diffusers folder `vae` and `texts` have no names: their own libraries read them.
    """

    family: Family
    preset: str
    size: int
    unet: Part
    vae: Part
    texts: list[Part]


def part_of(
    path: Path, stored: Iterable[str], make: Callable[[], Any], prefix: str, naming: Naming
) -> Part:
    """The net that `make` makes, whose weights are `stored` under `prefix`.

    Errors: CheckpointError if some of them are missing.
    """
    with torch.device("meta"):
        module = make()
    names = naming(module.state_dict())
    if missing := [prefix + name for name in names.values() if prefix + name not in stored]:
        where = f" of its {prefix.rstrip('.')}" if prefix else ""
        raise CheckpointError(
            f"{path} lacks {len(missing)} weights{where}, the first is {missing[0]}. Get a "
            "complete checkpoint."
        )
    ordered = sorted(names, key=lambda name: (not Fingerprint.covers(name), name))
    return Part(path, module, {name: prefix + names[name] for name in ordered})


def _read(file: Any, stored_name: str, name: str) -> Tensor:
    """The weight `name` out of a tensor of the file.

    OpenCLIP stacks q, k and v, and its text projection is the transpose of a linear layer's.
    """
    if "attn.in_proj_" in stored_name:
        stacked = file.get_slice(stored_name)
        index = "qkv".index(name[name.index("_proj") - 1])
        size = stacked.get_shape()[0] // 3
        return stacked[index * size : (index + 1) * size]
    tensor = file.get_tensor(stored_name)
    return tensor.T if stored_name.endswith(".text_projection") else tensor


class Fingerprint:
    """SHA-256 of the U-Net's K and V weights, in float32, in the order of their names."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    @staticmethod
    def covers(name: str) -> bool:
        return re.fullmatch(rf"{KV_MODULES}\.weight", name) is not None

    def add(self, name: str, weight: Tensor) -> None:
        if self.covers(name):
            header = f"{name.removesuffix('.weight')}{tuple(weight.shape)}"
            self._hash.update(header.encode() + weight.float().numpy().tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def text_encoder(model: Any, part: TextPart, tokenizer: CLIPTokenizer) -> TextEncoder:
    pad = 0 if part.openclip else int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    return TextEncoder(model, pad, part.penultimate)
