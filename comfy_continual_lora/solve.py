"""Stage 4: the closed form - the single change of K and V that is closest, over all stored prompts
at once, to every concept's target.

    delta = argmin  sum_j w_j E_{c of j} || (delta - delta_j) c ||^2  +  ridge || delta ||^2
          = ( sum_j w_j delta_j M_j ) G^-1

    M_j = E c c^T over the prompts of j = R_j^T R_j      G = sum_j w_j M_j + ridge I
    delta_j: the adapter right after j was learned, 0 for ordinary prompts
    ridge: the setting `ridge` times what is `typical` of sum_j w_j M_j

This minimises `textspace.drift` directly, without training steps, images or U-Net calls, and the
same request gives the same bytes. The best product of rank k is delta projected onto the k leading
left singular vectors of delta L, with G = L L^T (reduced-rank regression; Izenman 1975, eq. 2.9).
L^-1 R_j^T and G^-1 R_j^T serve every layer, so a layer costs products with the few rows of R_j, and
the time grows with their number alone.

Relatives: Custom Diffusion's merge (Kumari et al. 2023, arXiv 2212.04488) solves for one K and V
that do to target prompts what several fine-tuned models do, regularised by ordinary captions;
Mix-of-Show's gradient fusion (Gu et al. 2023, arXiv 2305.18292) fits each layer to the outputs of
several LoRAs. Added here: ordinary prompts and padding are weighed against the targets, the rank is
bounded, and there is a solution after every concept.

in: `Target`s, from `targets` - out: an adapter. Pure linear algebra; `consolidation` applies it to
stacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters.adapter import Adapter, factored, kind_of, layers_of
from .adapters.lora import padded_to_rank
from .errors import StackError
from .settings import SolveSettings
from .textspace import typical


@dataclass(frozen=True)
class Target:
    """On prompts with these rows, (k, d_text), the change should do what `adapter` does, or nothing
    if that is None; rows^T rows is the second moment of their text features.
    """

    name: str
    rows: Tensor
    adapter: Adapter | None
    weight: float = 1.0

    @property
    def moment(self) -> Tensor:
        """(d_text, d_text)."""
        return self.rows.T @ self.rows


def rows_of(moment: Tensor, share: float = 1.0) -> Tensor:
    """The fewest rows (k, d_text) whose second moment keeps this share of a moment's trace, the
    largest direction aside (it belongs to what all prompts share): moment (d_text, d_text) -> rows,
    float32, in descending order.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
    kept = values[1:].cumsum(0) / values[1:].sum().clamp(min=1e-300)
    count = int((kept < share).sum()) + 2 if share < 1 else len(values)
    return (vectors[:, :count] * values[:count].sqrt()).T.float()


