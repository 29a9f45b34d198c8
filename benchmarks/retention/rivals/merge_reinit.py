"""`merge_reinit`: each concept learns a fresh LoRA on top of the earlier ones, which is then merged
into the weights as they were.

source      Staniszewski et al. 2024 (Low-Rank Continual Personalization of Diffusion Models, arXiv
            2410.04891), "merge & initialization"
equation    the loss of `lora`, with W0 + sum_{i<n} B_i A_i + B_n A_n, a new random A_n, B_n = 0
            delta = sum_i B_i A_i
remembers   the merged weights alone, and the words
cost        `lora`
deviations  LoRAs are kept apart, which is the same sum; the paper merges them into the weights, and
            keeps one model. There a concept has no word that is learned, and all attention layers
            have a LoRA
"""

from __future__ import annotations

from .rival import Rival


class MergeReinit(Rival):
    id = "merge_reinit"
    own_learning = True
    sequential = True
