"""A checkpoint file or folder -> `Backbone`.

Weights are memory-mapped and read once, straight into their dtype and to their device; nothing is
downloaded. Families: SD1.x (the mini-SD is one), SD2.x and SDXL (`families`), and Anima. Weights that
the family does not use are ignored, missing ones are named.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..errors import CheckpointError
from .anima import AnimaBackbone
from .anima_layout import (
    AnimaLayout,
    anima_file_layout,
    anima_folder_layout,
    anima_tokenizers,
)
from .backbone import Backbone
from .families import ANIMA_PIPELINE
from .folder import folder_layout, pipeline_of
from .keys import is_anima_net
from .layout import PROMPT_LENGTH, Fingerprint, Layout, open_safetensors
from .narrow import dtype_for, put, put_unet
from .path import check_path
from .single_file import file_layout
from .stable import StableBackbone
from .text import TextEncoder

AnyLayout = Layout | AnimaLayout


def load_backbone(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "fp32",
    prediction: str | None = None,
) -> Backbone:
    """Load a checkpoint for learning and drawing.

    `prediction`: what the net predicts, in diffusers' words, if not what its files say.
    `precision` (a setting) is the net's; the VAE is float32 (SDXL's overflows in float16).
    Errors: CheckpointError for a missing file, a pickle, another architecture, a damaged file or
    missing weights.
    """
    target = pick_device(device)
    weights = _Placing(target, dtype_for(precision, target))
    with open_checkpoint(Path(path)) as layout:
        if isinstance(layout, AnimaLayout):
            backbone = _anima(Path(path), layout, weights)
        else:
            backbone = _stable(Path(path), layout, weights)
    return replace(backbone, prediction=prediction) if prediction else backbone


@dataclass(frozen=True)
class _Placing:
    """Where a checkpoint's weights go, by part, for `Part.fill`."""

    device: torch.device
    dtype: torch.dtype
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    def net(self, net: nn.Module, name: str, weight: Tensor) -> None:
        self.fingerprint.add(name, weight)
        put_unet(net, name, weight.to(self.device), self.dtype)

    def vae(self, vae: nn.Module, name: str, weight: Tensor) -> None:
        put(vae, name, weight, torch.float32)

    def text(self, model: nn.Module, name: str, weight: Tensor) -> None:
        stored = weight.dtype if self.dtype != torch.float32 else None
        put(model, name, weight.to(self.device), torch.float32, stored)


def _stable(path: Path, layout: Layout, weights: _Placing) -> StableBackbone:
    unet = layout.unet.fill(weights.net)
    vae = layout.vae.fill(weights.vae)
    tokenizer = _tokenizer(layout)
    encoders = []
    for part, text in zip(layout.texts, layout.family.texts, strict=True):
        model = part.fill(weights.text)
        _fill_position_ids(model, weights.device)
        pad = 0 if text.openclip else int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        encoders.append(TextEncoder(model, pad, text.penultimate))
    return StableBackbone(
        path=path,
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizer=tokenizer,
        preset=layout.preset,
        size=layout.size,
        fingerprint=weights.fingerprint.hexdigest(),
        prediction=layout.prediction,
        declares_zero_snr=layout.declares_zero_snr,
        device=weights.device,
    )


def _anima(path: Path, layout: AnimaLayout, weights: _Placing) -> AnimaBackbone:
    qwen_tokenizer, t5_tokenizer = anima_tokenizers(layout)
    unet = layout.unet.fill(weights.net)
    text, conditioner = layout.text.fill(weights.text), layout.conditioner.fill(weights.text)
    # their frequencies are in no file
    text.rotary_emb = type(text.rotary_emb)(text.config).to(weights.device)
    rotary = conditioner.rotary_emb
    head = 2 * len(rotary.inv_freq)
    conditioner.rotary_emb = type(rotary)(head).to(weights.device)
    return AnimaBackbone(
        path=path,
        unet=unet,
        vae=layout.vae.fill(weights.vae),
        text_encoder=text,
        conditioner=conditioner,
        tokenizer=t5_tokenizer,
        qwen_tokenizer=qwen_tokenizer,
        size=layout.size,
        fingerprint=weights.fingerprint.hexdigest(),
        device=weights.device,
    )


def _tokenizer(layout: Layout) -> CLIPTokenizer:
    """Errors: CheckpointError for a folder without one, or one that is not the text encoder's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = CLIPTokenizer.from_pretrained(  # nosec B615
                str(layout.tokenizer), local_files_only=True
            )
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        vocabulary = tokenizer.get_vocab()
        largest = max(vocabulary.values())
    except Exception as error:  # the library raises anything for files of another kind
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The tokenizer {layout.tokenizer} can't be read ({type(error).__name__}: "
            f"{reason:.200}). Expected vocab.json and merges.txt, or tokenizer.json; get a "
            "complete model folder."
        ) from None
    words = min(part.module.config.vocab_size for part in layout.texts)
    if largest >= words or len(ends - {None}) < 2 or "a</w>" not in vocabulary:
        raise CheckpointError(
            f"The tokenizer {layout.tokenizer} does not fit: its largest token is {largest}, its "
            f"start and end are {sorted(map(str, ends))}, the text encoder knows {words} tokens. "
            "Expected CLIP's. "
            "Get a complete model folder."
        )
    tokenizer.model_max_length = PROMPT_LENGTH  # without tokenizer_config.json it is endless
    return tokenizer


def _fill_position_ids(model: Any, device: torch.device) -> None:
    """A buffer that no file stores."""
    for module in model.modules():
        if "position_ids" in module._buffers:
            count = module.position_embedding.num_embeddings
            module._buffers["position_ids"] = torch.arange(count, device=device)[None]


def pick_device(name: str) -> torch.device:
    """The device of a setting: "auto" is CUDA (NVIDIA, and AMD under ROCm), then Intel's XPU, then
    Apple's MPS, then the CPU.

    Errors: CheckpointError for a device that can't be used here, or that keeps no numbers (meta).
    """
    if name != "auto":
        try:
            number = torch.zeros(1, device=name)
            number.item()
            return number.device
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"The device {name!r} can't be used here ({reason:.200}). Use auto, cpu, cuda, xpu or "
                "mps."
            ) from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def open_checkpoint(path: Path) -> Iterator[AnyLayout]:
    """A checkpoint's layout; its files are open inside the block.

    Errors: CheckpointError as in `load_backbone`.
    """
    check_path(path)
    with ExitStack() as stack:

        def open_file(file: Path) -> Any:
            return stack.enter_context(open_safetensors(file))

        if path.is_dir():
            is_anima = pipeline_of(path)[1] == ANIMA_PIPELINE
            layout = (anima_folder_layout if is_anima else folder_layout)(path, open_file)
        elif is_anima_net((file := open_file(path)).keys()):
            layout = anima_file_layout(path, file, open_file)
        else:
            layout = file_layout(path, file)
        layout.check(path)
        yield layout
