"""A checkpoint file or folder -> `Backbone`. Weights are memory-mapped and read once; nothing asks a hub.

Families: SD1.x (the mini-SD is one), SD2.x and SDXL; see `families`. Weights the family does not use are left alone, missing ones are named.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from ..errors import CheckpointError
from . import keys, shapes
from .backbone import Backbone
from .families import SD1, SD2, SDXL, Family, TextPart, check_channels, family_of
from .text import TextEncoder

TOKENIZER = Path(__file__).parent / "tokenizer"
MINI_ARCHITECTURE = "stable-diffusion-v1-mini"
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_V_BIAS = f"{keys.UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def load_backbone(path: str | Path, *, device: str = "auto", dtype: torch.dtype = torch.float32) -> Backbone:
    """Load a checkpoint for learning and drawing; `dtype` is that of U-Net and text encoders, the VAE is float32 (SDXL's overflows in float16).

    Errors: CheckpointError for a missing file, a pickle, another architecture, a damaged file or missing weights.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}. Give the path of a .safetensors file or of a diffusers folder.")
    if path.is_dir():
        backbone = _from_folder(path, dtype)
    elif path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle ({path.suffix}): loading one can run any program hidden in it, so it is refused. "
            "Get the same model as .safetensors, or convert it in a program you trust (A1111: Checkpoint Merger, one model, safetensors)."
        )
    else:
        backbone = _from_file(path, dtype)
    return backbone.to(pick_device(device))


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise CheckpointError(f"The device {name!r} can't be used here: {error}. Use auto, cpu, cuda or mps.") from None
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def _from_file(path: Path, dtype: torch.dtype) -> Backbone:
    try:
        with safe_open(path, framework="pt") as file:
            return _from_open_file(path, file, dtype)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be read as safetensors ({error}). Expected a complete .safetensors file; download or copy it again."
        ) from None


def _from_open_file(path: Path, file: Any, dtype: torch.dtype) -> Backbone:
    names, metadata = list(file.keys()), file.metadata() or {}
    found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    family = family_of(path, found)

    def part(
        make: Callable[[dict[str, Any]], nn.Module], prefix: str, table: Callable[[Iterable[str]], dict[str, str]], config: Callable,
        number: torch.dtype = dtype,
    ) -> nn.Module:  # fmt: skip
        mine = {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}
        try:
            with torch.device("meta"):
                module = make(config(mine))
        except (KeyError, ValueError, StopIteration) as error:
            raise CheckpointError(
                f"{path}: the weights under {prefix} are incomplete ({error}). Expected a full {family.name} model in one file."
            ) from None
        expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
        ldm = table(expected)
        missing = [prefix + ldm[name] for name in expected if ldm[name] not in mine]
        if missing:
            raise CheckpointError(
                f"{path} lacks {len(missing)} weights of its {prefix.rstrip('.')}, the first is {missing[0]}. Get a complete checkpoint."
            )

        def read(name: str) -> Tensor:
            tensor = _stored(file, prefix + ldm[name], name)
            if tensor.shape != expected[name] and tensor.numel() != expected[name].numel():
                raise CheckpointError(f"{path}: {prefix + ldm[name]} has shape {tuple(tensor.shape)}, expected {tuple(expected[name])}.")
            return tensor.reshape(expected[name]).to(number)

        module.load_state_dict({name: read(name) for name in expected}, assign=True)
        return module

    unet = part(lambda c: UNet2DConditionModel(**c), keys.UNET_PREFIX, keys.unet_names, shapes.unet_config)
    if f"{keys.VAE_PREFIX}taesd_decoder.1.weight" in found:  # a TAESD in place of the VAE; it already works on scaled latents
        vae = part(lambda c: AutoencoderTiny(**c), keys.VAE_PREFIX, keys.tiny_vae_names, lambda _: {"scaling_factor": 1.0}, torch.float32)
    else:
        vae = part(lambda c: AutoencoderKL(**c, scaling_factor=family.scale), keys.VAE_PREFIX, keys.vae_names, shapes.vae_config, torch.float32)

    def text(one: TextPart) -> TextEncoder:
        names, config = (keys.openclip_names, shapes.openclip_config) if one.openclip else (keys.text_names, shapes.text_config)

        def made(c: dict[str, Any]) -> nn.Module:
            return one.kind(CLIPTextConfig(**{**c, "num_hidden_layers": min(c["num_hidden_layers"], one.layers)}))

        model = part(made, one.prefix, names, config)
        for module in model.modules():  # a buffer no file stores
            if "position_ids" in module._buffers:
                module._buffers["position_ids"] = torch.arange(module.position_embedding.num_embeddings)[None]  # type: ignore[union-attr]
        return _encoder(model, one, tokenizer)

    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    texts = [text(one) for one in family.texts]
    mini = metadata.get("modelspec.architecture") == MINI_ARCHITECTURE
    prediction = _prediction(file, found, metadata, family)
    size = int(metadata.get("modelspec.resolution", str(_size(family, prediction))).split("x")[0])
    zero_snr = prediction == "v_prediction" and "ztsnr" in found
    return Backbone(path, unet, vae, texts, tokenizer, "mini" if mini else family.id, size, prediction, zero_snr)  # type: ignore[arg-type]


