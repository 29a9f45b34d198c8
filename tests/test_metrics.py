"""Stage 8: every metric by hand or against a second implementation; no metric changes its
arguments.
"""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from comfy_continual_lora import metrics


def _sets(
    n: int = 20, m: int = 20, d: int = 8, shift: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator) + shift


def test_kid_is_torchmetrics() -> None:
    x, y = _sets(shift=0.3)
    assert metrics.kid(x, y) == pytest.approx(float(poly_mmd(x.double(), y.double())), rel=1e-6)


@pytest.mark.parametrize("kernel", [metrics.quadratic, metrics.cubic, metrics.gaussian])
def test_mmd_by_the_double_sum(kernel: metrics.Kernel) -> None:
    x, y = (t.double() for t in _sets(4, 5, 3))

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(kernel(a[None], b[None]))

    within = (
        sum(k(x[a], x[b]) for a in range(4) for b in range(4) if a != b) / 12
        + sum(k(y[a], y[b]) for a in range(5) for b in range(5) if a != b) / 20
    )
    across = sum(k(a, b) for a in x for b in y) / 20
    assert metrics.mmd2(x, y, kernel) == pytest.approx(within - 2 * across, abs=1e-9)


def test_mmd_is_unbiased_and_grows_with_distance() -> None:
    generator = torch.Generator().manual_seed(1)
    same = [
        metrics.mmd2(
            torch.randn(10, 4, generator=generator), torch.randn(10, 4, generator=generator)
        )
        for _ in range(2000)
    ]
    assert abs(sum(same) / len(same)) < 0.02
    near, far = (metrics.mmd2(*_sets(50, 60, shift=s)) for s in (0.2, 1.0))
    assert near < far


def test_too_few_pictures() -> None:
    with pytest.raises(ValueError, match="there are 1 and 20"):
        metrics.mmd2(*_sets(n=1))


def test_similarities_by_hand() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert metrics.similarity(x, x) == pytest.approx(0.5)
    assert metrics.paired_similarity(x, x) == pytest.approx(1)


def test_summaries_by_hand_and_arguments_stay() -> None:
    generator = torch.Generator().manual_seed(2)
    real = [torch.randn(6, 5, generator=generator) for _ in range(3)]
    drawn = {(i, j): torch.randn(7, 5, generator=generator) for i in range(3) for j in range(i + 1)}
    before = [t.clone() for t in (*real, *drawn.values())]
    matrix = metrics.retention_matrix(real, drawn)

    def distance(x: torch.Tensor, y: torch.Tensor) -> float:
        return metrics.mmd2(x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True))

    assert math.isnan(matrix[0, 1])
    assert float(matrix[2, 0]) == pytest.approx(distance(real[0], drawn[2, 0]), abs=1e-6)
    assert metrics.a_mmd(matrix) == pytest.approx(
        sum(distance(real[j], drawn[2, j]) for j in range(3)) / 3, abs=1e-6
    )
    assert metrics.f_mmd(drawn, 3) == pytest.approx(
        (distance(drawn[0, 0], drawn[2, 0]) + distance(drawn[1, 1], drawn[2, 1])) / 2, abs=1e-6
    )
    backward = [distance(real[j], drawn[j, j]) - distance(real[j], drawn[2, j]) for j in range(2)]
    assert metrics.bwt_mmd(matrix) == pytest.approx(sum(backward) / 2, abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (*real, *drawn.values()), strict=True))


def test_one_concept_cannot_be_forgotten() -> None:
    real, drawn = _sets()
    assert math.isnan(metrics.f_mmd({(0, 0): drawn}, 1))
    assert math.isnan(metrics.bwt_mmd(metrics.retention_matrix([real], {(0, 0): drawn})))
