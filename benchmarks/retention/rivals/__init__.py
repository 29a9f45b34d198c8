"""Rivals of `retention`: methods that keep a LoRA and a word for each concept, and no pictures. One
file a method; the interface is in `rival`.

    rival         the interface
    learning      how one concept is learned, and a stack that draws all with one adapter
    features      text features
    peft_merge    merging by peft
"""

from __future__ import annotations

from .cidm import Cidm
from .custom_diffusion_merge import CustomDiffusionMerge
from .dare import Dare
from .gradient_fusion import GradientFusion
from .magnitude import Magnitude
from .merge_reinit import MergeReinit
from .o_lora import OLora
from .orthogonal_adaptation import OrthogonalAdaptation
from .plain_sum import PlainSum
from .rival import Own, Rival
from .solve import Solve
from .ties import Ties

__all__ = ["RIVALS", "Own", "Rival"]

RIVALS: dict[str, Rival] = {
    rival.id: rival
    for rival in (
        PlainSum(),
        Ties(),
        Dare(),
        Magnitude(),
        CustomDiffusionMerge(),
        GradientFusion(),
        Solve(),
        OrthogonalAdaptation(),
        OLora(),
        MergeReinit(),
        Cidm(),
    )
}
