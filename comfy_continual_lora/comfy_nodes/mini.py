"""The mini-SD in ComfyUI's stock checkpoint loader. Only ComfyUI imports this module."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import folder_paths  # pyright: ignore[reportMissingImports]

MINI = "mini-sd.safetensors"


def offer_mini() -> None:
    """Add the mini-SD to the checkpoint list, and its sizes to the stock loader.

    The match is exact, so no other checkpoint is affected.
    """
    folder = Path(__file__).parents[2] / "models"
    path, shipped = folder / MINI, Path(__file__).parents[1] / "mini" / "weights" / MINI
    try:
        if not path.exists() or path.stat().st_mtime < shipped.stat().st_mtime:
            from ..mini.weights import write_checkpoint

            write_checkpoint(path)
    except OSError as error:
        logging.warning(
            "comfy-continual-lora: the mini-SD can't be written to %s (%s); the workflows need "
            "another checkpoint",
            path,
            error,
        )
        return
    folder_paths.add_model_folder_path("checkpoints", str(folder))
    _register_sizes(path)


def _register_sizes(path: Path) -> None:
    import comfy.supported_models as supported  # pyright: ignore[reportMissingImports]
    from comfy import sd1_clip, supported_models_base  # pyright: ignore[reportMissingImports]
    from safetensors import safe_open

    from ..checkpoint import keys, shapes

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        text = {
            n.removeprefix(keys.TEXT_PREFIX): tuple(file.get_slice(n).get_shape())
            for n in names
            if n.startswith(keys.TEXT_PREFIX)
        }
        channels = file.get_slice(keys.UNET_PREFIX + "input_blocks.0.0.weight").get_shape()[0]
    sizes = shapes.text_config(text)
    width = sizes["hidden_size"]

    class Tokenizer(sd1_clip.SDTokenizer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "embedding_size": width})

    class Tokenizers(sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Tokenizer)

    class Clip(sd1_clip.SD1ClipModel):
        def __init__(
            self, device: Any = "cpu", dtype: Any = None, model_options: Any = None
        ) -> None:
            super().__init__(device, dtype, {**(model_options or {}), "clip_l_model_config": sizes})

    class MiniSD(supported.SD15):
        unet_config = {  # noqa: RUF012 - ComfyUI's way
            **supported.SD15.unet_config,
            "context_dim": width,
            "model_channels": channels,
        }

        def clip_target(self, state_dict: Any = None) -> Any:
            return supported_models_base.ClipTarget(Tokenizers, Clip)

    if not any(model.__name__ == "MiniSD" for model in supported.models):
        supported.models.append(MiniSD)
