"""Stage 1: a LoRA's file of another program, in kohya's, diffusers' or PEFT's names: its tensors by
layer, and what it changes besides K and V of cross-attention.

in: a safetensors file, or PEFT's folder - out: `Layer`s for `foreign`; the `Rest`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import StackError
from .files import CLIP_SKIP, metadata_in, with_name, write_whole
from .loraconfig import DECLARED, WEIGHTS, LoraConfig, config_for
from .progress import counted

DOWN = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora.down.weight",
    "_lora.down.weight",
)
UP = tuple(name.replace("down", "up").replace("lora_A", "lora_B") for name in DOWN)
ENDINGS = {
    ending: kind
    for kind, endings in (("down", DOWN), ("up", UP), ("alpha", (".alpha",)))
    for ending in endings
}
PREFIX = re.compile(
    r"^(lora_unet_|unet\.|base_model\.model\.|diffusion_model\.|transformer\.|net\.)+"
)
_TEXT_ENCODER = re.compile(r"^text_encoder\w*\.")
FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Exported files hold 16 bits
LARGEST = torch.finfo(torch.float16).max


def clip_skip_of(path: Path) -> int:
    """The clip skip that a LoRA's file says it was trained with, 1 or 2; other values count as 1."""
    return 2 if metadata_in(lora_file(path)).get(CLIP_SKIP) == "2" else 1


@dataclass
class Layer:
    """One layer's tensors in a file, by kind ("down", "up", "alpha"), and their names there."""

    start: str  # of its tensors' names
    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in its component."""
        return _TEXT_ENCODER.sub("", PREFIX.sub("", self.start))


def lora_file(path: Path) -> Path:
    """The file that holds a LoRA's matrices: the path itself, or one in PEFT's folder."""
    return path / WEIGHTS if path.is_dir() else path


def scale(path: Path, layer: Layer, rank: int, configs: Mapping[str, LoraConfig]) -> float:
    """The factor of B A.

    Errors: StackError for an alpha that is not a number, or two of them; for a rank of 0.
    """
    if not rank:
        raise StackError(
            f"{path} is damaged: {layer.names['down']} has 0 rows; expected the rank, 1 or more. Get "
            "the file again."
        )
    alpha, config = layer.tensors.get("alpha"), config_for(layer.start, configs)
    if alpha is None:
        return config.scale(layer.name, rank) if config else 1.0
    name = layer.names["alpha"]
    if config:
        raise StackError(
            f"{path} has the tensor {name}, but {config.source} says how strong the LoRA is, too. "
            "Expected one of them: export the LoRA again in one layout."
        )
    if alpha.numel() != 1 or alpha.dtype not in (*FLOATS, *WHOLE):
        raise StackError(
            f"{path}: its tensor {name} is {described(alpha)}; expected one number. Get the file "
            "again."
        )
    check_values(f"{path}: its tensor {name}", alpha)
    return float(alpha) / rank


def check_values(what: str, tensor: Tensor) -> None:
    """Errors: StackError for values that exported files could not hold."""
    largest = float(tensor.float().abs().max()) if tensor.numel() else 0.0
    if not largest <= LARGEST:
        raise StackError(
            f"{what} has the value {largest:g}; expected finite numbers up to {LARGEST:g}. Every "
            "picture would be black or noise: choose another file, such as an earlier epoch's."
        )


def described(tensor: Tensor) -> str:
    sizes = " x ".join(map(str, tensor.shape)) or "a single number"
    return f"{sizes} of {str(tensor.dtype).removeprefix('torch.')}"


def split_name(name: str) -> tuple[str, str]:
    """The layer's and the matrix' part of a tensor's name: down, up or alpha; empty for none of these."""
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
    return name.removesuffix(ending), ENDINGS.get(ending, "")


