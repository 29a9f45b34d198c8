"""Which checkpoint a MODEL of ComfyUI was loaded from. Only ComfyUI imports this module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_MOST = 0.01  # of a weight's norm: what a host may have rounded differently


def is_from(model: Any, checkpoint: Path) -> bool:
    """Whether a MODEL may have its weights from this file, judged by one layer of K.

    It is what learning changes, so another checkpoint's differs. LoRAs on the MODEL don't count. True
    if it can't be told, as for a folder or for weights that are kept in another form.
    """
    from safetensors import SafetensorError, safe_open  # not light

    layers = {
        name: patches[0][0] if isinstance(patches[0], tuple) else patches[0]
        for name, patches in model.get_key_patches("diffusion_model.").items()
        if name.endswith(".attn2.to_k.weight")
    }
    try:
        with safe_open(checkpoint, "pt") as file:
            name = min(layers)
            return _is_rounded(layers[name], file.get_tensor(f"model.{name}"))
    except (OSError, SafetensorError, ValueError):
        return True


def _is_rounded(weight: Tensor, original: Tensor) -> bool:
    """Whether a weight is the original in its own dtype."""
    if weight.shape != original.shape or not weight.is_floating_point():
        return True
    difference = weight.float().cpu() - original.to(weight.dtype).float()
    return float(difference.norm()) <= _MOST * float(original.float().norm())
