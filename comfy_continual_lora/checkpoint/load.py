"""A checkpoint file or folder -> `Backbone`. Weights are memory-mapped, and read once, straight
into their number format and to their device; nothing
asks a hub.

Families: SD1.x (the mini-SD is one), SD2.x and SDXL; see `families`. Weights the family does not
use are left alone, missing ones are named.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from ..errors import CheckpointError
from . import keys, shapes
from .backbone import KV_MODULES, Backbone
from .families import SD1, SD2, SDXL, Family, TextPart, check_channels, family_of
from .narrow import number_for, put, put_unet
from .text import TextEncoder

TOKENIZER = Path(__file__).parent / "tokenizer"
MINI_ARCHITECTURE = "stable-diffusion-v1-mini"
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_NOT_QUANTISED = "It looks like a quantised copy; get the model in float32, float16 or bfloat16."
_V_BIAS = f"{keys.UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def load_backbone(path: str | Path, *, device: str = "auto", precision: str = "fp32") -> Backbone:
    """Load a checkpoint for learning and drawing; `precision` (a setting) is the U-Net's, the VAE
    is float32 (SDXL's overflows in float16).

    Errors: CheckpointError for a missing file, a pickle, another architecture, a damaged file or
    missing weights.
    """
    path, here = Path(path), pick_device(device)
    number = number_for(precision, here)
    with described(path) as (layout, file):
        return (_load_folder if path.is_dir() else _load_file)(path, layout, file, here, number)


def checked(path: Path) -> Path:
    """The path. Errors: CheckpointError for nothing there, and for a pickle."""
    if not path.exists():
        raise CheckpointError(
            f"There is no checkpoint at {path}. Give the path of a .safetensors file or of a "
            "diffusers folder."
        )
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise CheckpointError(
            f"{path} is a pickle ({path.suffix}): loading one can run any program hidden in it, "
            "so it is refused. "
            "Get the same model as .safetensors, or convert it in a program you trust (A1111: "
            "Checkpoint Merger, one model, safetensors)."
        )
    return path


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise CheckpointError(
                f"The device {name!r} can't be used here: {error}. Use auto, cpu, cuda or mps."
            ) from None
    return torch.device(
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Errors: CheckpointError for one that can't be read, now or while the block reads it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be read as safetensors ({error}). Expected a complete .safetensors "
            "file; download or copy it again."
        ) from None


def fingerprint(path: Path) -> str:
    """`Backbone.fingerprint`, read without the rest.

    Errors: CheckpointError as in `load_backbone`.
    """
    seen = _Fingerprint()
    with described(path) as (layout, file):
        for name in layout.unet.names:
            if seen.asks_for(name):
                seen.see(name, layout.unet.read(file, name))
    return seen.digest.hexdigest()


class _Fingerprint:
    """Hashes the weights of K and V, in float32, in the order of their names."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    @staticmethod
    def asks_for(name: str) -> bool:
        return re.fullmatch(rf"{KV_MODULES}\.weight", name) is not None

    def see(self, name: str, weight: Tensor) -> None:
        if self.asks_for(name):
            self.digest.update(
                f"{name.removesuffix('.weight')}{tuple(weight.shape)}".encode()
                + weight.float().numpy().tobytes()
            )


@dataclass(frozen=True)
class Part:
    """A net without its weights, on the meta device, and what they are called in the file: {name:
    name there}, K and V first.
    """

    path: Path
    module: Any
    names: Mapping[str, str]

    def read(self, file: Any, name: str) -> Tensor:
        """One weight as it is stored, in the net's shape."""
        tensor, expected = (
            _stored(file, self.names[name], name),
            self.module.get_parameter(name).shape,
        )
        if tensor.shape != expected and tensor.numel() != expected.numel():
            raise CheckpointError(
                f"{self.path}: {self.names[name]} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected)}."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self.path}: {self.names[name]} holds {tensor.dtype} numbers, no weights of a "
                f"net. {_NOT_QUANTISED}"
            )
        return tensor.reshape(expected)

    def filled(self, file: Any, put: Callable[[nn.Module, str, Tensor], None]) -> Any:
        for name in self.names:
            put(self.module, name, self.read(file, name))
        return self.module


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is, told without its weights.

    Of a folder `vae` and `texts` have no names: their own libraries read them.
    """

    family: Family
    preset: str
    size: int
    unet: Part
    vae: Part
    texts: list[Part]


@contextmanager
def described(path: Path) -> Iterator[tuple[Layout, Any]]:
    """A checkpoint's layout and its open file (a folder's: the U-Net's).

    Errors: CheckpointError as in `load_backbone`.
    """
    checked(path)
    if path.is_dir():
        try:
            family = _folder_family(path)
            with _opened_unet(path) as file:
                yield _folder_layout(path, family, file), file
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"The diffusers folder {path} can't be loaded: {error}") from None
    else:
        with opened(path) as file:
            yield _layout(path, file), file


def _part(
    path: Path,
    found: Mapping[str, Any],
    make: Callable[[], Any],
    prefix: str,
    table: Callable[[Iterable[str]], dict[str, str]],
) -> Part:
    """Errors: CheckpointError for weights the net has and `found` has not."""
    with torch.device("meta"):
        module = make()
    ldm = table(module.state_dict())
    if missing := [prefix + name for name in ldm.values() if prefix + name not in found]:
        whose = (
            f"{path} lacks {len(missing)} weights of its {prefix.rstrip('.')}"
            if prefix
            else f"{path} lacks {len(missing)} weights"
        )
        raise CheckpointError(f"{whose}, the first is {missing[0]}. Get a complete checkpoint.")
    ordered = sorted(ldm, key=lambda name: (not _Fingerprint.asks_for(name), name))
    return Part(path, module, {name: prefix + ldm[name] for name in ordered})


def _layout(path: Path, file: Any) -> Layout:
    metadata = file.metadata() or {}
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    family = family_of(path, found)
    if scale := next(
        (
            name
            for name in found
            if name.endswith((".scale_weight", ".weight_scale", ".absmax", "scaled_fp8"))
        ),
        None,
    ):
        raise CheckpointError(
            f"{path} holds weights in few bits with scales beside them (first: {scale}). "
            f"{_NOT_QUANTISED}"
        )

    def part(
        make: Callable[[dict[str, Any]], nn.Module],
        prefix: str,
        table: Callable[[Iterable[str]], dict[str, str]],
        config: Callable,
    ) -> Part:
        try:
            sizes = config(
                {
                    name.removeprefix(prefix): shape
                    for name, shape in found.items()
                    if name.startswith(prefix)
                }
            )
            return _part(path, found, lambda: make(sizes), prefix, table)
        except (KeyError, ValueError, StopIteration) as error:
            raise CheckpointError(
                f"{path}: the weights under {prefix} are incomplete ({error}). Expected a full "
                f"{family.name} model in one file."
            ) from None

    def text(one: TextPart) -> Part:
        names, config = (
            (keys.openclip_names, shapes.openclip_config)
            if one.openclip
            else (keys.text_names, shapes.text_config)
        )

        def made(c: dict[str, Any]) -> nn.Module:
            return one.kind(
                CLIPTextConfig(
                    **{**c, "num_hidden_layers": min(c["num_hidden_layers"], one.layers)}
                )
            )

        return part(made, one.prefix, names, config)

    unet = part(
        lambda c: UNet2DConditionModel(**c), keys.UNET_PREFIX, keys.unet_names, shapes.unet_config
    )
    if (
        f"{keys.VAE_PREFIX}taesd_decoder.1.weight" in found
    ):  # a TAESD in place of the VAE; it already works on scaled latents
        vae = part(
            lambda c: AutoencoderTiny(**c),
            keys.VAE_PREFIX,
            keys.tiny_vae_names,
            lambda _: {"scaling_factor": 1.0},
        )
    else:
        vae = part(
            lambda c: AutoencoderKL(**c, scaling_factor=family.scale),
            keys.VAE_PREFIX,
            keys.vae_names,
            shapes.vae_config,
        )
    mini = metadata.get("modelspec.architecture") == MINI_ARCHITECTURE
    usual = 768 if family is SD2 and _prediction(file, family) == "v_prediction" else family.size
    size = int(metadata.get("modelspec.resolution", str(usual)).split("x")[0])
    return Layout(
        family, "mini" if mini else family.id, size, unet, vae, [text(one) for one in family.texts]
    )


def _load_file(
    path: Path, layout: Layout, file: Any, here: torch.device, number: torch.dtype
) -> Backbone:
    seen = _Fingerprint()

    def take(unet: nn.Module, name: str, weight: Tensor) -> None:
        seen.see(name, weight)
        put_unet(unet, name, weight.to(here), number)

    def take_text(model: nn.Module, name: str, weight: Tensor) -> None:
        put(
            model,
            name,
            weight.to(here),
            torch.float32,
            weight.dtype if number != torch.float32 else None,
        )

    unet, vae = (
        layout.unet.filled(file, take),
        layout.vae.filled(file, lambda vae, name, weight: put(vae, name, weight, torch.float32)),
    )
    tokenizer, texts = CLIPTokenizer.from_pretrained(str(TOKENIZER)), []
    for part, one in zip(layout.texts, layout.family.texts, strict=True):
        model = part.filled(file, take_text)
        for module in model.modules():  # a buffer no file stores
            if "position_ids" in module._buffers:
                module._buffers["position_ids"] = torch.arange(
                    module.position_embedding.num_embeddings, device=here
                )[None]
        texts.append(_encoder(model, one, tokenizer))
    prediction = _prediction(file, layout.family)
    zero_snr = prediction == "v_prediction" and "ztsnr" in file.keys()  # noqa: SIM118 - not a dict
    return Backbone(
        path,
        unet,
        vae,
        texts,
        tokenizer,
        layout.preset,
        layout.size,
        seen.digest.hexdigest(),
        prediction,
        zero_snr,
        here,
    )


def _stored(file: Any, ldm: str, name: str) -> Tensor:
    """The weight `name` out of the file's tensor `ldm`: OpenCLIP stacks q, k and v, and its text
    projection is the transpose of a linear layer's.
    """
    if "attn.in_proj_" in ldm:
        stacked, part = file.get_slice(ldm), "qkv".index(name[name.index("_proj") - 1])
        size = stacked.get_shape()[0] // 3
        return stacked[part * size : (part + 1) * size]
    tensor = file.get_tensor(ldm)
    return tensor.T if ldm.endswith(".text_projection") else tensor


def _prediction(file: Any, family: Family) -> str:
    """What the net predicts: what the metadata say, else what SDXL's fine-tunes mark with a key,
    else ComfyUI's rule of thumb for SD2.x.
    """
    names = file.keys()
    if said := (file.metadata() or {}).get("modelspec.prediction_type"):
        v = said.startswith("v")
    elif family is SD2:
        v = _V_BIAS in names and float(file.get_tensor(_V_BIAS).float().std(correction=0)) > 0.09
    else:
        v = "v_pred" in names
    return "v_prediction" if v else "epsilon"


def _encoder(model: Any, part: TextPart, tokenizer: CLIPTokenizer) -> TextEncoder:
    return TextEncoder(model, 0 if part.openclip else int(tokenizer.eos_token_id), part.penultimate)  # type: ignore[arg-type]


# --- diffusers folders
# --------------------------------------------------------------------------------------------------


class _Shards:
    """Several open safetensors files as one."""

    def __init__(self, files: Iterable[Any]) -> None:
        self.holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict

    def keys(self) -> Iterable[str]:
        return self.holders.keys()

    def get_slice(self, name: str) -> Any:
        return self.holders[name].get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        return self.holders[name].get_tensor(name)


def _variant(path: Path) -> str | None:
    return next(("fp16" for _ in (path / "unet").glob("*.fp16*.safetensors")), None)


@contextmanager
def _opened_unet(path: Path) -> Iterator[_Shards]:
    """The U-Net's weights, from one file or from several."""
    stem = f"diffusion_pytorch_model{'.fp16' if _variant(path) else ''}"
    files = [
        file
        for file in sorted((path / "unet").glob("*.safetensors"))
        if re.fullmatch(rf"{re.escape(stem)}(-\d+-of-\d+)?", file.stem)
    ]
    if not files:
        raise CheckpointError(
            f"There is no {stem}.safetensors in {path / 'unet'}. Get a model folder with "
            ".safetensors weights; pickles are refused."
        )
    with ExitStack() as stack:
        yield _Shards([stack.enter_context(opened(file)) for file in files])


