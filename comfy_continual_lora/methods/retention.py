"""`retention`: sequential LoRA that leaves ordinary prompts alone, then the one LoRA closest to
what every concept's own did to its prompts.

source      ours, not in Jha et al. 2025; the solve has relatives in Custom Diffusion's merge (Kumari
            et al. 2023) and Mix-of-Show's gradient fusion (Gu et al. 2023): see `solve`
equation    the loss of `lora`
            + weight * mean over layers of  E_c || delta c ||^2 / E_c || W0 c ||^2
            over ordinary prompts: lists of common words, and a sample of the tokenizer's whole
            vocabulary (`language`); exact, from M = E_c c c^T (`textspace`), plus a multiple of the
            identity for words that no sample has (`textspace.shrunk`; in learning alone).
            Learned in coordinates of text space in which M is more even; with `retention_apart`
            the penalty also covers the padding of the concept's own prompts, so that its look lies
            on its word. Then, exactly (`solve`),
            delta = argmin sum_j E_{c of j} || (delta - delta_j) c ||^2
                           + w E_{ordinary c} || delta c ||^2
            This restores what learning took from earlier concepts, so they need not be held while
            learning
remembers   what `closed_form` does
cost        `lora` + encoding some 1,400 prompts per checkpoint, once, and fewer than a hundred per
            concept + one solve + a few products of (r, d) and (d, d) matrices per step
deviations  not applicable; holds ordinary prompts from the first concept on, which none of the
            paper's ten systems does. The solution has its own factors, so Fishers that other
            methods left on the stack are dropped
"""

from __future__ import annotations

from .closed_form import ClosedForm


class Retention(ClosedForm):
    id = "retention"
    retention_weight = 1.0
