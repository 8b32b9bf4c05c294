"""One forward pass against the probability-flow ODE: log-likelihoods of the same images, the same network.

The digits network after a short training (the ODE's steps depend on what was learned), tolerance 1e-5 and 4
probes of the divergence, the defaults of `cdm-fast nll --method ode`; both on one batch of 2 images.
"""

import pytest
import torch

from benchmarks.support.networks import without_gradients
from cdm_fast.config import preset
from cdm_fast.data import batch_indices, dequantize, load_data
from cdm_fast.likelihood import flow_log_prob
from cdm_fast.model.losses import cdm_loss
from cdm_fast.runs.build import build_model

TOLERANCE = 1e-5
IMAGES = 2
STEPS = 150


@pytest.fixture(scope="module")
def digits(small, device):
    """(model, images): a digits network trained for a moment, and test images at level 1."""
    torch.manual_seed(0)
    data = load_data("digits", "train")
    model = build_model(preset("digits")).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(2 if small else STEPS):
        index = batch_indices(len(data.images), 128, 0, step)
        x = dequantize(data.images[index], data.num_grey_levels, generator).to(device)
        optimizer.zero_grad()
        cdm_loss(model, x, ce_weight=0.01).loss.backward()
        optimizer.step()
    test = load_data("digits", "test")
    images = dequantize(test.images[: 2 if small else IMAGES], test.num_grey_levels, generator).to(device)
    return model.eval(), model.schedule.noise(images, 1, generator=generator)


def test_single_pass_against_ode(benchmark, compare, digits, small):
    model, x = digits
    tolerance = 1e-2 if small else TOLERANCE
    loose = flow_log_prob(model, x, 1, tolerance=10 * tolerance)

    def check(single, flow):
        assert bool(torch.isfinite(single).all()) and single.shape == flow.log_prob.shape
        # Converged: tenfold looser moves the mean by less than 0.01 bits/dim (0.44 nats of an 8x8 image).
        assert small or abs(float((flow.log_prob - loose.log_prob).mean())) < 0.44
        benchmark.extra_info["evaluations"] = flow.evaluations

    compare(
        benchmark,
        without_gradients(lambda: model.log_prob(x, 1)),
        lambda: flow_log_prob(model, x, 1, tolerance=tolerance),
        check,
        rounds=2,
    )
    benchmark.extra_info["shape"] = list(x.shape)
