"""benchmarks.step_costs: the bytes and FLOPs of single ops, and that a whole step can be counted."""

import pytest
import torch

from benchmarks.step_costs import Costs, as_on_a_gpu, step_costs, table
from cdm_fast.ops import attention, group_norm_silu


def test_a_product_costs_its_flops_and_its_matrices():
    costs = Costs(bandwidth=1e3, rate=1e6)
    with costs:
        torch.ones(4, 8) @ torch.ones(8, 16).t().contiguous().t()
    cost = costs.of_op["mm"]
    assert (cost.calls, cost.flops, cost.bytes) == (1, 2 * 4 * 8 * 16, 4 * (4 * 8 + 8 * 16 + 4 * 16))
    assert cost.seconds == cost.bytes / 1e3
    assert not costs.of_op.keys() & {"t", "view", "empty"}


def test_an_expanded_tensor_is_read_once():
    costs = Costs(1e12, 1e12)
    x, y = torch.ones(3, 1).expand(3, 5), torch.ones(3, 5)
    with costs:
        x + y
    assert costs.of_op["add"].bytes == 4 * (3 + 15 + 15)


def test_fused_ops_count_what_their_kernels_do():
    pytest.importorskip("triton")
    costs = Costs(1e12, 1e12)
    with as_on_a_gpu():
        image = torch.empty(2, 8, 4, 4)
        q = torch.empty(2, 16, 8)
        with costs:
            group_norm_silu(image, torch.empty(8), torch.empty(8), 2)
            attention(q, q, q, 1.0)
    norm, attended = costs.of_op["group_norm_silu"], costs.of_op["attention"]
    images, statistics = 4 * image.numel(), 2 * 4 * 2 * 2
    assert norm.bytes == 3 * images + statistics
    assert attended.flops == 2 * 2 * (2 * 16 * 16) * 8
    assert attended.bytes == 4 * (4 * q.numel() + 2 * 16) + 4 * 4 * (2 * 16 * 16)


def test_a_whole_step_is_counted():
    pytest.importorskip("triton")
    of_op = step_costs("digits", 4, 4.3, 790)
    assert of_op["convolution_backward"].flops > of_op["convolution"].flops > 0
    assert of_op["group_norm_silu_vjp_backward"].calls == of_op["group_norm_silu"].calls
    rows = table(of_op, rows=3).splitlines()
    assert rows[0].startswith("| op | calls") and rows[-1].startswith("| all |")
    assert len(rows) == 7
