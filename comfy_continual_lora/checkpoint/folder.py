"""A diffusers folder: its `Layout`, from its configurations and the names of its weights.

Of each part the float16 weights (`.fp16.safetensors`) are taken if there are any, else the plain ones,
else the bfloat16 ones.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig

from ..errors import CheckpointError
from ..files import check_regular
from ..presets import BETA_END, BETA_START, TIMESTEPS
from . import keys
from .families import (
    ANIMA_PIPELINE,
    SD1,
    SD2,
    SDXL,
    Family,
    TextPart,
    check_channels,
    pipeline_kind,
)
from .layout import (
    Layout,
    Part,
    Weights,
    check_layer_counts,
    holds_tokenizer,
    part_of,
    usual_size,
)

_INDEXES = ("model_index.json", "modular_model_index.json")
_VARIANTS = (".fp16", "", ".bf16")
_LARGEST = 10**6  # number in a configuration


def folder_layout(path: Path, open_file: Callable[[Path], Any]) -> Layout:
    """Errors: CheckpointError for another model, and for parts that are missing, damaged, or not
    what their configuration says.
    """
    family = _family(path)
    nets = Nets(path, open_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet = nets.unet()
        vae = nets.vae(family)
        texts = [nets.text(text) for text in family.texts]
    size = _size(path, unet.module.config["sample_size"], family)
    prediction, declares_zero_snr = _scheduler(path, family)
    return Layout(
        family,
        "mini" if family is SD1 and size <= 128 else family.id,
        size,
        unet,
        vae,
        texts,
        tokenizer_part(path, "tokenizer"),
        prediction,
        declares_zero_snr,
    )


def _family(path: Path) -> Family:
    """Errors: CheckpointError for a folder of none."""
    index, pipeline = pipeline_of(path)
    if pipeline == SDXL.pipeline:
        return SDXL
    if pipeline != SD1.pipeline:
        kind = pipeline_kind(pipeline) if isinstance(pipeline, str) else "no pipeline with a name"
        raise CheckpointError(
            f"{path} can't be taught: it holds {kind}. Expected a "
            f"{SD1.pipeline} (SD1.x, SD2.x), a {SDXL.pipeline} or an {ANIMA_PIPELINE} in {index}."
        )
    config = _read_json(_folder(path, "unet") / "config.json")
    return SD2 if config.get("use_linear_projection") else SD1


def pipeline_of(path: Path) -> tuple[str, Any]:
    """A folder's index and the pipeline it names. Errors: CheckpointError for one without index."""
    index = next((path / name for name in _INDEXES if (path / name).is_file()), None)
    if index is None:
        raise CheckpointError(
            f"{path} is a folder without model_index.json. Expected a diffusers model folder, or "
            "the path of a .safetensors file."
        )
    return index.name, _read_json(index).get("_class_name")


@dataclass(frozen=True)
class Nets:
    """The nets of a folder."""

    path: Path
    open_file: Callable[[Path], Any]

    def unet(self) -> Part:
        config = self.config("unet", UNet2DConditionModel)
        if isinstance(channels := config.get("in_channels", 4), int):
            check_channels(self.path, channels)
        return self.part("unet", config, UNet2DConditionModel.from_config)

    def vae(self, family: Family) -> Part:
        config = self.config("vae", AutoencoderKL)
        if config.get("_class_name") == "AutoencoderTiny":
            config = self.config("vae", AutoencoderTiny)
            return self.part("vae", config, AutoencoderTiny.from_config)
        config = {"scaling_factor": family.scale, **config}
        if not config["scaling_factor"]:
            raise CheckpointError(
                f"{self.path / 'vae' / 'config.json'}: scaling_factor is "
                f"{config['scaling_factor']}. Expected {family.scale}, as in {family.name}."
            )
        return self.part("vae", config, AutoencoderKL.from_config, keys.older_vae_name)

    def text(self, text: TextPart) -> Part:
        def make(config: dict[str, Any]) -> Any:
            return text.kind(CLIPTextConfig(**config))

        config = self.config(text.folder, CLIPTextConfig)
        return self.part(text.folder, config, make, keys.other_text_name)

    def config(self, folder: str, kind: type) -> dict[str, Any]:
        """The configuration of a `kind`. Errors: CheckpointError for a value of another type."""
        file = _folder(self.path, folder) / "config.json"
        config = _read_json(file)
        for field, parameter in inspect.signature(kind).parameters.items():
            value = config.get(field)
            # null may stand for a default, but not for a number that is computed with
            is_float = parameter.annotation in (float, "float") or type(parameter.default) is float
            may_be_null = field not in config or not is_float
            if field == "sample_size" or (value is None and may_be_null):
                continue
            per_block = re.search("tuple|list", str(parameter.annotation).lower()) is not None
            if expected := _mismatch(value, parameter.default, per_block):
                raise CheckpointError(
                    f"{file}: {field} is {value!r:.100}. Expected {expected}; get a complete copy "
                    "of the model folder."
                )
        return config

    def part(
        self,
        folder: str,
        config: dict[str, Any],
        make: Callable[[dict[str, Any]], Any],
        other_name: Callable[[str], str] = str,
    ) -> Part:
        """The net that `make` makes; `other_name` gives the name of a weight in other versions."""
        weights = self._weights(self.path / folder)
        check_layer_counts(config, weights, self.path / folder / "config.json")
        return part_of(
            weights,
            lambda: make(config),
            "",
            lambda names: {name: name if name in weights else other_name(name) for name in names},
        )

    def _weights(self, folder: Path) -> Weights:
        """Errors: CheckpointError if there are none."""
        stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
        shard = r"(-\d+-of-\d+)?"
        for variant in _VARIANTS:
            pattern = rf"{stem}{shard}{re.escape(variant)}{shard}\.safetensors"
            files = sorted(f for f in folder.iterdir() if re.fullmatch(pattern, f.name))
            if files:
                return Weights(folder, map(self.open_file, files))
        raise CheckpointError(
            f"There is no {stem}.safetensors in {folder}. Get a model folder with .safetensors "
            "weights; pickles (.bin) are refused."
        )


