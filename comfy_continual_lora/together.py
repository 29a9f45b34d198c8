"""Stage 8: a backbone's cross-attention, mixed by areas (`areas`), for prompts that name several
learned things (`mentions`).

in: a backbone, the mentions of each picture's prompt - out: a `Together`, which predicts as the
backbone does while its block lasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .areas import Areas, AreaSettings, attend, mask_of
from .checkpoint.attention import key, processors, query
from .checkpoint.backbone import LONGEST, Backbone
from .mentions import Mentions, noun_positions


class Together:
    """Pictures whose prompts name the same number of learned things, while they are drawn."""

    def __init__(
        self,
        backbone: Backbone,
        text: Callable[[Sequence[str]], Tensor],
        scenes: Sequence[Mentions],
        size: tuple[int, int],
        settings: AreaSettings,
        given: Tensor | None = None,
        unwanted: int = 1,
    ) -> None:
        """`text`: prompts (k,) -> features (k, t, d); `size`: height and width of the latents; `given`:
        masks, as `Areas` takes them; `unwanted`: positions of the negative prompt.
        """
        self.backbone = backbone
        whole = text([scene.whole for scene in scenes])
        neutral = backbone.context(text([scene.neutral for scene in scenes]))
        # SDXL's pooled text is of the whole prompt, as in hosts, where this sees contexts alone
        pooled = whole[:, backbone.context(whole).shape[1] :]
        self.neutral = torch.cat([neutral, pooled], 1)
        # (n, t, d) for each concept
        self.own = [
            backbone.context(text([scene.own[k] for scene in scenes]))
            for k in range(len(scenes[0].own))
        ]
        nouns = torch.stack([noun_mask(backbone, scene) for scene in scenes])
        # negative and neutral prompt are of one batch, so of one length, unless that is too long
        count = neutral.shape[1]
        common = math.lcm(count, unwanted)
        self.length = common if common <= LONGEST * max(count, unwanted) else count
        self.neutral = backbone.lengthened(self.neutral, self.length)
        nouns = nouns.repeat(1, 1, self.length // nouns.shape[2])
        self.areas = Areas(nouns.to(backbone.device), size, settings, given)
        self.rows: slice | None = None  # of the batch, those drawn from the prompts

    def own_of(self, attn: Any, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """K and V of each concept's own prompt in a cross-attention, (n, t, d) each."""
        own = [features.to(dtype) for features in self.own]
        return [(key(attn, one), attn.to_v(one)) for one in own]

    def predict(self, noisy: Tensor, timestep: Tensor, unwanted: Tensor | None) -> Tensor:
        """The net's prediction for `unwanted`, if there is one, and for the prompts: (2n, c, h, w)
        or (n, c, h, w). In the first step the net is called once more, to see where things are.
        """
        n = len(noisy)
        if self.areas.masks is None:
            self._see(noisy, timestep, self.neutral, slice(0, n))
        if unwanted is None:
            return self._see(noisy, timestep, self.neutral, slice(0, n))
        if self.length % unwanted.shape[1]:
            self.rows = None
            low = self.backbone.predict(noisy, timestep, unwanted)
            return torch.cat([low, self._see(noisy, timestep, self.neutral, slice(0, n))])
        features = torch.cat([self.backbone.lengthened(unwanted, self.length), self.neutral])
        noisy, timestep = torch.cat([noisy] * 2), torch.cat([timestep] * 2)
        return self._see(noisy, timestep, features, slice(n, None))

    def _see(self, noisy: Tensor, timestep: Tensor, features: Tensor, rows: slice) -> Tensor:
        """The net's prediction, of which these rows are drawn from the prompts; areas are settled."""
        self.rows = rows
        predicted = self.backbone.predict(noisy, timestep, features)
        self.areas.settle()
        return predicted


@contextmanager
def drawn_together(*args: Any, **kwargs: Any) -> Iterator[Together]:
    """A `Together` of these arguments, whose areas the net's cross-attention follows inside the
    block.
    """
    together = Together(*args, **kwargs)
    with processors(together.backbone.unet, lambda own: _ByAreas(together, own)):
        yield together


class _ByAreas:
    """Cross-attention of one layer (diffusers' processor)."""

    def __init__(self, together: Together, plain: Any) -> None:
        """`plain`: the layer's own processor."""
        self.together, self.plain = together, plain
        self.own: list[tuple[Tensor, Tensor]] = []  # K and V of each concept's prompt

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        rows, areas = self.together.rows, self.together.areas
        if rows is None:
            return self.plain(attn, hidden_states, encoder_hidden_states)
        q, k = query(attn, hidden_states), key(attn, encoder_hidden_states)
        out = attend(q, k, attn.to_v(encoder_hidden_states), attn.heads)
        q, k = q[rows], k[rows]
        if areas.masks is not None:
            if not self.own:
                self.own = self.together.own_of(attn, hidden_states.dtype)
            own = [attend(q, *of, attn.heads) for of in self.own]
            out = torch.cat([out[: rows.start], areas.mix(out[rows], own)])
        areas.look(q, k, attn.heads)
        return attn.to_out[1](attn.to_out[0](out))


def out_of_sight(backbone: Backbone, scene: Mentions) -> list[str]:
    """The words whose nouns are not among the prompt's tokens."""
    seen = noun_mask(backbone, scene).any(1).tolist()
    return [token for token, one in zip(scene.tokens, seen, strict=True) if not one]


def noun_mask(backbone: Backbone, scene: Mentions) -> Tensor:
    """Where each concept's nouns are among the text positions of the neutral prompt, (k, t): 1 or 0."""
    ids, positions, count = backbone.drawn_positions(scene.neutral)
    nouns = noun_positions(scene, ids, backbone.token_ids)
    return mask_of([[positions[place] for place in one] for one in nouns], count)
