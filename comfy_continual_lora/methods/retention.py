"""`retention`: sequential LoRA that leaves ordinary prompts alone, then the one LoRA closest to
what every concept's own did to its prompts.

source      ours; not in Jha et al. 2025
equation    the loss of `lora` + weight * mean over layers of E_c || delta c ||^2 / E_c || W0 c ||^2
over ordinary prompts and the empty one, exactly,
            from M = E_c c c^T (`textspace`), learned in coordinates of text space in which M is
            more even; with `retention_apart` also over the
            padding of the concept's own prompts, so that its look lies on its word. Then  delta =
            argmin sum_j E_{c of j} || (delta - delta_j) c ||^2
            + w E_{ordinary c} || delta c ||^2, exactly (`solve`). What learning one takes from the
            others that gives back, so they need not be held
            meanwhile
remembers   of each concept what its own adapter did to its own prompts, a LoRA of few ranks; words
and templates are on the stack
cost        `lora` + encoding some dozen prompts a concept and one solve, once + some products of
(r, d) and (d, d) matrices a step
deviations  none to deviate from; holds ordinary prompts from the first concept on, which the ten
systems of the paper do not. The solution has
            factors of its own, so Fishers that other methods left on the stack are dropped
"""

from __future__ import annotations

from .closed_form import ClosedForm


class Retention(ClosedForm):
    id = "retention"
    retention_weight = 1.0
