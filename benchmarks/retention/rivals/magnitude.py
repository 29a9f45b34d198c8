"""`magnitude`: trim each change to its largest entries, and add up.

source      peft's `add_weighted_adapter`, combination "magnitude_prune_svd": TIES' trimming (Yadav
            et al. 2023, arXiv 2306.01708) without the election of signs
equation    t_i = delta_i where |delta_i| is among the largest `density` of the layer, else 0
            delta = weight * sum_i t_i, then its best product of `rank`
remembers   each concept's LoRA and word
cost        one SVD of a dense change per layer
deviations  the density is TIES' (the largest 20 %). The result is not of low rank; `rank` 0 keeps as
            much as the plain sum has. One LoRA alone is not trimmed (`peft_merge`)
"""

from __future__ import annotations

from types import MappingProxyType

from .peft_merge import PeftMerge


class Magnitude(PeftMerge):
    id = "magnitude"
    combination = "magnitude_prune_svd"
    options = MappingProxyType({"density": 0.2, "weight": 1.0, "rank": 0.0})
