"""Stage 8: retention metrics: distances between sets of image features, and their summaries over a
sequence of concepts.

Shapes: x (n, d) and y (m, d) features of two sets of pictures; no argument is changed. X_{D,j} are
the features of concept j's real pictures, X_{i,j} those of concept j drawn after concept i was
learned (j <= i <= N, counted from 1).

    MMD^2(x, y)  = mean k(x_a, x_b), a != b  +  mean k(y_a, y_b), a != b  -  2 mean k(x_a, y_b)
                   unbiased, may be negative
    A_MMD        = 1/N     sum_j      MMD(X_{D,j}, X_{N,j})
                   how far from the real pictures at the end
    F_MMD        = 1/(N-1) sum_{j<N}  MMD(X_{j,j}, X_{N,j})
                   how far from what was drawn first
    BwT_MMD      = 1/(N-1) sum_{j<N}  MMD(X_{D,j}, X_{j,j}) - MMD(X_{D,j}, X_{N,j})
                   negative: it got worse

Source: Gretton et al. 2012 (MMD); Binkowski et al. 2018 (KID, arXiv 1801.01401); Jha et al. 2025
(the summaries, whose MMD is MMD^2 here).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, d), (m, d) -> (n, m)


def quadratic(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / d + 1)^2, the kernel of A_MMD, F_MMD and BwT_MMD."""
    return (x @ y.T / x.shape[1] + 1) ** 2


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / d + 1)^3, KID's kernel."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor, width: float = 0.5) -> Tensor:
    """exp(- ||x - y||^2 / (2 width^2)), to check that a result does not depend on the kernel.

    The default `width` suits features of length 1.
    """
    return torch.exp(-torch.cdist(x, y).square() / (2 * width**2))


def mmd2(x: Tensor, y: Tensor, kernel: Kernel = quadratic) -> float:
    """Unbiased MMD^2. Errors: ValueError for a set of fewer than two."""
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"MMD needs at least two images in each set; there are {n} and {m}.")
    x, y = x.double(), y.double()
    own, other = kernel(x, x), kernel(y, y)
    within = (own.sum() - own.diagonal().sum()) / (n * (n - 1)) + (
        other.sum() - other.diagonal().sum()
    ) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel Inception Distance over the whole sets (no random subsets), with any features."""
    return mmd2(x, y, cubic)


def similarity(x: Tensor, y: Tensor) -> float:
    """Mean cosine over all pairs: I2I for two sets of pictures."""
    return float((F.normalize(x, dim=1) @ F.normalize(y, dim=1).T).mean())


def paired_similarity(x: Tensor, y: Tensor) -> float:
    """Mean cosine of x_a and y_a: T2I for pictures and their prompts. x, y (n, d)."""
    return float(F.cosine_similarity(x, y).mean())


def own_similarity(x: Tensor) -> float:
    """Mean cosine over all pairs of different ones of a set; NaN for fewer than two."""
    n = len(x)
    if n < 2:
        return float("nan")
    return (n * similarity(x, x) - 1) / (n - 1)


def retention_matrix(
    real: Sequence[Tensor], drawn: Mapping[tuple[int, int], Tensor], kernel: Kernel = quadratic
) -> Tensor:
    """R[i, j] = MMD^2(X_{D,j}, X_{i,j}) on features of length 1: real[j], drawn[i, j] -> (N, N).

    Concepts are counted from 0; NaN if nothing was drawn.
    """
    count = len(real)
    matrix = torch.full((count, count), torch.nan)
    for (i, j), pictures in drawn.items():
        matrix[i, j] = mmd2(F.normalize(real[j], dim=1), F.normalize(pictures, dim=1), kernel)
    return matrix


def a_mmd(matrix: Tensor) -> float:
    """Mean of the last row of R."""
    return float(matrix[-1].mean())


def f_mmd(drawn: Mapping[tuple[int, int], Tensor], count: int, kernel: Kernel = quadratic) -> float:
    """Mean distance of earlier concepts, as drawn at the end, from what was drawn after learning.

    NaN for one concept.
    """
    last = count - 1
    distances = [
        mmd2(F.normalize(drawn[j, j], dim=1), F.normalize(drawn[last, j], dim=1), kernel)
        for j in range(last)
    ]
    return sum(distances) / len(distances) if distances else float("nan")


def bwt_mmd(matrix: Tensor) -> float:
    """Backward transfer: mean over the earlier concepts of R[j, j] - R[N, j]; NaN for one concept."""
    return float((matrix.diagonal() - matrix[-1])[:-1].mean())