@contextmanager
def _explain_unsolvable() -> Iterator[None]:
    """Turn linear algebra that fails into a StackError with the reason."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        reason = str(error).partition("\n")[0]
        raise StackError(
            f"The closed form has no solution ({reason}): the prompts' features or an adapter have "
            "values that are not finite, or `ridge` is too small for them. The stack is unchanged. "
            "Increase `ridge`, or forget the concept whose pictures are black (`forget`)."
        ) from None


@_explain_unsolvable()
def solve(
    targets: Sequence[Target],
    settings: SolveSettings,
    least_rank: int = 1,
    ordinary: Tensor | None = None,
) -> tuple[Adapter, int]:
    """One LoRA for all targets, and its rank: `settings.rank`, or by the energy rule the smallest
    that keeps the share `settings.energy`, a mean over the layers that any target changes.

    `ordinary`: the second moment of prompts that nothing may change, times its weight. The LoRA has
    at least `least_rank`, all of it used unless `settings.rank` is given. Targets that
    are full changes of K and V give such a change, those of VeRA a LoRA. Errors: StackError if
    there is no solution.

    Example, with one layer of one output and two inputs: the prompts of V1 are all c = (1, 0) and
    its adapter gives them 3, those of V2 are all c = (0, 1) and get 5. M_1 = diag(1, 0) and
    M_2 = diag(0, 1), so G = I (ridge 0) and delta = (3, 0) M_1 + (0, 5) M_2 = (3, 5), which meets
    both targets. If V2 had the prompts of V1, delta would give them the mean, 4.
    """
    lower = torch.linalg.cholesky(_total_moment(targets, ordinary, settings.ridge))
    wanted = [_Wanted(target, lower) for target in targets if target.adapter]
    layers = list(wanted[0].factors)
    if any(kind_of(target.adapter).name == "full" for target in targets if target.adapter):
        whole = {layer: _product(wanted, layer).float() for layer in layers}
        return {f"{layer}.D": change for layer, change in whole.items()}, len(lower)
    leading, energies = {}, []
    for layer in layers:
        basis, rest = _orthonormal(torch.cat([one.factors[layer][0] for one in wanted], 1))
        vectors, values = _left_singular(rest @ _rights(wanted, layer, whitened=True))
        leading[layer] = basis, rest, vectors
        energies.append(values.square() / values.square().sum().clamp(min=1e-300))
    rank = _rank(energies, settings)
    used = settings.rank or max(rank, least_rank)
    adapter: Adapter = {}
    for layer, (basis, rest, vectors) in leading.items():
        # those of little energy are not orthogonal yet
        directions, _ = torch.linalg.qr(vectors[:, :used])
        a = directions.T @ rest @ _rights(wanted, layer)
        adapter |= _balanced(layer, a, basis @ directions)
    return padded_to_rank(adapter, max(rank, least_rank)), rank


class _Wanted:
    """w_j delta_j M_j of one target in every layer: `factors` times the rows R_j, float64."""

    def __init__(self, target: Target, lower: Tensor) -> None:
        """`lower`: L, (d, d)."""
        assert target.adapter
        rows = target.rows.double()
        whitened = torch.linalg.solve_triangular(lower, rows.T, upper=False)
        self.whitened = whitened.T  # R_j L^-T, (k, d)
        self.solved = torch.linalg.solve_triangular(lower.T, whitened, upper=True).T  # R_j G^-1
        factors = {
            layer: factored(parts, rows.shape[1])
            for layer, parts in layers_of(target.adapter).items()
        }
        rights = torch.cat([right.double() for _, right in factors.values()]) @ rows.T
        split = rights.split([len(right) for _, right in factors.values()])
        self.factors = {
            layer: (target.weight * left.double(), right)
            for (layer, (left, _)), right in zip(factors.items(), split, strict=True)
        }


def _rights(wanted: Sequence[_Wanted], layer: str, *, whitened: bool = False) -> Tensor:
    """The right factors of delta (or of delta L) of one layer, (sum of ranks, d)."""
    return torch.cat(
        [one.factors[layer][1] @ (one.whitened if whitened else one.solved) for one in wanted]
    )


def _product(wanted: Sequence[_Wanted], layer: str) -> Tensor:
    """delta of one layer, (d_out, d)."""
    left = torch.cat([one.factors[layer][0] for one in wanted], 1)
    return left @ _rights(wanted, layer)


def _total_moment(targets: Sequence[Target], ordinary: Tensor | None, ridge: float) -> Tensor:
    """G, (d, d) float64."""
    rows = torch.cat([target.weight**0.5 * target.rows.double() for target in targets])
    total = rows.T @ rows
    if ordinary is not None:
        total = total + ordinary.double()
    return total + ridge * typical(total) * torch.eye(len(total), dtype=torch.float64)


def _orthonormal(left: Tensor) -> tuple[Tensor, Tensor]:
    """The same matrix (d_out, r) as an orthonormal basis (d_out, k) times (k, r); k is at most d_out."""
    if left.shape[1] >= left.shape[0]:
        return torch.eye(len(left), dtype=left.dtype), left
    return torch.linalg.qr(left)


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values in descending order, from the smaller Gram matrix:
    three times as fast as an SVD.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values = squares.flip(0).clamp(min=0).sqrt()
    vectors = vectors.flip(1)
    smallest = float(values[0]) * 1e-12 or 1.0  # of a matrix of zeros
    return vectors if wide else matrix @ vectors / values.clamp(min=smallest), values


def _rank(energies: Sequence[Tensor], settings: SolveSettings) -> int:
    if settings.rank is not None:
        return settings.rank
    changed = [energy for energy in energies if energy.any()]
    if not changed:
        return 1
    kept = torch.stack([e[: min(map(len, changed))] for e in changed]).mean(0).cumsum(0)
    return min(int((kept < settings.energy).sum()) + 1, len(kept))


def _balanced(layer: str, a: Tensor, b: Tensor) -> Adapter:
    """The factors of one layer, scaled to equal norm."""
    balance = (a.norm() / b.norm()).clamp(min=1e-12).sqrt()
    return {f"{layer}.A": (a / balance).float(), f"{layer}.B": (b * balance).float()}
