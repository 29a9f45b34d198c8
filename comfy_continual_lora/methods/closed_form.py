"""`closed_form`: sequential LoRA, then the one LoRA closest to what every concept's own adapter
does to its prompts.

source      ours; not in Jha et al. 2025
equation    the loss of `lora`; then  delta = argmin sum_j E_{c of j} || (delta - delta_j) c ||^2,
exactly (`solve`)
remembers   the pool of past LoRAs, as DSC does; words and templates are on the stack
cost        `lora` + encoding some dozen prompts a concept once and one solve a layer: seconds, on
any machine
deviations  none to deviate from; ordinary prompts and the empty one are held at what the checkpoint
does, which the ten systems of the paper do not
"""

from __future__ import annotations

from .method import Method


class ClosedForm(Method):
    id = "closed_form"
    consolidation = "closed form"
