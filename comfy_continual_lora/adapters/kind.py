"""The interface of an adapter kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..checkpoint.backbone import Backbone


class AdapterKind:
    """A kind of change of one layer's weight W (d_out, d_text); its tensors are in `PARTS`."""

    name: ClassVar[str]
    solvable: ClassVar[bool] = False  # whether the closed form can be written as one of this kind
    preconditioned: ClassVar[str] = ""  # the part trained in coordinates of text space, if any

    def create(
        self,
        out: int,
        width: int,
        rank: int,
        generator: torch.Generator,
        preconditioner: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Tensors that change nothing; `preconditioner`: coordinates of text space, (d_text, d_text)."""
        raise NotImplementedError

    def factors(self, parts: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
        """The change as a product: (d_out, k) and (k, d_text); `width` is d_text."""
        raise NotImplementedError

    def delta(self, parts: Mapping[str, Tensor], width: int) -> Tensor:
        """The change itself, (d_out, d_text)."""
        left, right = self.factors(parts, width)
        return left @ right

    def forward(self, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What the change adds to the layer's output: x (n, d_text), float32 -> (n, d_out)."""
        left, right = self.factors(parts, x.shape[-1])
        return F.linear(F.linear(x, right), left)

    def attach(
        self, backbone: Backbone, layers: Mapping[str, Mapping[str, nn.Parameter]], name: str
    ) -> None:
        """Make the change part of the U-Net; only LoRAs may be attached under several names."""
        for layer, parts in layers.items():
            put_module(backbone, layer, ChangedLayer(backbone.kv_layers[layer], parts, self))


class ChangedLayer(nn.Module):
    """A linear layer plus a change of its weight, for kinds that peft can't inject."""

    def __init__(
        self, base: nn.Linear, parts: Mapping[str, nn.Parameter], kind: AdapterKind
    ) -> None:
        super().__init__()
        self.base_layer, self.parts, self.kind = base, nn.ParameterDict(parts), kind

    def forward(self, x: Tensor) -> Tensor:
        change = self.kind.forward(self.parts, x.float())  # type: ignore[arg-type]
        return self.base_layer(x) + change.to(x.dtype)

    def get_base_layer(self) -> nn.Linear:
        return self.base_layer


def put_module(backbone: Backbone, layer: str, module: nn.Module) -> None:
    """Put a module in a layer's place."""
    parent, _, leaf = layer.rpartition(".")
    setattr(backbone.unet.get_submodule(parent), leaf, module)
