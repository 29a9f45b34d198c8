"""`dare`: drop entries of each change at random, rescale the rest, and add up.

source      Yu et al. 2024 (DARE, arXiv 2311.03099), section 3, with task arithmetic; peft's
            `add_weighted_adapter`, combination "dare_linear_svd"
equation    m_i ~ Bernoulli(density), entry by entry
            delta = weight * sum_i m_i (Hadamard) delta_i / density, then its best product of `rank`
remembers   each concept's LoRA and word
cost        one SVD of a dense change per layer
deviations  the paper drops up to 90 % and more (density 0.1) of the small changes that fine-tuning
            makes to large language models; the default here keeps half. The result is not of low
            rank; `rank` 0 keeps as much as the plain sum has, which also removes some of the noise
            that dropping adds. One LoRA alone is not dropped from (`peft_merge`)
"""

from __future__ import annotations

from types import MappingProxyType

from .peft_merge import PeftMerge


class Dare(PeftMerge):
    id = "dare"
    combination = "dare_linear_svd"
    options = MappingProxyType({"density": 0.5, "weight": 1.0, "rank": 0.0, "seed": 0.0})
