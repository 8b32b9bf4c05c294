"""Inpainting, denoising and super-resolution where the posterior has a closed form."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.support.analytic import ExactNetwork, GaussianMixture, given, random_mixture, smooth_pixels
from cdm_fast import CDM, DDM, MLPDenoiser, NoiseSchedule, UserError, sample
from cdm_fast.cli.arguments import Restore
from cdm_fast.cli.restore import read_input, read_measurement
from cdm_fast.evaluation.quality import two_sample_test
from cdm_fast.runs.checkpoint import create_run, read_config
from cdm_fast.sampling import MALA
from cdm_fast.sampling.restoration import Known, MeanPool, Posterior, log_prob_at, restore
from cdm_fast.training.state import new_state, to_checkpoint
from tests.test_bad_input import refused
from tests.test_cli import call_json
from tests.tiny_run import GREY_LEVELS, tiny_config, write_images

SCHEDULE = NoiseSchedule.uniform(60)
SIGMA = 0.3
KNOWN = (torch.arange(16) % 4 < 2).view(1, 4, 4)  # the left half


DENSITY = smooth_pixels(4)
MODEL = CDM(ExactNetwork(DENSITY, SCHEDULE), SCHEDULE, input_shape=(1, 4, 4))
TRUTH = DENSITY.sample(1, torch.Generator().manual_seed(5)).view(1, 4, 4)
NOISY = TRUTH + SIGMA * torch.randn(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

TASKS = {
    "inpaint": Known(NOISY, SIGMA, KNOWN),
    "denoise": Known(NOISY, SIGMA),
    "super-resolution": MeanPool(NOISY.view(2, 2, 2, 2).mean((1, 3))[None], 2, SIGMA / 2),
}
every_task = pytest.mark.parametrize("task", TASKS)


def matrix(measurement):
    """(k, d) A, column by column."""
    return measurement(torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)).T


def exact_posterior(measurement, factor=1.0):
    """Where the noise has `factor` times the measurement's variance."""
    return given(DENSITY, matrix(measurement), measurement.y, factor * measurement.sigma**2)


@every_task
def test_measurement_is_linear_with_its_transpose_and_gain(task):
    measurement = TASKS[task]
    A = matrix(measurement)
    x, values = torch.randn(3, 1, 4, 4).double(), torch.randn(3, len(A)).double()
    torch.testing.assert_close(measurement(x), x.flatten(1) @ A.T)
    torch.testing.assert_close(measurement.transpose(values).flatten(1), values @ A)
    torch.testing.assert_close(A @ A.T, measurement.gain * torch.eye(len(A), dtype=torch.float64))


@every_task
def test_level_0_is_the_posterior_and_the_last_is_noise(task):
    model, exact = Posterior(MODEL, TASKS[task]), exact_posterior(TASKS[task])
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for level, density, a, s in ((0, exact, one, zero), (SCHEDULE.T + 1, exact, zero, one)):
        difference = model.log_prob(x, level) - density.log_prob(x.flatten(1), a, s)[:, 0]
        torch.testing.assert_close(difference, difference[:1].expand(6))  # equal up to a constant


@every_task
@pytest.mark.parametrize("schedule", ["uniform", "ot"])
def test_standard_normal_data_are_exact_at_every_level(task, schedule):
    """There `q_t(x)` is `p(x_t = x, y)`, constants included: by the joint Gaussian of x_t and y."""
    schedule, measurement = NoiseSchedule.by_name(schedule, 9), TASKS[task]
    eye, A = torch.eye(16, dtype=torch.float64), matrix(measurement)
    density = GaussianMixture.gaussian(torch.zeros(16), eye)
    model = Posterior(CDM(ExactNetwork(density, schedule), schedule, input_shape=(1, 4, 4)), measurement)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    both = torch.cat([x.flatten(1), measurement.y.expand(3, -1)], dim=1)
    for t, (a, s) in enumerate(zip(schedule.a, schedule.s, strict=True)):
        noise = measurement.sigma**2 * torch.eye(len(A), dtype=torch.float64)
        covariance = torch.cat(
            [
                torch.cat([(a**2 + s**2) * eye, a * A.T], dim=1),
                torch.cat([a * A, A @ A.T + noise], dim=1),
            ]
        )
        joint = torch.distributions.MultivariateNormal(torch.zeros_like(both[0]), covariance)
        torch.testing.assert_close(model.log_prob(x, t), joint.log_prob(both))


@every_task
def test_the_score_is_the_gradient(task):
    model = Posterior(MODEL, TASKS[task])
    level = torch.tensor([0, 1, 20, 40, 60, 61])
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(model.log_prob(x, level).sum(), x)
    torch.testing.assert_close(model.score(x.detach(), level), expected)
    log_prob, _ = model.log_prob_levels_and_score(x.detach(), level)
    torch.testing.assert_close(log_prob, model.log_prob_levels(x.detach()))


