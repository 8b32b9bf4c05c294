"""The bits/dim protocol and its checks, on densities with known likelihoods."""

import math

import pytest
import torch
from torch import nn

from benchmarks.support.analytic import ExactImageNetwork, ExactNetwork, GaussianMixture, UniformPixels
from cdm_fast import CDM, DDM, MLP, NoiseSchedule, UNet, UserError
from cdm_fast.data import ImageData
from cdm_fast.likelihood import (
    denoise_blind,
    estimate_level,
    evaluate,
    level_confusion,
    mse_per_level,
    ratio_check,
)

SHAPE = (1, 2, 2)
SCHEDULE = NoiseSchedule.uniform(T=30)


def exact_model(density, prior=None, assumed_prior=None):
    return CDM(
        ExactImageNetwork(density, SCHEDULE, prior), SCHEDULE, level_prior=assumed_prior, input_shape=SHAPE
    )


def grey_images(num=2000, grey=16, seed=0):
    """Every grey value alike and independent: dequantised, the pixels are uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(grey, (num, *SHAPE), generator=generator, dtype=torch.uint8)
    return ImageData(images, None, grey, None, name="grey", split="test")


def test_bf16_says_what_it_costs():
    torch.manual_seed(0)
    model = CDM(
        UNet(
            8,
            1,
            SCHEDULE.num_levels,
            base_channels=32,
            multipliers=(1,),
            blocks_per_level=1,
            attention_resolutions=(),
            num_groups=8,
        ),
        SCHEDULE,
    )
    with torch.no_grad():
        model.network.linear_layer.weight *= 20  # logits large enough for bf16 to round visibly
    images = torch.randint(16, (300, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageData(images, None, 16, None, name="grey", split="test")
    options = {"draws": 1, "batch_size": 100, "check_levels": 0}
    exact, rounded = (evaluate(model, data, precision=name, **options) for name in ("fp32", "bf16"))
    cost = (rounded.per_image - exact.per_image)[:256].mean()
    assert exact.precision_cost is None
    assert rounded.precision_cost == pytest.approx(float(cost), abs=1e-9)
    assert 0 < abs(rounded.precision_cost) < 0.05


UNIFORM = UniformPixels(width=2.0, dim=4)


def test_uniform_grey_levels_cost_exactly_their_entropy():
    """The density of [-1, 1]^d is 2^-d, so bits/dim is log2 N whatever the noise: the offset is right."""
    report = evaluate(exact_model(UNIFORM), grey_images(), draws=2, check_levels=0)
    assert report.bits_per_dim == pytest.approx(math.log2(16), abs=1e-6)
    assert report.bits_per_dim_stderr == pytest.approx(0, abs=1e-6)
    assert report.draw_spread == pytest.approx(0, abs=1e-6)
    assert (report.num_images, report.draws, report.method, report.protocol) == (
        2000,
        2,
        "single",
        "dequantized",
    )
    assert report.to_json()["bits_per_dim"] == report.bits_per_dim


def test_a_discretised_gaussian_costs_its_cross_entropy():
    """bits/dim = -E log2 p(x)/d + log2(N/2), with p a Gaussian and x uniform: E x^2 = 1/3."""
    sigma2 = 0.5
    gaussian = GaussianMixture.gaussian(
        torch.zeros(4, dtype=torch.float64), sigma2 * torch.eye(4, dtype=torch.float64)
    )
    expected = (0.5 * math.log(2 * math.pi * sigma2) + 1 / (6 * sigma2)) / math.log(2) + math.log2(8)
    report = evaluate(exact_model(gaussian), grey_images(num=20_000), draws=1, check_levels=0)
    assert report.bits_per_dim == pytest.approx(expected, abs=5 * report.bits_per_dim_stderr)
    assert 0 < report.bits_per_dim_stderr < 0.005


def test_the_score_depends_on_the_seed_alone():
    gaussian = GaussianMixture.gaussian(
        torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    )
    model, data = exact_model(gaussian), grey_images(num=50)
    first = evaluate(model, data, level=3, seed=1, check_levels=0)
    torch.rand(7)
    again = evaluate(model, data, level=3, seed=1, check_levels=0)
    other = evaluate(model, data, level=3, seed=2, check_levels=0)
    assert torch.equal(first.per_image, again.per_image)
    assert not torch.equal(first.per_image, other.per_image)
    assert first.draw_spread > 0


def test_ratio_check_passes_true_densities():
    check = ratio_check(exact_model(UNIFORM), grey_images(), num_images=2000)
    assert check.levels == list(range(31))
    # p_0/p_1 and p_1/p_2 vary most; 2,000 images leave a few per cent.
    assert check.worst < 0.1
    assert check.sum_bits_per_dim == pytest.approx(0, abs=0.1)


def test_ratio_check_finds_a_density_that_is_not_normalised():
    """A model told the wrong prior is off by a constant per level, and the check reads that constant."""
    prior = torch.ones(32)
    prior[10] = 3.0
    model = exact_model(UNIFORM, prior, assumed_prior=torch.ones(32))
    check = ratio_check(model, grey_images(), num_images=2000)
    assert check.log_mean_ratio[10] == pytest.approx(math.log(3), abs=0.05)
    assert check.log_mean_ratio[9] == pytest.approx(-math.log(3), abs=0.05)
    assert check.worst_level in (9, 10)


def test_ratio_check_on_some_levels_gives_no_sum():
    check = ratio_check(exact_model(UNIFORM), grey_images(num=20), max_levels=5, num_images=20)
    assert len(check.levels) == 5
    assert (check.levels[0], check.levels[-1]) == (0, 30)
    assert check.sum_bits_per_dim is None


@pytest.mark.parametrize(("side", "complete"), [(4, True), (17, False)], ids=["small", "large"])
def test_every_level_of_a_long_schedule_is_checked_on_small_images(side, complete):
    schedule = NoiseSchedule.uniform(T=300)
    network = nn.Sequential(nn.Flatten(), MLP(side * side, schedule.num_levels, hidden=2, depth=1))
    images = torch.zeros(4, 1, side, side, dtype=torch.uint8)
    data = ImageData(images, None, num_grey_levels=17, num_classes=None, name="black", split="test")
    check = evaluate(CDM(network, schedule), data, draws=1).ratio_check
    assert len(check.levels) == (301 if complete else 64)
    assert (check.sum_bits_per_dim is not None) == complete


@pytest.mark.parametrize("level", [2, 8, 20], ids=lambda level: f"level-{level}")
def test_the_noise_of_an_image_is_found_by_likelihood(level):
    """Many pixels make the estimate sharp: with d of them, sigma is known to about 1/sqrt(2 d)."""
    d = 256
    density = UniformPixels(width=2.0, dim=d)
    model = CDM(ExactNetwork(density, SCHEDULE), SCHEDULE, input_shape=(d,))
    generator = torch.Generator().manual_seed(level)
    x0 = torch.rand(6, d, generator=generator, dtype=torch.float64) * 2 - 1
    sigma = float(SCHEDULE.sigma[level])
    y = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    found, sigma_hat = estimate_level(model, y)
    assert (found - level).abs().max() <= 2
    assert float(sigma_hat.log().mean()) == pytest.approx(math.log(sigma), abs=0.1)
    x0_hat, _, _ = denoise_blind(model, y)
    assert (x0_hat - x0).square().mean() < (y - x0).square().mean()


def test_confusion_of_an_exact_classifier():
    d = 64
    model = CDM(ExactNetwork(UniformPixels(2.0, d), SCHEDULE), SCHEDULE, input_shape=(1, 8, 8))
    model.network.forward = lambda x, inner=model.network.forward: inner(x.flatten(1).double())
    images = torch.randint(16, (200, 1, 8, 8), dtype=torch.uint8)
    edges, matrix = level_confusion(model, ImageData(images, None, 16, None, "grey", "test"), bins=8)
    assert edges.tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert torch.allclose(matrix.sum(1), torch.ones(8, dtype=torch.float64))
    assert (matrix.argmax(1) == torch.arange(8)).all()
    # Averaged over all true levels, the exact posterior gives back the prior, which is flat.
    assert matrix.sum(0) == pytest.approx(torch.ones(8, dtype=torch.float64), abs=0.1)


def test_mse_per_level_of_the_exact_denoiser():
    """For N(0, v I) data the best error of eps_hat at (a, s) is a^2 v / (a^2 v + s^2)."""
    variance = 1 / 3
    gaussian = GaussianMixture.gaussian(
        torch.zeros(4, dtype=torch.float64), variance * torch.eye(4, dtype=torch.float64)
    )
    levels, errors = mse_per_level(exact_model(gaussian), grey_images(), max_levels=6, num_images=2000)
    a, s = SCHEDULE.a[levels], SCHEDULE.s[levels]
    expected = a**2 * variance / (a**2 * variance + s**2)
    assert errors == pytest.approx(expected.tolist(), rel=0.05, abs=0.01)


def test_bad_requests_are_named():
    model, data = exact_model(UNIFORM), grey_images(num=4)
    with pytest.raises(UserError, match="draws is 0"):
        evaluate(model, data, draws=0)
    with pytest.raises(UserError, match="level 32 does not exist"):
        evaluate(model, data, level=32)
    with pytest.raises(UserError, match="unknown protocol 'sharp'"):
        evaluate(model, data, protocol="sharp")
    with pytest.raises(UserError, match="DDM"):
        evaluate(DDM(nn.Identity(), SCHEDULE), data)
