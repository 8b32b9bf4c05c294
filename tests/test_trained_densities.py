"""Models trained here, scored against entropies known in closed form: the whole chain from loss to log p."""

import math

import pytest
import torch

from cdm_fast import CDM, MLP, NoiseSchedule, cdm_loss


def even_in_log_snr(T, smallest):
    """A schedule of one's own: s from `smallest` to 1 by equal factors, a = sqrt(1 - s^2)."""
    s = torch.cat([torch.zeros(1), torch.logspace(math.log10(smallest), 0, T + 1)]).double()
    s[-1] = 1
    return NoiseSchedule("log-snr", ((1 - s) * (1 + s)).sqrt(), s)


def train(draw, dim, schedule, steps, lr, batch_size=256, hidden=64):
    """An MLP trained with Adam and a cosine decay; returns the model."""
    network = MLP(dim, schedule.num_levels, hidden=hidden, depth=2)
    model = CDM(network, schedule)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        rate = lr * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        cdm_loss(model, draw(batch_size), ce_weight=1.0).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def nats_per_dim(model, x):
    return float(model.log_prob(x).mean()) / x.shape[1]


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0, 2.0, 3.0], ids=lambda gamma: f"width-{gamma}")
def test_uniform_pixels_have_density_one_over_their_width(gamma):
    """CDM App. D: iid uniform pixels of width gamma have log p / d = -ln gamma."""

    def draw(num):
        return (torch.rand(num, 2) - 0.5) * gamma

    model = train(draw, 2, even_in_log_snr(T=8, smallest=0.01), steps=8000, lr=1e-2)
    assert nats_per_dim(model, draw(4000)) == pytest.approx(-math.log(gamma), abs=0.05)


# Neighbouring levels must overlap for a classifier to compare them: many dimensions need many levels.
@pytest.mark.parametrize(
    ("dim", "schedule", "lr"),
    [(2, even_in_log_snr(T=12, smallest=0.01), 1e-2), (64, NoiseSchedule.uniform(T=100), 3e-3)],
    ids=["2-d", "64-d"],
)
def test_a_gaussian_reaches_its_entropy(dim, schedule, lr):
    """Mean log-likelihood of a correlated Gaussian within 0.02 nats per dimension of minus its entropy."""
    mix = torch.randn(dim, dim) * 0.6 / dim**0.5 + 0.2 * torch.eye(dim)
    covariance = mix @ mix.T + 0.05 * torch.eye(dim)
    root = torch.linalg.cholesky(covariance)

    def draw(num):
        return torch.randn(num, dim) @ root.T

    model = train(draw, dim, schedule, steps=2000, lr=lr)
    x = draw(8000)
    exact = torch.distributions.MultivariateNormal(torch.zeros(dim), covariance).log_prob(x)
    assert nats_per_dim(model, x) == pytest.approx(float(exact.mean()) / dim, abs=0.02)
