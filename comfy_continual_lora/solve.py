"""Stage 4: the closed form - the single change of K and V that is closest, over all stored prompts
at once, to every concept's target.

    delta = argmin  sum_j w_j E_{c of j} || (delta - delta_j) c ||^2  +  ridge || delta ||^2
          = ( sum_j w_j delta_j M_j ) G^-1

    M_j = E c c^T over the prompts of j      G = sum_j w_j M_j + ridge
    delta_j: the adapter right after j was learned, 0 for ordinary prompts

This minimises `textspace.drift` directly, without training steps, images or U-Net calls, and the
same request gives the same bytes. The best product of rank k is delta projected onto the k leading
left singular vectors of delta L, with G = L L^T (reduced-rank regression; Izenman 1975, eq. 2.9).

Relatives: Custom Diffusion's merge (Kumari et al. 2023, arXiv 2212.04488) solves for one K and V
that do to target prompts what several fine-tuned models do, regularised by ordinary captions;
Mix-of-Show's gradient fusion (Gu et al. 2023, arXiv 2305.18292) fits each layer to the outputs of
several LoRAs. Added here: ordinary prompts and padding are weighed against the targets, the rank is
bounded, and there is a solution after every concept.

in: `Target`s, from `targets` - out: an adapter. Pure linear algebra; `consolidation` applies it to
stacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    """On prompts with this second moment (d, d), the change should do what `adapter` does, or
    nothing if that is None.
    """

    name: str
    moment: Tensor
    adapter: Adapter | None
    weight: float = 1.0


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
    targets: Sequence[Target], settings: SolveSettings, least_rank: int = 1
) -> tuple[Adapter, int]:
    """One LoRA for all targets, and its rank: `settings.rank`, or by the energy rule the smallest
    that keeps the share `settings.energy`.

    The LoRA has at least `least_rank`, all of it used unless `settings.rank` is given. Targets that
    are full changes of K and V give such a change, those of VeRA a LoRA. Errors: StackError if
    there is no solution.

    Example, with one layer of one output and two inputs: the prompts of V1 are all c = (1, 0) and
    its adapter gives them 3, those of V2 are all c = (0, 1) and get 5. M_1 = diag(1, 0) and
    M_2 = diag(0, 1), so G = I (ridge 0) and delta = (3, 0) M_1 + (0, 5) M_2 = (3, 5), which meets
    both targets. If V2 had the prompts of V1, delta would give them the mean, 4.
    """
    wanted = [(target, layers_of(target.adapter)) for target in targets if target.adapter]
    full = any(kind_of(target.adapter).name == "full" for target, _ in wanted if target.adapter)
    width = targets[0].moment.shape[0]
    lower = torch.linalg.cholesky(_total_moment(targets, settings.ridge))
    changes, leading, energies = {}, {}, []
    for layer in wanted[0][1]:
        basis, goal = _wanted([(target, layers[layer]) for target, layers in wanted])
        changes[layer] = torch.cholesky_solve(goal.T, lower).T
        if full:
            changes[layer] = basis @ changes[layer]
            continue
        weighted = torch.linalg.solve_triangular(lower, goal.T, upper=False).T
        vectors, values = _left_singular(weighted)
        leading[layer] = basis, vectors
        energies.append(values.square() / values.square().sum().clamp(min=1e-300))
    if full:
        return {f"{layer}.D": change.float() for layer, change in changes.items()}, width
    rank = _rank(energies, settings)
    used = settings.rank or max(rank, least_rank)
    adapter: Adapter = {}
    for layer, (basis, vectors) in leading.items():
        adapter |= _factors(layer, basis, vectors[:, :used], changes[layer])
    return padded_to_rank(adapter, max(rank, least_rank)), rank


def _total_moment(targets: Sequence[Target], ridge: float) -> Tensor:
    """G, (d, d) float64."""
    width = targets[0].moment.shape[0]
    total = torch.zeros(width, width, dtype=torch.float64)
    for target in targets:
        total = total + target.weight * target.moment.double()
    return total + ridge * typical(total) * torch.eye(width, dtype=torch.float64)


def _wanted(wanted: Sequence[tuple[Target, Mapping[str, Tensor]]]) -> tuple[Tensor, Tensor]:
    """sum_j w_j delta_j M_j of one layer, as an orthonormal basis (d_out, k) times (k, d_text),
    float64; k is the sum of the ranks, at most d_out.
    """
    products = [(target, *factored(parts, target.moment.shape[0])) for target, parts in wanted]
    left = torch.cat([target.weight * left.double() for target, left, _ in products], 1)
    right = torch.cat([right.double() @ target.moment.double() for target, _, right in products])
    if left.shape[1] >= left.shape[0]:
        return torch.eye(len(left), dtype=torch.float64), left @ right
    basis, rest = torch.linalg.qr(left)
    return basis, rest @ right


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
    kept = torch.stack([e[: min(map(len, energies))] for e in energies]).mean(0).cumsum(0)
    return int((kept < settings.energy).sum()) + 1


def _factors(layer: str, basis: Tensor, directions: Tensor, change: Tensor) -> Adapter:
    """The change (k, d_text) projected onto the span of the directions (k, r) in the basis
    (d_out, k), as B and A of equal norm.
    """
    directions, _ = torch.linalg.qr(directions)  # those with little energy are not orthogonal yet
    b, a = basis @ directions, directions.T @ change
    balance = (a.norm() / b.norm()).clamp(min=1e-12).sqrt()
    return {f"{layer}.A": (a / balance).float(), f"{layer}.B": (b * balance).float()}
