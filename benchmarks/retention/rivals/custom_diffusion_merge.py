"""`custom_diffusion_merge`: the one K and V that do to every concept's target words exactly what its
own do, and change ordinary captions least.

source      Custom Diffusion, Kumari et al. 2023 (arXiv 2212.04488), section 3.2, "constrained
            optimization to merge concepts", solved by Lagrange multipliers
equation    W = argmin || (W - W0) C_reg^T ||_F^2   such that   W C^T = V
            delta = V' (C G^-1 C^T)^-1 C G^-1,   G = C_reg^T C_reg
            C (s, d_text): the features at the target words of all concepts
            V' (d_out, s): delta_i c for each row c of C, i its concept
            C_reg (n, d_text): the features of ordinary captions
remembers   each concept's LoRA and word, and ordinary captions
cost        encoding some hundreds of captions; one solve with G, one of s equations per layer
result      a LoRA of rank s, at most the layer's smaller side
deviations  captions are `textspace.ordinary_prompts`, not 1,000 of LAION; each concept has a LoRA
            where the paper has a full K and V. The paper does not say which positions are target
            words; as in its authors' code they are the word, the noun and the end token, in the
            concept's name and in "photo of a ...". Captions count up to their end token, and
            with the start token, which that code leaves out (`padding` 1: with the padding too). G
            gets a small `ridge`, as a share of its mean eigenvalue. If there are more rows than
            dimensions, the constraints can't all be met, and are met as nearly as possible
not kept    what a concept's own LoRA does elsewhere, such as to the padding of its prompts. Where two
            concepts' target words have nearly the same features and are to give different values,
            exact constraints need a large change, which shows everywhere else
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from comfy_continual_lora.adapters.adapter import Adapter, delta_weights
from comfy_continual_lora.textspace import ordinary_prompts

from .features import feature_rows, target_rows
from .rival import Pool, Rival, of_one_rank


class CustomDiffusionMerge(Rival):
    id = "custom_diffusion_merge"
    options = MappingProxyType({"ridge": 1e-6, "padding": 0.0})

    def merge(self, pool: Pool) -> Adapter:
        nouns = list(dict.fromkeys(concept.noun for concept in pool.concepts))
        ordinary = feature_rows(
            pool.backbone, ordinary_prompts(nouns), {}, bool(pool.options["padding"])
        )
        rows = [target_rows(pool.backbone, concept) for concept in pool.concepts]
        solved = constrained_map(torch.cat(rows), ordinary, pool.options["ridge"])
        own = [delta_weights(pool.backbone, concept.adapter) for concept in pool.concepts]
        adapter: Adapter = {}
        for layer in pool.backbone.kv_layers:
            values = [change[layer].double() @ row.T for change, row in zip(own, rows, strict=True)]
            adapter |= factors(layer, torch.cat(values, 1) @ solved, len(solved))
        return of_one_rank(adapter)


def constrained_map(targets: Tensor, ordinary: Tensor, ridge: float) -> Tensor:
    """(C G^-1 C^T)^-1 C G^-1, (s, d_text): from the wanted values to the change."""
    gram = ordinary.T @ ordinary
    gram = gram + ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    spread = torch.linalg.solve(gram, targets.T).T
    # the inverse where there is one
    return torch.linalg.pinv(spread @ targets.T, hermitian=True, rtol=1e-12) @ spread


def factors(layer: str, change: Tensor, rank: int) -> Adapter:
    """A change of at most this rank as B and A of equal norm."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    roots = values[:rank].sqrt()
    a, b = roots[:, None] * right[:rank], left[:, :rank] * roots
    return {f"{layer}.A": a.float(), f"{layer}.B": b.float()}