def _stored(file: Any, ldm: str, name: str) -> Tensor:
    """The weight `name` out of the file's tensor `ldm`: OpenCLIP stacks q, k and v, and its text projection is the transpose of a linear layer's."""
    if "attn.in_proj_" in ldm:
        stacked, part = file.get_slice(ldm), "qkv".index(name[name.index("_proj") - 1])
        size = stacked.get_shape()[0] // 3
        return stacked[part * size : (part + 1) * size]
    tensor = file.get_tensor(ldm)
    return tensor.T if ldm.endswith(".text_projection") else tensor


def _prediction(file: Any, found: Mapping[str, Any], metadata: Mapping[str, str], family: Family) -> str:
    """What the net predicts: what the metadata say, else what SDXL's fine-tunes mark with a key, else ComfyUI's rule of thumb for SD2.x."""
    if said := metadata.get("modelspec.prediction_type"):
        v = said.startswith("v")
    elif family is SD2:
        v = _V_BIAS in found and float(file.get_tensor(_V_BIAS).float().std(correction=0)) > 0.09
    else:
        v = "v_pred" in found
    return "v_prediction" if v else "epsilon"


def _size(family: Family, prediction: str) -> int:
    return 768 if family is SD2 and prediction == "v_prediction" else family.size


def _encoder(model: Any, part: TextPart, tokenizer: CLIPTokenizer) -> TextEncoder:
    return TextEncoder(model, 0 if part.openclip else int(tokenizer.eos_token_id), part.penultimate)  # type: ignore[arg-type]


def _from_folder(path: Path, dtype: torch.dtype) -> Backbone:
    index = path / "model_index.json"
    if not index.exists():
        raise CheckpointError(f"{path} is a folder without model_index.json. Expected a diffusers model folder, or the path of a .safetensors file.")
    kind = json.loads(index.read_text()).get("_class_name", "")
    if kind not in (SD1.pipeline, SDXL.pipeline):
        raise CheckpointError(f"{path} holds a {kind}. Expected a {SD1.pipeline} (SD1.x, SD2.x) or a {SDXL.pipeline}.")
    variant = next(("fp16" for _ in (path / "unet").glob("*.fp16.safetensors")), None)
    tiny = _config(path / "vae").get("_class_name") == "AutoencoderTiny"
    linear, scheduler = _config(path / "unet").get("use_linear_projection"), _config(path / "scheduler", "scheduler_config.json")
    family = SDXL if kind == SDXL.pipeline else SD2 if linear else SD1

    def part(kind: Any, folder: str, number: torch.dtype = dtype) -> Any:
        module, report = kind.from_pretrained(
            path, subfolder=folder, variant=variant, local_files_only=True, use_safetensors=True, torch_dtype=number, output_loading_info=True,
            low_cpu_mem_usage=False,
        )  # fmt: skip
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(f"{path / folder} lacks {len(missing)} weights, the first is {missing[0]}. Get a complete model folder.")
        return module

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unet = part(UNet2DConditionModel, "unet")
            vae = part(AutoencoderTiny if tiny else AutoencoderKL, "vae", torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", local_files_only=True)
            texts = [_encoder(part(one.kind, one.folder), one, tokenizer) for one in family.texts]
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The diffusers folder {path} can't be loaded: {error}") from None
    check_channels(path, unet.config["in_channels"])
    size = 8 * (unet.config["sample_size"] or family.size // 8)
    preset = "mini" if family is SD1 and size <= 128 else family.id
    prediction, zero_snr = scheduler.get("prediction_type", "epsilon"), scheduler.get("rescale_betas_zero_snr", False)
    return Backbone(path, unet, vae, texts, tokenizer, preset, size, prediction, zero_snr)


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A part's configuration; empty where it has none."""
    return json.loads((folder / name).read_text()) if (folder / name).exists() else {}
