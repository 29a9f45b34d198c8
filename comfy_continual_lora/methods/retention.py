"""`retention`: sequential LoRA, held where earlier prompts, and ordinary ones, can tell the difference.

source      ours; not in Jha et al. 2025
equation    the loss of `lora` + weight * mean over layers of E_c || (delta - delta*) c ||^2 / E_c || W0 c ||^2, exactly, from M = E_c c c^T
            (`textspace`): over prompts of an earlier concept delta* is the adapter right after it was learned, so that what one learning takes the
            next ones give back; over ordinary prompts and the empty one it is 0; with `retention_apart` also 0 over the padding of the concept's
            own prompts, so that its look lies on its word. One solve in closed form makes all of it one drift (`solve.retention`)
remembers   the pool of past LoRAs, as DSC does; words and templates are on the stack
cost        `lora` + encoding some dozen prompts a concept and one solve, once + some products of (r, d) and (d, d) matrices a step
deviations  none to deviate from; holds ordinary prompts from the first concept on, which the ten systems of the paper do not
"""

from __future__ import annotations

from .method import Method


class Retention(Method):
    id = "retention"
    retention_weight = 1.0