def _folder_family(path: Path) -> Family:
    index = path / "model_index.json"
    if not index.exists():
        raise CheckpointError(
            f"{path} is a folder without model_index.json. Expected a diffusers model folder, or "
            "the path of a .safetensors file."
        )
    kind = json.loads(index.read_text()).get("_class_name", "")
    if kind not in (SD1.pipeline, SDXL.pipeline):
        raise CheckpointError(
            f"{path} holds a {kind}. Expected a {SD1.pipeline} (SD1.x, SD2.x) or a {SDXL.pipeline}."
        )
    return (
        SDXL
        if kind == SDXL.pipeline
        else SD2
        if _config(path / "unet").get("use_linear_projection")
        else SD1
    )


def _folder_layout(path: Path, family: Family, file: _Shards) -> Layout:
    config, vae = _config(path / "unet"), _config(path / "vae")
    check_channels(path, config.get("in_channels", 4))
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        unet = _part(
            path / "unet",
            file.holders,
            lambda: UNet2DConditionModel.from_config(config),
            "",
            lambda names: {n: n for n in names},
        )
        tiny = vae.get("_class_name") == "AutoencoderTiny"
        coder = Part(
            path / "vae", (AutoencoderTiny if tiny else AutoencoderKL).from_config(vae), {}
        )
        texts = [
            Part(path / one.folder, one.kind(CLIPTextConfig(**_config(path / one.folder))), {})
            for one in family.texts
        ]
    size = 8 * (unet.module.config["sample_size"] or family.size // 8)
    return Layout(
        family, "mini" if family is SD1 and size <= 128 else family.id, size, unet, coder, texts
    )


def _load_folder(
    path: Path, layout: Layout, file: _Shards, here: torch.device, number: torch.dtype
) -> Backbone:
    variant, seen = _variant(path), _Fingerprint()

    def take(unet: nn.Module, name: str, weight: Tensor) -> None:
        seen.see(name, weight)
        put_unet(unet, name, weight.to(here), number)

    def own(part: Part, number: torch.dtype | str = torch.float32) -> Any:
        """As the part's library reads it."""
        module, report = type(part.module).from_pretrained(
            path,
            subfolder=part.path.name,
            variant=variant,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=number,
            output_loading_info=True,
            low_cpu_mem_usage=False,
        )
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"{part.path} lacks {len(missing)} weights, the first is {missing[0]}. Get a "
                "complete model folder."
            )
        return module

    def text(part: Part) -> Any:
        if number == torch.float32:
            return own(part).to(here)
        model = own(part, "auto").to(here)
        for name, weight in list(model.named_parameters()):
            put(model, name, weight.detach(), torch.float32, weight.dtype)
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae, tokenizer = (
            own(layout.vae),
            CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", local_files_only=True),
        )
        texts = [
            _encoder(text(part), one, tokenizer)
            for part, one in zip(layout.texts, layout.family.texts, strict=True)
        ]
    scheduler = _config(path / "scheduler", "scheduler_config.json")
    prediction, zero_snr = (
        scheduler.get("prediction_type", "epsilon"),
        scheduler.get("rescale_betas_zero_snr", False),
    )
    unet = layout.unet.filled(file, take)
    return Backbone(
        path,
        unet,
        vae,
        texts,
        tokenizer,
        layout.preset,
        layout.size,
        seen.digest.hexdigest(),
        prediction,
        zero_snr,
        here,
    )


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A part's configuration; empty where it has none."""
    return json.loads((folder / name).read_text()) if (folder / name).exists() else {}
