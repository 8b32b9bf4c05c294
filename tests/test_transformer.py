"""The transformer: positions, other sizes of image, and a learning rate that holds for every width.

Its adjoint, and what it shares with the other networks, is tested with theirs.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.studies import transformer_study
from cdm_fast import CDM, NoiseSchedule, Transformer, UserError, cdm_loss
from cdm_fast.nn import tokens

SIZES = {"patch_size": 2, "depth": 2, "head_width": 16, "stem_channels": 8, "num_groups": 8}


def test_products_of_turned_vectors_depend_on_the_distance_only():
    """Su et al. 2021, eq. 16, for rows and columns."""
    rows, columns = 5, 7
    table = tokens.rotary_table((rows, columns), 16).double()
    q, k = torch.randn(2, 16, dtype=torch.float64)
    everywhere = torch.ones(rows * columns, 1, dtype=torch.float64)
    scores = tokens.turned(everywhere * q, table) @ tokens.turned(everywhere * k, table).mT
    scores = scores.reshape(rows, columns, rows, columns)
    torch.testing.assert_close(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2])
    torch.testing.assert_close(scores[2, 3, 2, 3], q @ k)
    assert float((scores[0, 1, 0, 0] - scores[1, 0, 0, 0]).abs()) > 1e-3  # rows are told from columns
    turned_back = tokens.turned(tokens.turned(everywhere * q, table), table, sign=-1)
    torch.testing.assert_close(turned_back, everywhere * q)


def test_positions_reach_the_logits():
    """Two images of the same patches in another order are told apart."""
    torch.manual_seed(0)
    network = Transformer(8, 1, 12, width=32, **SIZES | {"stem_channels": 0}).double()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    difference = network(x) - network(x.roll(4, dims=-1))
    assert float(difference.detach().abs().max()) > 1e-6


@pytest.mark.parametrize(("channels", "patch"), [(8, 8), (16, 4), (24, 4), (16, 6)])
def test_patches_in_bf16_are_those_in_fp32(channels, patch):
    """oneDNN's bf16 convolution of these sizes is wrong by more than its values on processors with AMX."""
    torch.manual_seed(0)
    embedding = tokens.PatchEmbedding(channels, 32, (patch, patch))
    x = torch.randn(2, channels, 4 * patch, 4 * patch).contiguous(memory_format=torch.channels_last)
    g = torch.randn(2, 32, 4, 4)
    expected = embedding(x)[0], embedding.adjoint(None, g)
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding(x.bfloat16())[0], embedding.adjoint(None, g.bfloat16())
    for value, truth in zip(found, expected, strict=True):
        assert value.dtype == torch.bfloat16 and value.is_contiguous(memory_format=torch.channels_last)
        assert float((value - truth).detach().norm() / truth.norm()) < 0.01


def test_weights_fit_other_sizes_of_image():
    torch.manual_seed(0)
    sizes = SIZES | {"stem_resolutions": 2, "stem_blocks": 2}
    small, large = (Transformer(size, 1, 12, width=32, **sizes) for size in (8, (12, 16)))
    large.load_state_dict(small.state_dict())
    logits = large(torch.randn(2, 1, 12, 16))
    assert logits.shape == (2, 12) and bool(logits.isfinite().all())


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"width": 40}, "width 40 is not a multiple of 16 .head_width 16"),
        ({"width": 48, "num_groups": 32}, "width 48 is not a multiple of 32"),
        ({"width": 32, "stem_channels": 12}, "stem_channels 12 is not a multiple of num_groups 8"),
        ({"width": 32, "depth": 0}, "depth is 0"),
        ({"width": 32, "head_width": 6}, "head_width 6"),
        ({"width": 32, "stem_resolutions": 3}, "patch size 2 with 3 resolutions of the stem"),
        ({"width": 32, "stem_channels": 0, "stem_resolutions": 2}, "a stem of 2 resolutions needs channels"),
        ({"width": 32, "stem_blocks": 0}, "stem_blocks is 0"),
        ({"width": 32, "patch_size": 3}, "image size 8 does not consist of whole patches of side 3"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, told):
    with pytest.raises(UserError, match=told):
        Transformer(8, 1, 12, **SIZES | sizes)


def changes_after_steps(width):
    """(3,): how far five steps of Adam move the tokens of both blocks and the logits, per element."""
    torch.manual_seed(0)
    schedule = NoiseSchedule.uniform(T=20)
    network = Transformer(8, 1, schedule.num_levels, width=width, **SIZES)
    model = CDM(network, schedule)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(32, 1, 8, 8, generator=generator) for _ in "xe")
    level = torch.arange(32) % schedule.num_levels
    probe = schedule.noise(x0, level, eps)

    def outputs():
        seen = []
        handles = [
            block.register_forward_hook(lambda module, inputs, result: seen.append(result[0] - inputs[0]))
            for block in network.blocks
        ]
        with torch.no_grad():
            logits = network(probe)
        for handle in handles:
            handle.remove()
        return [*seen, logits - logits.mean(1, keepdim=True)]

    before = outputs()
    for _ in range(5):
        optimizer.zero_grad()
        cdm_loss(model, x0, level, eps, ce_weight=0.1).loss.backward()
        optimizer.step()
    pairs = zip(outputs(), before, strict=True)
    return torch.stack([(after - start).square().mean().sqrt() for after, start in pairs])


def test_a_step_changes_outputs_equally_at_every_width(monkeypatch):
    """Yang and Hu 2021, appendix D.1: without the rule they grow with the width."""
    narrow, wide = changes_after_steps(32), changes_after_steps(256)
    assert bool(((wide / narrow > 0.5) & (wide / narrow < 2)).all()), wide / narrow
    monkeypatch.setattr(tokens.WidthRule, "multiplier", 1.0)
    narrow, wide = changes_after_steps(32), changes_after_steps(256)
    assert bool((wide / narrow > 2.5).any()), wide / narrow


def test_the_line_of_the_scaling_study_goes_through_the_best_networks():
    rows = [{"flops": 10.0**power, "bound": [4 - 0.1 * power, 0.0]} for power in (13, 14, 16)]
    beaten = {"flops": 3e15, "bound": [3.9, 0.0]}
    intercept, slope = transformer_study.line_of_best_bounds([*rows, beaten])
    assert (intercept, slope) == (pytest.approx(4), pytest.approx(-0.1))


def test_the_line_of_the_scaling_study_reaches_a_bound_where_it_falls_to_it():
    assert transformer_study.flops_to_reach(4, (10, -0.5)) == pytest.approx(1e12)
    assert transformer_study.flops_to_reach(4, (10, 0.5)) == float("inf")


def test_flops_of_a_step_are_those_of_its_products():
    """Six for each matrix: forward pass and adjoint, and for both the gradients of input and weight.

    Attention, the third pool and the rounding of hidden layers add some percent.
    """
    config = transformer_study.configured("transformer 128x2", "digits")
    small, large = (
        transformer_study.step_flops(
            replace(config, network=replace(config.network, width=256, depth=depth, head_width=64))
        )
        for depth in (2, 4)
    )
    tokens_of_a_step, weights = 64 * 49, 2 * 12 * 256**2
    assert 1 < (large - small) / (2 * 6 * tokens_of_a_step * weights) < 1.15
