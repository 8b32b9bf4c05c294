"""The cross-entropy of a low-rank head, block by block, against all logits at once."""

import pytest
import torch

from cdm_fast.ops import low_rank_noise_level_ce as op
from tests.accuracy import TOLERANCE, relative_error

LEVELS, CLASSES, RANK = 9, 5, 3
LABELS = {"labelled": [0, 4, 2, 1], "mixed": [0, -1, 2, -1], "none": None}


def inputs(dtype, label):
    torch.manual_seed(0)  # the same values for every dtype
    basis = torch.randn(4, (LEVELS - 1) * (RANK + 1) + 1, dtype=torch.float64)
    classes = torch.randn(CLASSES, RANK, dtype=torch.float64)
    level = torch.tensor([0, LEVELS - 1, 3, LEVELS - 2])
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (basis, classes)]
    return *leaves, level, None if LABELS[label] is None else torch.tensor(LABELS[label])


@pytest.mark.parametrize("block", [1, 45, 1 << 20], ids=["one-level", "two-levels", "all"])
@pytest.mark.parametrize("label", LABELS)
def test_blocks_agree_with_all_logits_at_once(label, block, monkeypatch):
    monkeypatch.setattr(op, "BLOCK_ELEMENTS", block)
    truth = inputs(torch.float64, label)
    expected = op.low_rank_noise_level_ce_reference(*truth)
    wanted = torch.autograd.grad(expected.square().sum(), truth[:2])
    for dtype in (torch.float64, torch.float32):
        given = inputs(dtype, label)
        loss = op.low_rank_noise_level_ce(*given)
        assert relative_error(loss, expected) < TOLERANCE[dtype]
        for got, each in zip(torch.autograd.grad(loss.square().sum(), given[:2]), wanted, strict=True):
            assert relative_error(got, each) < TOLERANCE[dtype]


@pytest.mark.parametrize("block", [1, 1 << 20], ids=["one-level", "all"])
@pytest.mark.parametrize("entry", [-1, 4], ids=["pure noise", "a level"])
def test_logits_of_minus_infinity(monkeypatch, entry, block):
    """Values as the reference's; gradients as with -1e4, for the reference's are NaN at such a level."""
    monkeypatch.setattr(op, "BLOCK_ELEMENTS", block)
    basis, classes, level, label = inputs(torch.float64, "mixed")
    level[1] = 2  # pure noise itself would be an infinite loss

    def loss_and_gradients(function, impossible):
        leaf = basis.detach().clone()
        leaf[:, entry] = impossible
        loss = function(leaf.requires_grad_(), classes, level, label)
        return loss.detach(), torch.autograd.grad(loss[loss < 1e3].sum(), (leaf, classes))

    loss, gradients = loss_and_gradients(op.low_rank_noise_level_ce, -torch.inf)
    reference = op.low_rank_noise_level_ce_reference
    torch.testing.assert_close(loss, loss_and_gradients(reference, -torch.inf)[0])
    torch.testing.assert_close(gradients, loss_and_gradients(reference, -1e4)[1])
