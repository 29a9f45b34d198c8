"""`gradient_fusion`: the one K and V whose outputs for every concept's prompts are closest to those of
its own.

source      Mix-of-Show, Gu et al. 2023 (arXiv 2305.18292), section 3.3, "gradient fusion"
equation    W = argmin sum_i || (W0 + delta_i) X_i^T - W X_i^T ||_F^2,   by L-BFGS from W0
            X_i (n, d_text): the features of concept i's prompts
remembers   each concept's LoRA and word
cost        `iterations` of L-BFGS per layer, each some products of (d_out, d_text) and
            (d_text, d_text): the loss depends on X_i only through X_i^T X_i
result      kind "full": the change is of full rank
deviations  the paper's other half, ED-LoRA (a LoRA of the text encoder too, a word for each layer), is
            not part of it: all rivals learn the same LoRAs. It fuses whatever has a LoRA, here K and
            V alone. Prompts are the training captions at all 77 positions; its authors' code takes
            the word and the end token of two captions (`padding` 0: up to the end token). L-BFGS
            runs in float64; `iterations` are those of that code
not kept    ordinary prompts: nothing holds them, except that L-BFGS starts from W0 and moves only
            along features of the concepts' prompts
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from comfy_continual_lora.adapters.adapter import Adapter, delta_weights

from .features import feature_rows
from .rival import Pool, Rival


class GradientFusion(Rival):
    id = "gradient_fusion"
    options = MappingProxyType({"iterations": 500.0, "padding": 1.0})

    def merge(self, pool: Pool) -> Adapter:
        moments = []
        for concept in pool.concepts:
            words = {concept.token: concept.word}
            rows = feature_rows(
                pool.backbone, concept.prompts, words, bool(pool.options["padding"])
            )
            moments.append((rows.T @ rows / len(rows)).to(pool.backbone.device))
        own = [delta_weights(pool.backbone, concept.adapter) for concept in pool.concepts]
        adapter: Adapter = {}
        for layer in pool.backbone.kv_layers:
            changes = [change[layer].to(pool.backbone.device).double() for change in own]
            fused = fuse(changes, moments, int(pool.options["iterations"]))
            adapter[f"{layer}.D"] = fused.float().cpu()
        return adapter


def fuse(changes: Sequence[Tensor], moments: Sequence[Tensor], iterations: int) -> Tensor:
    """argmin sum_i tr[(delta - delta_i) M_i (delta - delta_i)^T], (d_out, d_text), by L-BFGS from 0."""
    total = torch.stack(list(moments)).sum(0)
    wanted = sum(change @ one for change, one in zip(changes, moments, strict=True))
    delta = nn.Parameter(torch.zeros_like(changes[0]))
    optimizer = torch.optim.LBFGS(
        [delta],
        max_iter=iterations,
        history_size=25,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-16,
        tolerance_change=1e-16,
    )

    def loss() -> Tensor:
        """Without the constant, and with its gradient, which is known."""
        product = delta.detach() @ total
        delta.grad = 2 * (product - wanted)
        return (delta.detach() * (product - 2 * wanted)).sum()

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return delta.detach()
