"""`solve`: the closed form of `retention`, over LoRAs that were each learned alone.

source      ours (`comfy_continual_lora.solve`); beside `retention` it shows what learning in sequence,
            with ordinary prompts held, adds to the closed form
equation    delta = argmin sum_j E_{c of j} || (delta - delta_j) c ||^2
                           + w E_{ordinary c} || delta c ||^2
remembers   each concept's LoRA and word; ordinary prompts
cost        encoding 1,024 prompts and a few dozen per concept, and one solve per layer
options     those of `settings.SolveSettings`, with its defaults
deviations  none: one LoRA alone is left as it is, as `retention` does. Targets are the LoRAs
            themselves, where `retention` keeps small ones that do the same to their own prompts
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from comfy_continual_lora.adapters.adapter import Adapter, rank_of
from comfy_continual_lora.consolidation import solution
from comfy_continual_lora.settings import SolveSettings
from comfy_continual_lora.stack import ConceptStack
from comfy_continual_lora.targets import PromptBank, with_prompts

from .learning import record_of
from .rival import Pool, Rival

DEFAULTS = SolveSettings()


class Solve(Rival):
    id = "solve"
    options = MappingProxyType(
        {
            "energy": DEFAULTS.energy,
            "ridge": DEFAULTS.ridge,
            "ordinary_weight": DEFAULTS.ordinary_weight,
            "language": DEFAULTS.language,
        }
    )

    def merge(self, pool: Pool) -> Adapter:
        settings = replace(DEFAULTS, **pool.options)
        own = pool.adapters
        if len(own) == 1:
            return own[0]
        records = [record_of(concept, number) for number, concept in enumerate(pool.concepts)]
        words = {
            record.id: concept.word for record, concept in zip(records, pool.concepts, strict=True)
        }
        stack = ConceptStack(pool.backbone.fingerprint, records, words)
        stack.rank = max(map(rank_of, own))
        bank = PromptBank(pool.backbone, stack.tokens, cache=pool.cache)
        stack = with_prompts(bank, stack, language=settings.language)
        adapter, _ = solution(stack, settings, own)
        assert adapter
        return adapter
