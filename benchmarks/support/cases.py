"""What several benchmarks have in common: precisions, and a check where two methods give no equal answers."""

import pytest
import torch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def both_finite(got: torch.Tensor, expected: torch.Tensor) -> None:
    """A `check` of `compare` for two results that need not be equal."""
    assert bool(torch.isfinite(got).all() and torch.isfinite(expected).all())
