"""from_noise_down against flips, cumsum and autograd, for the heads of the presets.

Timed: the cumulated rows, and the gradient of a weighted sum of them.
"""

import pytest
import torch

from benchmarks.support.cases import close_in_norm
from cdm_fast.ops import from_noise_down, use_backend

HEADS = {  # levels, rows of a level, of these from noise, features
    "fashion-mnist": (501, 11, 1, 144),
    "cifar10": (1001, 11, 1, 512),
    "cifar10 full": (1001, 10, 10, 512),
    "table": (33, 2, 2, 100),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_from_noise_down(benchmark, compare, device, small, head):
    levels, rows_per_level, common, features = head
    torch.manual_seed(0)
    shape = (9 if small else levels) * rows_per_level + 1, features
    rows, weight = torch.randn(shape, device=device), torch.randn(shape, device=device)
    rows.requires_grad_()

    def both():
        cumulated = from_noise_down(rows, rows_per_level, common)
        return cumulated, *torch.autograd.grad(cumulated, rows, weight)

    def plain():
        with use_backend("reference"):
            return both()

    compare(benchmark, both, plain, close_in_norm(torch.float32))
    benchmark.extra_info["shape"] = list(shape)