@every_task
def test_samples_match_the_analytic_posterior(task):
    """Two-sample test of level 5 %; one against a posterior of 1.7 times the noise is refused at 1 %."""
    measurement = TASKS[task]
    drawn = sample(Posterior(MODEL, measurement), 300, MALA(moves=4), 30, seed=1, batch_size=300)
    generator = torch.Generator().manual_seed(2)
    right, wrong = (exact_posterior(measurement, factor).sample(300, generator) for factor in (1, 3))
    assert two_sample_test(drawn.flatten(1), right, 499).p_value > 0.05
    assert two_sample_test(drawn.flatten(1), wrong, 499).p_value < 0.01


def test_components_have_the_mass_that_the_measurement_leaves_them():
    """One of two coordinates of a mixture: its four components' shares go from even to 59, 2, 14 and 25 %."""
    density = random_mixture(2, 4, seed=1)
    model = CDM(ExactNetwork(density, SCHEDULE), SCHEDULE, input_shape=(2,))
    measurement = Known(torch.tensor([0.2, 0.0]).double(), 0.5, torch.tensor([True, False]))
    exact = given(density, torch.tensor([[1.0, 0.0]]), measurement.y, 0.5**2)
    drawn = sample(Posterior(model, measurement), 400, MALA(moves=2), 20, seed=1, batch_size=400)
    generator = torch.Generator().manual_seed(2)
    assert two_sample_test(drawn, exact.sample(400, generator), 499).p_value > 0.05
    assert two_sample_test(drawn, density.sample(400, generator), 499).p_value < 0.01


def test_no_number_of_plain_steps_will_do():
    """The path's densities are not the noised posterior: DDIM through every level draws something else."""
    measurement = TASKS["inpaint"]
    drawn = sample(Posterior(MODEL, measurement), 300, "ddim", SCHEDULE.T, seed=1, batch_size=300)
    right = exact_posterior(measurement).sample(300, torch.Generator().manual_seed(2))
    assert two_sample_test(drawn.flatten(1), right, 499).p_value < 0.01


@pytest.mark.parametrize("level", [0, 12])
def test_candidates_are_ranked_as_the_closed_form_ranks_them(level):
    found = restore(MODEL, TASKS["inpaint"], 12, steps=10, sampler=MALA(moves=2), level=level)
    a, s = SCHEDULE.a[level : level + 1], SCHEDULE.s[level : level + 1]
    x = found.images.flatten(1)
    if level == 0:
        exact = DENSITY.log_prob(x, a, s)[:, 0]
    else:
        noise = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        exact = torch.stack([DENSITY.log_prob(a * x + s * eps, a, s)[:, 0] for eps in noise]).mean(0)
    torch.testing.assert_close(found.log_prob, exact)
    assert (exact.diff() <= 0).all() and exact[0] - exact[-1] > 1
    likelihood = torch.distributions.Normal(TASKS["inpaint"](found.images), SIGMA)
    torch.testing.assert_close(found.log_likelihood, likelihood.log_prob(TASKS["inpaint"].y).sum(1))
    torch.testing.assert_close(found.mean, found.images.mean(0))
    torch.testing.assert_close(log_prob_at(MODEL, found.images.flip(0), level).flip(0), found.log_prob)


