"""Which checkpoint a MODEL of ComfyUI was loaded from. Only ComfyUI imports this module."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.keys import name_in_net

if TYPE_CHECKING:
    from torch import Tensor

_K = re.compile(r"diffusion_model\.(.+\.attn2\.to_k|blocks\.\d+\.cross_attn\.k_proj)\.weight")
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
        if _K.fullmatch(name)
    }
    try:
        with safe_open(checkpoint, "pt") as file:
            stored = {name_in_net(name): name for name in file.keys()}  # noqa: SIM118 - no mapping
            name = min(layers)
            original = file.get_tensor(stored[name.removeprefix("diffusion_model.")])
            return _is_rounded(layers[name], original)
    except (OSError, SafetensorError, ValueError, KeyError):
        return True


def _is_rounded(weight: Tensor, original: Tensor) -> bool:
    """Whether a weight is the original in its own dtype."""
    if weight.shape != original.shape or not weight.is_floating_point():
        return True
    difference = weight.float().cpu() - original.to(weight.dtype).float()
    return float(difference.norm()) <= _MOST * float(original.float().norm())
