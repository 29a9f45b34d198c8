"""What a checkpoint holds, known before its weights are read.

in: open safetensors files - out: `Layout`, nets on the meta device with the names of their weights
in the files, from which `Part.fill` reads them.
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

from ..errors import CheckpointError
from ..files import check_regular
from .backbone import KV_MODULES
from .families import Family

_QUANTISATION_SCALES = (".scale_weight", ".weight_scale", ".absmax", "scaled_fp8")
NOT_QUANTISED = "It looks like a quantised copy; get the model in float32, float16 or bfloat16."
PROMPT_LENGTH = 77  # positions of every family's text encoders
# What a file of another kind begins with: what it is, and what to do
_BEGINNINGS = {
    b"GGUF": ("a quantised copy (GGUF)", "Get the model in float16 or bfloat16."),
    b"PK\x03\x04": ("a pickle or a zip archive", "Get the same model as .safetensors."),
    b"\x80": ("a pickle", "Get the same model as .safetensors."),
    b"version https://git-lfs": ("a Git LFS pointer", "Download the model itself."),
    b"<": ("a web page", "Download the model itself."),
}
_LAYER_COUNTS = (
    "layers_per_block",
    "transformer_layers_per_block",
    "num_hidden_layers",
    "num_layers",
    "num_encoder_blocks",
    "num_decoder_blocks",
)

Shape = tuple[int, ...]
# (diffusers names) -> {diffusers name: name in the file}
Naming = Callable[[Iterable[str]], dict[str, str]]


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Errors: CheckpointError for a file that can't be read, now or while the block reads it."""
    try:
        check_regular(path)
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    with file:
        try:
            yield file
        except SafetensorError as error:
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    start = b""
    if path.is_file():
        try:
            with open(path, "rb") as file:
                start = file.read(32)
        except PermissionError as denied:  # safetensors calls such a file missing
            return CheckpointError(
                f"{path} can't be read ({denied.strerror}). Give this user permission to read it."
            )
        except OSError:
            pass
    for beginning, (kind, advice) in _BEGINNINGS.items():
        if start.startswith(beginning):
            return CheckpointError(f"{path} is {kind}, not a .safetensors file ({error}). {advice}")
    return CheckpointError(
        f"{path} can't be read as safetensors ({error}). Expected a complete .safetensors file; "
        "download or copy it again."
    )


class Weights:
    """The tensors of open safetensors files, under the names that `rename` gives them."""

    def __init__(
        self, path: Path, files: Iterable[Any], rename: Callable[[str], str] = lambda name: name
    ) -> None:
        self.path = path
        self._places = {rename(name): (file, name) for file in files for name in file.keys()}  # noqa: SIM118 - not a dict

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> Shape:
        return tuple(self._slice(name).get_shape())

    def shape_as_linear(self, name: str) -> Shape:
        """The shape of the weight that `read` returns."""
        shape = self.shape(name)
        if "attn.in_proj_" in name:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if name.endswith(".text_projection") else shape

    def dtype(self, name: str) -> str:
        """In the words of safetensors, such as "F16"."""
        return self._slice(name).get_dtype()

    def read(self, name: str, role: str = "") -> Tensor:
        """A tensor, or the part of it that is the weight `role` of a transformers model: OpenCLIP
        stacks q, k and v, and its text projection is the transpose of a linear layer's.
        """
        if "attn.in_proj_" in name:
            stacked = self._slice(name)
            index = "qkv".index(role[role.index("_proj") - 1])
            size = stacked.get_shape()[0] // 3
            return stacked[index * size : (index + 1) * size]
        file, stored_name = self._places[name]
        tensor = file.get_tensor(stored_name)
        return tensor.T if name.endswith(".text_projection") else tensor

    def _slice(self, name: str) -> Any:
        file, stored_name = self._places[name]
        return file.get_slice(stored_name)


@dataclass(frozen=True)
class Part:
    """A net without its weights, on the meta device."""

    module: Any
    names: Mapping[str, str]  # {name of a weight: its name in `weights`}, K and V first
    weights: Weights

    def read(self, name: str) -> Tensor:
        """One weight in the dtype it is stored in and in the net's shape.

        Errors: CheckpointError for integers, and for values that are not finite.
        """
        tensor = self.weights.read(self.names[name], name)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self.weights.path}: {self.names[name]} holds {tensor.dtype} numbers, not the "
                f"weights of a net. {NOT_QUANTISED}"
            )
        if not _is_finite(tensor):
            raise CheckpointError(
                f"{self.weights.path}: {self.names[name]} contains infinite or NaN values, which "
                "would make every picture black. Expected finite weights; download the file "
                "again, or get another copy of the model."
            )
        return tensor.reshape(self.module.get_parameter(name).shape)

    def fill(self, put: Callable[[nn.Module, str, Tensor], None]) -> Any:
        """Read every weight, hand it to `put` and return the net."""
        for name in self.names:
            put(self.module, name, self.read(name))
        return self.module


