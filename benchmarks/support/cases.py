"""What several benchmarks have in common: precisions, and a check where two methods give no equal answers."""

from collections.abc import Callable, Iterable

import pytest
import torch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def both_finite(got: torch.Tensor, expected: torch.Tensor) -> None:
    """A `check` of `compare` for two results that need not be equal."""
    assert bool(torch.isfinite(got).all() and torch.isfinite(expected).all())


# Both sides of a comparison round to the dtype at different places: this is a check of the answer, the ops'
# tests are exact.
_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def close_in_norm(dtype: torch.dtype) -> Callable[[Iterable[torch.Tensor], Iterable[torch.Tensor]], None]:
    """A `check` of `compare` for results of several tensors, computed in `dtype`."""

    def check(got: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
        for ours, theirs in zip(got, expected, strict=True):
            difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert difference < _DIFFERENCE[dtype], float(difference)

    return check
