"""`plain_sum`: the changes of all LoRAs added up.

source      task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089), of LoRAs; peft's
            `add_weighted_adapter`, combination "cat"
equation    delta = weight * sum_i B_i A_i
remembers   each concept's LoRA and word
cost        none: A's and B's are put side by side; the rank is the sum of theirs
deviations  the paper tunes one weight for all tasks on held-out data; here it is 1, the plain sum,
            unless the option says otherwise
"""

from __future__ import annotations

from types import MappingProxyType

from .peft_merge import PeftMerge


class PlainSum(PeftMerge):
    id = "plain_sum"
    combination = "cat"
    options = MappingProxyType({"weight": 1.0})
