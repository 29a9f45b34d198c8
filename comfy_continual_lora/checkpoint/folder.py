"""A diffusers folder: its `Layout`, and the `Backbone` it becomes.

The U-Net's weights are read here; VAE, text encoders and tokenizer by their own libraries.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from ..errors import CheckpointError
from .backbone import Backbone
from .families import SD1, SD2, SDXL, Family, check_channels
from .layout import Fingerprint, Layout, Part, open_safetensors, part_of, text_encoder
from .narrow import put, put_unet


class Shards:
    """Several open safetensors files as one."""

    def __init__(self, files: Iterable[Any]) -> None:
        self.file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict

    def keys(self) -> Iterable[str]:
        return self.file_of.keys()

    def get_slice(self, name: str) -> Any:
        return self.file_of[name].get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        return self.file_of[name].get_tensor(name)


@contextmanager
def open_unet(path: Path) -> Iterator[Shards]:
    """The U-Net's weights, from one file or from several.

    Errors: CheckpointError if there is no such file, or one can't be read.
    """
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
        yield Shards([stack.enter_context(open_safetensors(file)) for file in files])


def _variant(path: Path) -> str | None:
    """ "fp16" for a folder whose files are named so."""
    return "fp16" if any((path / "unet").glob("*.fp16*.safetensors")) else None


def folder_family(path: Path) -> Family:
    """Errors: CheckpointError for a folder that holds none."""
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
    if kind == SDXL.pipeline:
        return SDXL
    return SD2 if _config(path / "unet").get("use_linear_projection") else SD1


def folder_layout(path: Path, family: Family, file: Shards) -> Layout:
    """Errors: CheckpointError for a U-Net that takes in more than latents, or lacks weights."""
    config = _config(path / "unet")
    check_channels(path, config.get("in_channels", 4))
    vae_config = _config(path / "vae")
    tiny = vae_config.get("_class_name") == "AutoencoderTiny"
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        unet = part_of(
            path / "unet",
            file.keys(),
            lambda: UNet2DConditionModel.from_config(config),
            "",
            lambda names: {name: name for name in names},
        )
        vae = (AutoencoderTiny if tiny else AutoencoderKL).from_config(vae_config)
        texts = []
        for text in family.texts:
            folder = path / text.folder
            texts.append(Part(folder, text.kind(CLIPTextConfig(**_config(folder))), {}))
    size = 8 * (unet.module.config["sample_size"] or family.size // 8)
    preset = "mini" if family is SD1 and size <= 128 else family.id
    return Layout(family, preset, size, unet, Part(path / "vae", vae, {}), texts)


def load_folder(
    path: Path, layout: Layout, file: Shards, device: torch.device, dtype: torch.dtype
) -> Backbone:
    fingerprint = Fingerprint()
    library = _Library(path, _variant(path))

    def put_in_unet(unet: nn.Module, name: str, weight: Tensor) -> None:
        fingerprint.add(name, weight)
        put_unet(unet, name, weight.to(device), dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = library.load(layout.vae)
        tokenizer = CLIPTokenizer.from_pretrained(
            path, subfolder="tokenizer", local_files_only=True
        )
        encoders = [
            text_encoder(library.load_text(part, device, dtype), text, tokenizer)
            for part, text in zip(layout.texts, layout.family.texts, strict=True)
        ]
    scheduler = _config(path / "scheduler", "scheduler_config.json")
    return Backbone(
        path,
        layout.unet.fill(file, put_in_unet),
        vae,
        encoders,
        tokenizer,
        layout.preset,
        layout.size,
        fingerprint.hexdigest(),
        scheduler.get("prediction_type", "epsilon"),
        scheduler.get("rescale_betas_zero_snr", False),
        device,
    )


@dataclass(frozen=True)
class _Library:
    """The parts that diffusers and transformers read themselves."""

    path: Path
    variant: str | None

    def load(self, part: Part, dtype: torch.dtype | str = torch.float32) -> Any:
        """Errors: CheckpointError for missing weights, which the libraries would make up."""
        module, report = type(part.module).from_pretrained(
            self.path,
            subfolder=part.path.name,
            variant=self.variant,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=dtype,
            output_loading_info=True,
            low_cpu_mem_usage=False,
        )
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"{part.path} lacks {len(missing)} weights, the first is {missing[0]}. Get a "
                "complete model folder."
            )
        return module

    def load_text(self, part: Part, device: torch.device, dtype: torch.dtype) -> Any:
        """A text encoder that computes in float32, stored as in the file beside a narrow U-Net."""
        if dtype == torch.float32:
            return self.load(part).to(device)
        model = self.load(part, "auto").to(device)
        for name, weight in list(model.named_parameters()):
            put(model, name, weight.detach(), torch.float32, weight.dtype)
        return model


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A part's configuration; empty if it has none."""
    return json.loads((folder / name).read_text()) if (folder / name).exists() else {}
