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

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from comfy_continual_lora.adapters.adapter import Adapter
from comfy_continual_lora.checkpoint.backbone import Backbone

from .peft_merge import peft_merged
from .rival import Own, Rival


class PlainSum(Rival):
    id = "plain_sum"
    options = MappingProxyType({"weight": 1.0})

    def merged(
        self,
        backbone: Backbone,
        concepts: Sequence[Own],
        options: Mapping[str, float],
        cache: Path | None = None,
    ) -> Adapter:
        adapters = [concept.adapter for concept in concepts]
        return peft_merged(backbone, adapters, "cat", self.chosen(options))
