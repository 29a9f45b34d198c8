"""`retention`: sequential LoRA, held where earlier prompts, and ordinary ones, can tell the difference.

source      ours; not in Jha et al. 2025
equation    the loss of `lora` + weight * mean over layers of E_c || (delta - delta*) c ||^2 / E_c || W0 c ||^2, exactly, from M = E_c c c^T
            (`textspace`): delta* is the adapter so far over prompts of earlier concepts, and 0 over ordinary prompts and the empty one;
            with `retention_apart` also 0 over the padding of the concept's own prompts, so that its look lies on its word
remembers   nothing of its own: words and templates are on the stack
cost        `lora` + encoding a few hundred prompts once + some products of (r, d) and (d, d) matrices a step
deviations  none to deviate from; holds ordinary prompts from the first concept on, which the ten systems of the paper do not
"""

from __future__ import annotations

from .method import Method


class Retention(Method):
    id = "retention"
    retention_weight = 1.0
