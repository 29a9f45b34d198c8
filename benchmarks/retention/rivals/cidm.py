"""`cidm`: a LoRA for each concept, held apart from the earlier ones; a prompt is drawn with a mean of
all of them, weighted by how near their words are to it.

source      Dong et al. 2024 (CIDM, arXiv 2410.17594), in the terms and numbers of the authors' code
            (JiahuaDong/CIFC)
equation    the loss of `lora` + weight * mean over layers and i < n of
            ( mean_jk |(B_n B_i^T)_jk| + mean_jk ((B_n)_jk - 1)^2 )
            delta(prompt) = alpha * sum_i s_i B_i A_i,   s_i ~ n_i^power,   sum_i s_i = 1
            n_i = mean over the vectors of word i of max_t cos(c(word i), c_t(prompt))
remembers   each concept's LoRA and word
cost        `lora` + one product of (d_out, r) and (r, d_out) per layer, earlier concept and step; the
            LoRA is another one for each prompt, so no file holds it
deviations  words have no vectors of their own for each layer, so s is the same in all layers; it is
            computed once for a concept ("a photo of a V1 mug"), not for every prompt. c(word i) is
            read in a prompt of the same form, which lets each word be nearest to its own, and not in
            a row of all words, which 77 tokens can't hold. The text encoder and queries have no
            LoRA. What the paper calls task-shared knowledge is not in its code, and not here;
            neither is the regional control of several concepts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from comfy_continual_lora.adapters.adapter import Adapter
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.penalty import Penalty, Step

from .features import feature_rows, word_rows
from .rival import Own, Pool, Rival, summed


@dataclass(frozen=True)
class Separation:
    """The penalty in the training loop; `past`: the earlier concepts' factors B, by layer."""

    weight: float
    past: Sequence[Mapping[str, Tensor]]

    def __call__(self, step: Step) -> Tensor:
        terms = [
            (step.factors[name] @ tensor.T).abs().mean() + (step.factors[name] - 1).square().mean()
            for earlier in self.past
            for name, tensor in earlier.items()
        ]
        return self.weight * torch.stack(terms).mean()


class Cidm(Rival):
    id = "cidm"
    own_learning = True
    by_concept = True
    options = MappingProxyType({"weight": 0.1, "alpha": 0.8, "power": 4.0})

    def penalties(
        self, past: Sequence[Adapter], options: Mapping[str, float], device: torch.device
    ) -> dict[str, Penalty]:
        if not past:
            return {}
        factors = [
            {name: tensor.to(device) for name, tensor in earlier.items() if name.endswith(".B")}
            for earlier in past
        ]
        return {self.id: Separation(self.chosen(options)["weight"], factors)}

    def merge(self, pool: Pool) -> Adapter:
        assert pool.drawn
        weights = shares(pool.backbone, pool.concepts, pool.drawn, pool.options["power"])
        pairs = zip(pool.adapters, pool.options["alpha"] * weights, strict=True)
        return summed([_scaled(adapter, float(weight)) for adapter, weight in pairs])


@torch.no_grad()
def shares(backbone: Backbone, concepts: Sequence[Own], drawn: Own, power: float) -> Tensor:
    """Each concept's share s in what `drawn` is drawn with, (n,) float64."""
    form = "a photo of a {}"
    words = {drawn.token: drawn.word}
    prompt = feature_rows(backbone, [form.format(drawn.name)], words, padding=True)
    rows = F.normalize(prompt, dim=1)
    own = [word_rows(backbone, one, form.format(one.name)) for one in concepts]
    cosines = [(F.normalize(word, dim=1) @ rows.T).amax(1).mean() for word in own]
    nearness = torch.stack(cosines).clamp(min=0) ** power
    return nearness / nearness.sum()


def _scaled(adapter: Adapter, weight: float) -> Adapter:
    return {
        name: weight * tensor if name.endswith(".B") else tensor for name, tensor in adapter.items()
    }