def plain(name: str) -> str:
    """A layer's name, spelled the same for all three layouts."""
    return re.sub(r"[._]", "", PREFIX.sub("", name).replace("processor", ""))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Errors: StackError."""
    try:
        if not path.is_file():
            raise StackError(
                f"There is no file {path}. Expected a .safetensors file, or PEFT's folder with "
                f"{WEIGHTS}."
            )
        path.open("rb").close()  # safetensors calls a file missing that may not be read
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except PermissionError as error:
        raise StackError(
            f"{path} can't be read ({error.strerror}). Give this user permission to read it."
        ) from None
    except (SafetensorError, OSError) as error:
        raise StackError(
            f"{path} can't be read ({error}): it is truncated or not a safetensors file. Pickles "
            "(.pt, .bin) are not loaded."
        ) from None


# --- what it changes besides K and V -------------------------------------------------------------


@dataclass(frozen=True)
class Rest:
    """What a LoRA changes besides K and V.

    Its tensors as the file has them, but `up` as strong as a configuration says that stays behind.
    `share` of the squared Frobenius norm of all that the LoRA changes; changes of other kinds, such
    as convolutions' third matrices and DoRA's magnitudes, are not counted: `uncounted` layers have
    some.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    layers: int
    share: float
    example: str
    uncounted: int = 0

    def described(self) -> str:
        text = (
            f"{counted(self.layers, 'layer')} besides K and V of cross-attention, which "
            f"{'is' if self.layers == 1 else 'are'} {self.share:.0%} of its change by squared norm"
        )
        if self.uncounted:
            text += (
                f", without what {self.uncounted} of them changes in another way than a plain LoRA"
            )
        return text

    def keep(self, lora: Path) -> Path:
        """Write it beside the LoRA that it is from, as NAME-without-kv; returns its file.

        Errors: StackError for values that are not finite, and where it can't be written; another
        file of that name stays.
        """
        for name, tensor in self.tensors.items():
            check_values(f"{lora}: its tensor {name}", tensor)
        lora = with_name(lora)
        path = lora.with_name(f"{lora.name.removesuffix('.safetensors')}-without-kv.safetensors")
        data = save(self.tensors, self.metadata)
        try:
            write_whole(path, data, new=True)
        except FileExistsError:
            if not path.is_file() or path.read_bytes() != data:
                raise StackError(
                    f"{path} exists and is another file, so what {lora.name} changes besides K and V "
                    "was not written there. Move it away, and import again."
                ) from None
        except OSError as error:
            raise StackError(
                f"{path} can't be written ({error.strerror or error}). Make room or move the LoRA to "
                "a folder that can be written, or give `rest` drop."
            ) from None
        return path


def rest_of(
    path: Path,
    tensors: Mapping[str, Tensor],
    kept: Iterable[Layer],
    configs: Mapping[str, LoraConfig],
    metadata: Mapping[str, str],
) -> Rest:
    """The `Rest` of a LoRA: these tensors; `kept`: its other layers.

    Errors: StackError for an alpha or a rank that can't be.
    """
    layers: dict[str, Layer] = {}
    for name, tensor in tensors.items():
        start, kind = split_name(name)
        if not kind and "." in name:
            start, _, kind = name.rpartition(".")
        layer = layers.setdefault(start, Layer(start))
        layer.tensors[kind], layer.names[kind] = tensor, name
    stored, left = dict(tensors), 0.0
    for layer in layers.values():
        if (pair := _pair(layer)) is None:
            continue
        factor = scale(path, layer, len(pair[0]), configs)
        left += _squared_norm(*pair) * factor**2
        if config_for(layer.start, configs):
            up = layer.names["up"]
            stored[up] = (tensors[up].float() * factor).to(tensors[up].dtype)
    whole = left
    for layer in kept:
        if pair := _pair(layer):
            whole += _squared_norm(*pair) * scale(path, layer, len(pair[0]), configs) ** 2
    declared = {name: text for name, text in metadata.items() if name != DECLARED}
    share = left / whole if whole else 0.0
    uncounted = sum(
        not layer.tensors.keys() <= {"down", "up", "alpha"} for layer in layers.values()
    )
    return Rest(stored, declared, len(layers), share, min(layers), uncounted)


def _pair(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """A layer's matrices, those of a convolution flattened, if they are a pair."""
    down, up = layer.tensors.get("down"), layer.tensors.get("up")
    if down is None or up is None or min(down.dim(), up.dim()) < 2:
        return None
    down, up = down.float().flatten(1), up.float().flatten(1)
    return (down, up) if len(down) == up.shape[1] else None


def _squared_norm(down: Tensor, up: Tensor) -> float:
    """|| B A ||^2 (Frobenius)."""
    return float((up.T @ up * (down @ down.T)).sum())