def _is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite in float32: the extremes are NaN if one value is, and take a
    tenth of the time of `isfinite`.
    """
    if not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return all(bool(extreme.float().isfinite()) for extreme in wide.aminmax())


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is."""

    family: Family
    preset: str
    size: int  # pixels a side it was trained at
    unet: Part
    vae: Part
    texts: list[Part]
    tokenizer: Path  # a folder
    prediction: str  # what the net predicts, in diffusers' words
    declares_zero_snr: bool  # see `Backbone`

    net_name = "U-Net"

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def width(self) -> int:
        """Of text features."""
        return self.unet.module.config["cross_attention_dim"]

    def question(self, rows: int, side: int, dtype: torch.dtype) -> dict[str, Any]:
        """What the net is asked about `rows` latents of `side` pixels a side, by argument: empty
        tensors on torch's default device.
        """
        added = None
        if self.unet.module.config["addition_embed_type"] == "text_time":
            pooled = self.texts[-1].module.config.projection_dim
            added = {
                "text_embeds": torch.empty(rows, pooled, dtype=dtype),
                "time_ids": torch.empty(rows, 6),
            }
        return {
            "sample": torch.empty(rows, 4, side, side, dtype=dtype),
            "timestep": torch.empty(rows, dtype=torch.long),
            "encoder_hidden_states": torch.empty(rows, PROMPT_LENGTH, self.width, dtype=dtype),
            "added_cond_kwargs": added,
        }

    def check(self, path: Path) -> None:
        """Errors: CheckpointError for parts that do not fit each other."""
        channels_of = {
            "the VAE": self.vae.module.config["latent_channels"],
            "the U-Net's output": self.unet.module.config["out_channels"],
        }
        for name, channels in channels_of.items():
            if channels != 4:
                raise CheckpointError(
                    f"{path}: {name} has {channels} channels. Expected 4, as in {self.family.name}."
                )
        positions = min(part.module.config.max_position_embeddings for part in self.texts)
        if positions < PROMPT_LENGTH:
            raise CheckpointError(
                f"{path}: a text encoder has {positions} positions. Expected {PROMPT_LENGTH}."
            )
        width = sum(part.module.config.hidden_size for part in self.texts)
        if width != self.width:
            raise CheckpointError(
                f"{path}: the text encoders give {width} features, the U-Net expects {self.width}. "
                "They are not of the same model; get a complete copy of it."
            )


def part_of(weights: Weights, make: Callable[[], Any], prefix: str, naming: Naming) -> Part:
    """The net that `make` makes, whose weights are stored under `prefix`.

    Errors: CheckpointError if weights are missing or have other shapes, or `make` makes none.
    """
    try:
        with torch.device("meta"):
            module = make()
    except CheckpointError:
        raise
    except Exception as error:  # the libraries raise anything for a configuration of no net
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{weights.path}: no net can be made from its configuration "
            f"({type(error).__name__}: {reason:.200}). Get a complete copy of the model."
        ) from None
    names = {name: prefix + stored for name, stored in naming(module.state_dict()).items()}
    if missing := [stored for stored in names.values() if stored not in weights]:
        where = f" of its {prefix.rstrip('.')}" if prefix else ""
        raise CheckpointError(
            f"{weights.path} lacks {len(missing)} weights{where}, the first is {missing[0]}. Get a "
            "complete checkpoint."
        )
    for name, stored in names.items():
        shape, expected = weights.shape_as_linear(stored), module.get_parameter(name).shape
        if _without_ones(shape) != _without_ones(expected):
            raise CheckpointError(
                f"{weights.path}: {stored} has shape {weights.shape(stored)}, expected "
                f"{tuple(expected)}. Get a complete copy of the model."
            )
    ordered = sorted(names, key=lambda name: (not Fingerprint.covers(name), name))
    return Part(module, {name: names[name] for name in ordered}, weights)


def _without_ones(shape: Iterable[int]) -> list[int]:
    """A linear layer and a convolution of one pixel are the same."""
    return [size for size in shape if size != 1]


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def usual_size(side: int) -> int | None:
    """A side in pixels, rounded down to what the VAE can halve three times; None if pictures of
    such a side can't be learned from.
    """
    return side - side % 8 if 64 <= side <= 4096 else None


def resolution_of(text: str) -> int | None:
    """The shorter side of "1024x1024" or "1024"; None for any other text."""
    match = re.fullmatch(r"\s*([0-9]{1,5})(?:\s*[x*,]\s*([0-9]{1,5}))?\s*", text, re.IGNORECASE)
    return usual_size(min(int(side) for side in match.groups() if side)) if match else None


def check_not_quantised(weights: Weights) -> None:
    """Errors: CheckpointError for weights with scales of their own."""
    for name in weights:
        if name.endswith(_QUANTISATION_SCALES):
            raise CheckpointError(
                f"{weights.path} holds quantised weights and their scales (first: {name}). "
                f"{NOT_QUANTISED}"
            )


def check_layer_counts(config: Mapping[str, Any], names: Iterable[str], source: Path) -> None:
    """Errors: CheckpointError for a net of more layers than weights named so are numbered.

    A net of a billion layers would not even be made.
    """
    numbers = {number for name in names for number in re.findall(r"\.(\d+)\.", name)}
    for field in _LAYER_COUNTS:
        value = config.get(field, 1)
        for count in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(count, (int, float)) and count > len(numbers):
                raise CheckpointError(
                    f"{source}: {field} is {value!r:.100}, but there are weights for at most "
                    f"{len(numbers)} layers. Get a complete copy of the model."
                )


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
