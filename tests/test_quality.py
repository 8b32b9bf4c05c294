"""Distances between samples against closed forms, and the level and power of the two-sample test."""

import pytest
import torch

from cdm_fast import UserError
from cdm_fast.evaluation.quality import frechet_distance, kernel_distance, two_sample_test


def normal(num, dim, seed, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(num, dim, dtype=torch.float64, generator=generator)


def test_energy_distance_of_four_points():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [4.0]])
    # 2 mean|x-y| - mean|x-x'| - mean|y-y'| over all pairs: 2 (1+4+1+2)/4 - (2+2)/4 - (3+3)/4
    assert two_sample_test(x, y, 9).distance == pytest.approx(1.5)


def test_level_and_power():
    """Equal laws: p-values as if uniform. A shift, or another shape at equal moments: rejected."""
    equal = [two_sample_test(normal(40, 2, 2 * i), normal(30, 2, 2 * i + 1), 99).p_value for i in range(100)]
    assert sum(p <= 0.1 for p in equal) in range(3, 20)  # binomial(100, 0.1), beyond 3 sigma
    assert sum(p <= 0.5 for p in equal) in range(35, 66)
    assert two_sample_test(normal(200, 2, 0), normal(200, 2, 1, mean=0.4), 199).p_value == 1 / 200
    two_points = torch.sign(normal(200, 2, 3))
    assert two_sample_test(normal(200, 2, 0), two_points, 199).p_value == 1 / 200


def test_frechet_distance_of_gaussians():
    """Samples with exact moments: |mu|^2 + sum (sigma_x - sigma_y)^2 on common axes."""
    points = normal(50, 3, 0)
    root = torch.linalg.cholesky(points.T.cov())
    white = torch.linalg.solve_triangular(root, (points - points.mean(0)).T, upper=False).T
    turn = torch.linalg.qr(normal(3, 3, 1))[0]
    x = white * torch.tensor([1.0, 2.0, 3.0]) @ turn
    y = (white * torch.tensor([2.0, 0.5, 3.0]) + torch.tensor([0.0, 1.0, 2.0])) @ turn
    assert frechet_distance(x, y) == pytest.approx(5 + 1 + 1.5**2, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # Covariances that do not commute, against the eigenvalues of C_x C_y.
    z = white * torch.tensor([0.3, 1.0, 2.0])
    trace_root = torch.linalg.eigvals(x.T.cov() @ z.T.cov()).real.sqrt().sum()
    expected = x.T.cov().trace() + z.T.cov().trace() - 2 * trace_root
    assert frechet_distance(x, z) == pytest.approx(float(expected), rel=1e-8)


def test_kernel_distance():
    """Against the definition in loops; unbiased: 0 on average for equal laws."""
    x, y = normal(5, 3, 0), normal(4, 3, 1, mean=0.5)

    def mean(pairs):
        return torch.stack([(u @ v / 3 + 1) ** 3 for u, v in pairs]).mean()

    def others(z):
        return mean((u, v) for i, u in enumerate(z) for j, v in enumerate(z) if i != j)

    expected = others(x) + others(y) - 2 * mean((u, v) for u in x for v in y)
    assert kernel_distance(x, y) == pytest.approx(float(expected))
    null = torch.tensor([kernel_distance(normal(20, 2, 2 * i), normal(20, 2, 2 * i + 1)) for i in range(300)])
    assert abs(float(null.mean())) < 4 * float(null.std()) / 300**0.5
    assert kernel_distance(normal(20, 2, 0), normal(20, 2, 1, mean=2.0)) > 5 * float(null.std())


def test_what_is_refused():
    for function in (two_sample_test, frechet_distance, kernel_distance):
        with pytest.raises(UserError, match="two or more samples"):
            function(torch.zeros(1, 3), torch.zeros(4, 3))
        with pytest.raises(UserError, match="samples of 3 and 2 values"):
            function(torch.zeros(4, 3), torch.zeros(4, 2))