def _mismatch(value: Any, default: Any, per_block: bool) -> str:
    """What is expected in place of a value of another type than the default; empty if it fits.

    `per_block`: there may be a list, of a value for each block.
    """
    if default is Parameter.empty or value == default == []:
        return ""
    if isinstance(default, (tuple, list)) and not (isinstance(value, list) and value):
        return "a list"
    if isinstance(value, list) and per_block:
        inner = next(iter(default), 0) if isinstance(default, (tuple, list)) else default
        return next(filter(None, (_mismatch(one, inner, per_block) for one in value)), "")
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "text"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "" if default is None else "a number"
    is_plausible = math.isfinite(value) and abs(value) <= _LARGEST
    may_be_negative = default is None or (isinstance(default, float) and default < 0)
    if is_plausible and (value >= 0 or may_be_negative):
        return ""
    return f"a number from {-_LARGEST if may_be_negative else 0} to {_LARGEST}"


def _size(path: Path, sample_size: Any, family: Family) -> int:
    """Pixels a side, of a side in latents or a pair of sides.

    Errors: CheckpointError for anything else.
    """
    if sample_size is None:
        return family.size
    sides = sample_size if isinstance(sample_size, (list, tuple)) else [sample_size]
    if not sides or not all(isinstance(side, int) and usual_size(8 * side) for side in sides):
        raise CheckpointError(
            f"{path / 'unet' / 'config.json'}: sample_size is {sample_size!r:.100}. Expected a "
            "side in latents, such as 64, or a pair of them."
        )
    return 8 * min(sides)


# Stable Diffusion's noise schedule in diffusers' words; a file may leave fields out
_SCHEDULE = {
    "num_train_timesteps": TIMESTEPS,
    "beta_schedule": "scaled_linear",
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "trained_betas": None,
}


def _scheduler(path: Path, family: Family) -> tuple[str, bool]:
    """What the net predicts, and whether its noise schedule is to be rescaled to a zero terminal SNR.

    Errors: CheckpointError for a noise schedule that is not known here. Without a scheduler SD1.x
    predicts epsilon; of the others there are both kinds.
    """
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file() and family is SD1:
        return "epsilon", False
    config = _read_json(file)
    prediction = config.get("prediction_type", "epsilon")
    zero_snr = config.get("rescale_betas_zero_snr") or False
    kind = str(config.get("_class_name", ""))
    known = prediction in ("epsilon", "v_prediction") and isinstance(zero_snr, bool)
    for name, value in _SCHEDULE.items():
        if config.get(name, value) != value:
            raise CheckpointError(
                f"{file}: {name} is {config[name]!r:.100}. Expected {value!r}, as in Stable "
                "Diffusion's noise schedule; take a model with that."
            )
    if not known or kind.startswith(("EDM", "FlowMatch")):
        raise CheckpointError(
            f"{file}: prediction_type is {prediction!r:.100}, rescale_betas_zero_snr is "
            f"{zero_snr!r:.100} and _class_name is {kind!r:.100}. Expected epsilon or v_prediction "
            "on the noise schedule of Stable Diffusion; take a model with that."
        )
    return prediction, zero_snr


def tokenizer_part(path: Path, name: str) -> Path:
    """Errors: CheckpointError if its files are missing; the library would make up an empty one."""
    folder = _folder(path, name)
    if not holds_tokenizer(folder):
        raise CheckpointError(
            f"There is neither vocab.json nor tokenizer.json in {folder}. Get a complete model "
            "folder."
        )
    return folder


def _folder(path: Path, name: str) -> Path:
    """Errors: CheckpointError if this part is missing."""
    if not (path / name).is_dir():
        raise CheckpointError(
            f"{path} lacks the folder {name}. Get a complete model folder, or a single "
            ".safetensors file of the model."
        )
    return path / name


def _read_json(file: Path) -> dict[str, Any]:
    """Errors: CheckpointError for a file that is missing or holds no JSON object."""
    try:
        check_regular(file)
        value = json.loads(file.read_text("utf-8-sig"))
        if isinstance(value, dict):
            return value
        reason = f"it holds a {type(value).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise CheckpointError(
        f"{file} can't be read ({reason:.200}). Expected a JSON object; get a complete copy of the "
        "model folder."
    )
