"""`ties`: trim each change to its largest entries, elect a sign for each entry, and average those
changes that have it.

source      Yadav et al. 2023 (TIES-Merging, arXiv 2306.01708), section 4; peft's
            `add_weighted_adapter`, combination "ties_svd"
equation    t_i = delta_i where |delta_i| is among the largest `density` of the layer, else 0
            s = sign(sum_i t_i), entry by entry
            delta = weight * mean over { i : sign(t_i) = s } of t_i, then its best product of `rank`
remembers   each concept's LoRA and word
cost        one SVD of a dense change per layer
deviations  defaults are the paper's without held-out data (the largest 20 %, weight 1). It trims a
            model's whole task vector, peft each layer's. The result is not of low rank; `rank` 0
            keeps as much as the plain sum has. One LoRA alone is not trimmed (`peft_merge`)
"""

from __future__ import annotations

from types import MappingProxyType

from .peft_merge import PeftMerge


class Ties(PeftMerge):
    id = "ties"
    combination = "ties_svd"
    options = MappingProxyType({"density": 0.2, "weight": 1.0, "rank": 0.0})