def test_a_class_is_restored_under_its_own_density():
    """Two classes of one value each: given the class, the other's is not drawn, whatever y says."""
    density = GaussianMixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), 0.01)
    )
    network = ExactNetwork(density, SCHEDULE)
    model = CDM(network, SCHEDULE, input_shape=(1,), class_prior=torch.ones(2), conditioning="embedding")
    measurement = Known(torch.tensor([0.8], dtype=torch.float64), 1.0)
    for label, side in ((0, -1), (1, 1)):
        found = restore(model, measurement, 20, steps=20, sampler=MALA(moves=2), label=label)
        assert (found.images * side > 0).all()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Known(NOISY, 0.0), "sigma is 0.0"),
        (lambda: Known(NOISY, 0.1, torch.zeros_like(NOISY, dtype=torch.bool)), "nothing was measured"),
        (lambda: Known(NOISY, 0.1, KNOWN[0]), "pass bool"),
        (lambda: Known(NOISY / 0, 0.1), "not finite"),
        (lambda: MeanPool(NOISY, 1, 0.1), "factor 1"),
        (lambda: Posterior(MODEL, MeanPool(NOISY, 2, 0.1)), "shape .1, 8, 8."),
        (
            lambda: Posterior(DDM(MLPDenoiser(16, hidden=16), SCHEDULE), TASKS["denoise"]),
            "DDM has no log p",
        ),
        (lambda: restore(MODEL, TASKS["denoise"], 0), "0 candidates"),
        (lambda: restore(MODEL, TASKS["denoise"], 2, level=61), "level 61"),
    ],
    ids=["sigma", "nothing", "known", "nan", "factor", "shape", "ddm", "candidates", "level"],
)
def test_what_is_refused(make, told):
    with pytest.raises(UserError, match=told):
        make()


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained runs, each named after its objective, and pictures."""
    folder = tmp_path_factory.mktemp("restore")
    data, device = write_images(folder / "images.npz"), torch.device("cpu")
    for objective in ("cdm", "ddm", "classifier"):
        config = tiny_config(data, objective=objective)
        create_run(folder / objective, config, to_checkpoint(new_state(config, device), config))
    generator = np.random.default_rng(0)
    for name, size in {"image": 8, "small": 4, "odd": 7}.items():
        pixels = generator.integers(0, 256, (size, size)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    Image.new("L", (8, 8), 0).save(folder / "black.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[1:4, 3:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def in_folder(folder, flags):
    """Names of pictures as paths."""
    return [folder / f"{flag}.png" if flag in ("mask", "black", "odd") else flag for flag in flags]


QUICK = ["--steps", 2, "--moves", 1, "--candidates", 3, "--device", "cpu"]
ROUNDING = 1 / (GREY_LEVELS * 3**0.5)  # standard deviation of a value uniform on one grey level, 2/N


@pytest.mark.parametrize(
    ("image", "flags", "sigma"),
    [
        ("image", ["--task", "inpaint", "--mask", "mask", "--level", 2], ROUNDING),
        ("image", ["--task", "denoise", "--sigma", 0.2], 0.2),
        ("small", ["--task", "super-resolution", "--factor", 2], ROUNDING / 2),
    ],
    ids=["inpaint", "denoise", "super-resolution"],
)
def test_command(folder, tmp_path, image, flags, sigma):
    out, flags = tmp_path / "sheet.png", in_folder(folder, flags)
    result = call_json("restore", folder / "cdm", folder / f"{image}.png", *flags, *QUICK, "--out", out)
    assert result["log_prob"] == sorted(result["log_prob"], reverse=True)
    assert len(result["log_prob"]) == len(result["log_likelihood"]) == 3
    assert all(0 <= rate <= 1 for rate in result["acceptance"]) and result["out"] == str(out)
    assert Image.open(out).size[0] > 3 * 64
    assert result["sigma"] == pytest.approx(sigma)


def test_mask_and_box_leave_the_same_pixels_known(folder):
    config = read_config(folder / "cdm")
    for where in ({"mask": folder / "mask.png"}, {"box": (3, 1, 5, 3)}):
        command = Restore(folder / "cdm", folder / "image.png", "inpaint", **where)
        measurement, shown = read_measurement(command, config)
        known = torch.ones(8, 8, dtype=torch.bool)
        known[1:4, 3:] = False
        image = read_input(folder / "image.png", config)
        assert torch.equal(measurement.y, image[0][known])
        assert torch.equal(measurement(image[None])[0], measurement.y)
        assert (shown[0][~known] == 0).all() and torch.equal(shown[0][known], measurement.y)


INPAINT, LARGER = ["--task", "inpaint"], ["--task", "super-resolution"]


@pytest.mark.parametrize(
    ("image", "flags", "told"),
    [
        ("gone", ["--task", "denoise", "--sigma", 1], ["gone.png"]),
        ("odd", ["--task", "denoise", "--sigma", 1], ["odd.png", "7x7", "8x8"]),
        ("image", ["--task", "denoise"], ["needs --sigma"]),
        ("image", ["--task", "denoise", "--sigma", 0], ["--sigma is 0"]),
        ("image", ["--task", "denoise", "--sigma", 1, "--factor", 2], ["--factor goes with"]),
        ("image", INPAINT, ["--mask FILE or --box"]),
        ("image", [*INPAINT, "--mask", "black", "--box", 0, 0, 1, 1], ["--mask FILE or --box"]),
        ("image", [*INPAINT, "--mask", "black"], ["black.png", "empty"]),
        ("image", [*INPAINT, "--mask", "odd"], ["odd.png", "7x7", "8x8"]),
        ("image", [*INPAINT, "--box", 6, 0, 4, 8], ["8 pixels high and 8 wide"]),
        ("image", [*INPAINT, "--box", 0, 0, 8, 8], ["no pixel known"]),
        ("small", LARGER, ["--factor is None"]),
        ("small", [*LARGER, "--factor", 3], ["--factor is 3", "8 pixels"]),
        ("image", [*LARGER, "--factor", 2], ["8x8", "4x4"]),
        ("image", [*INPAINT, "--box", 0, 0, 4, 8, "--level", 9], ["level 9"]),
        ("image", [*INPAINT, "--box", 0, 0, 4, 8, "--steps", 50], ["steps is 50"]),
        ("image", [*INPAINT, "--box", 0, 0, 4, 8, "--out", "sheet.jpg"], [".png"]),
    ],
)
def test_command_refuses(folder, image, flags, told):
    flags = in_folder(folder, flags)
    refused(folder, ["restore", folder / "cdm", folder / f"{image}.png", *flags], *told)


@pytest.mark.parametrize(("run", "told"), [("ddm", "DDM"), ("classifier", "classifier")])
def test_command_refuses_models_without_a_likelihood(folder, run, told):
    refused(
        folder, ["restore", folder / run, folder / "image.png", "--task", "denoise", "--sigma", 0.1], told
    )
