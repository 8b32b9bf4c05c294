"""The encoder presets against our own plain diffusion model (DDM) on the U-Net of the same data.

One evaluation (forward pass and adjoint) is timed against one forward pass of the DDM, and one training step
against the DDM's. `flops_ratio` holds the multiplications and additions of the evaluation over those of the
DDM's.
"""

import pytest

from benchmarks.support.cases import DTYPES, both_finite
from benchmarks.support.pairs import BATCH_SIZE, Pair

PRESETS = pytest.mark.parametrize("name", BATCH_SIZE)


@DTYPES
@PRESETS
def test_evaluation_against_unet_ddm(benchmark, compare, small, device, name, dtype):
    pair = Pair(name, "encoder", small, device)
    compare(benchmark, *pair.evaluations(dtype), both_finite, rounds=9)
    benchmark.extra_info.update(shape=list(pair.x.shape), flops_ratio=pair.flops_ratio(dtype))


@DTYPES
@PRESETS
def test_step_against_unet_ddm(benchmark, compare, small, device, name, dtype):
    pair = Pair(name, "encoder", small, device)
    compare(benchmark, *pair.steps(dtype), both_finite, rounds=7)
    benchmark.extra_info["shape"] = list(pair.x.shape)
