"""A checkpoint file or folder -> `Backbone`. Weights are memory-mapped and read once; nothing asks a hub.

Families: SD1.x single files (and the mini-SD, which is one) and diffusers folders of SD1.x.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..errors import CheckpointError
from . import keys, shapes
from .backbone import Backbone

TOKENIZER = Path(__file__).parent / "tokenizer"
MINI_ARCHITECTURE = "stable-diffusion-v1-mini"
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_OTHERS = {
    "conditioner.embedders.": "SDXL", "cond_stage_model.model.": "SD2.x", "double_blocks.": "Flux", "joint_blocks.": "SD3",
    "lora_unet_": "a LoRA", "lora_te": "a LoRA", "concept": "a concept stack",
}  # fmt: skip


def load_backbone(path: str | Path, *, device: str = "auto", dtype: torch.dtype = torch.float32) -> Backbone:
    """Load a checkpoint for learning and drawing.

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
    if f"{keys.UNET_PREFIX}input_blocks.0.0.weight" not in found or f"{keys.TEXT_PREFIX}embeddings.token_embedding.weight" not in found:
        kind = next((kind for start, kind in _OTHERS.items() if any(start in name for name in names)), "something else")
        raise CheckpointError(
            f"{path} is not an SD1.x checkpoint; its weights look like {kind} (first key: {names[0] if names else 'none'}). "
            "Expected a full SD1.x model in one file: U-Net, text encoder and VAE."
        )

    def part(
        make: Callable[[dict[str, Any]], nn.Module], prefix: str, table: Callable[[Iterable[str]], dict[str, str]], config: Callable
    ) -> nn.Module:
        mine = {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}
        try:
            with torch.device("meta"):
                module = make(config(mine))
        except (KeyError, ValueError, StopIteration) as error:
            raise CheckpointError(f"{path}: the weights under {prefix} are incomplete ({error}). Expected a full SD1.x model in one file.") from None
        expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
        ldm = table(expected)
        missing = [prefix + ldm[name] for name in expected if ldm[name] not in mine]
        if missing:
            raise CheckpointError(
                f"{path} lacks {len(missing)} weights of its {prefix.rstrip('.')}, the first is {missing[0]}. Get a complete checkpoint."
            )

        def read(name: str) -> Tensor:
            tensor = file.get_tensor(prefix + ldm[name])
            if tensor.shape != expected[name] and tensor.numel() != expected[name].numel():
                raise CheckpointError(f"{path}: {prefix + ldm[name]} has shape {tuple(tensor.shape)}, expected {tuple(expected[name])}.")
            return tensor.reshape(expected[name]).to(dtype)

        module.load_state_dict({name: read(name) for name in expected}, assign=True)
        return module

    unet = part(lambda c: UNet2DConditionModel(**c), keys.UNET_PREFIX, keys.unet_names, shapes.unet_config)
    if f"{keys.VAE_PREFIX}taesd_decoder.1.weight" in found:  # a TAESD in place of the VAE; it already works on scaled latents
        vae = part(lambda c: AutoencoderTiny(**c), keys.VAE_PREFIX, keys.tiny_vae_names, lambda _: {"scaling_factor": 1.0})
    else:
        vae = part(lambda c: AutoencoderKL(**c), keys.VAE_PREFIX, keys.vae_names, shapes.vae_config)
    text = part(lambda c: CLIPTextModel(CLIPTextConfig(**c)), keys.TEXT_PREFIX, keys.text_names, shapes.text_config)
    for module in text.modules():  # a buffer no file stores
        if "position_ids" in module._buffers:
            module._buffers["position_ids"] = torch.arange(module.position_embedding.num_embeddings)[None]  # type: ignore[union-attr]
    mini = metadata.get("modelspec.architecture") == MINI_ARCHITECTURE
    size = int(metadata.get("modelspec.resolution", "512x512").split("x")[0])
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    return Backbone(path, unet, vae, text, tokenizer, "mini" if mini else "sd1", size)  # type: ignore[arg-type]


def _from_folder(path: Path, dtype: torch.dtype) -> Backbone:
    index = path / "model_index.json"
    if not index.exists():
        raise CheckpointError(f"{path} is a folder without model_index.json. Expected a diffusers model folder, or the path of a .safetensors file.")
    kind = json.loads(index.read_text()).get("_class_name", "")
    if kind != "StableDiffusionPipeline":
        raise CheckpointError(f"{path} holds a {kind}. Expected a StableDiffusionPipeline (SD1.x).")
    tiny = json.loads((path / "vae" / "config.json").read_text()).get("_class_name") == "AutoencoderTiny" if (path / "vae").is_dir() else False

    def part(kind: Any, folder: str) -> Any:
        module, report = kind.from_pretrained(
            path, subfolder=folder, local_files_only=True, use_safetensors=True, torch_dtype=dtype, output_loading_info=True, low_cpu_mem_usage=False
        )
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(f"{path / folder} lacks {len(missing)} weights, the first is {missing[0]}. Get a complete model folder.")
        return module

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unet = part(UNet2DConditionModel, "unet")
            vae = part(AutoencoderTiny if tiny else AutoencoderKL, "vae")
            text = part(CLIPTextModel, "text_encoder")
            tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The diffusers folder {path} can't be loaded: {error}") from None
    size = 8 * (unet.config["sample_size"] or 64)
    return Backbone(path, unet, vae, text, tokenizer, "sd1" if size > 128 else "mini", size)
