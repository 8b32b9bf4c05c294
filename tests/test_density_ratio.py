"""The scikit-learn estimators: their conventions, closed forms, and what is refused or documented."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.parallel import Parallel, delayed

from cdm_fast.model import CDM
from cdm_fast.model.constants import fit_constants
from cdm_fast.model.schedule import even_in_log_noise
from cdm_fast.nn import MLP
from cdm_fast.tables import (
    CDMDensity,
    DensityRatio,
    MutualInformation,
    effective_sample_size,
    log_density_ratio,
)
from cdm_fast.tables.columns import copies, measure, normal_scores

SMALL = {"max_iter": 3, "hidden": 8, "depth": 1, "num_levels": 6, "batch_size": 16, "cv": 2}
QUICK = {
    "max_iter": 400,
    "hidden": 32,
    "depth": 1,
    "num_levels": 16,
    "learning_rate": 1e-2,
    "random_state": 0,
}


def known_differences(estimator):
    """Weights and copies are alike on average only: a step draws its rows at random."""
    if isinstance(estimator, MutualInformation):
        return {}
    return {"check_sample_weight_equivalence_on_dense_data": "rows are drawn at random"}


@parametrize_with_checks(
    [CDMDensity(**SMALL), DensityRatio(**SMALL), MutualInformation(**SMALL)],
    expected_failed_checks=known_differences,
)
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def gaussian(num, seed=0):
    """(x (num, 2), exact log density) of a correlated Gaussian far from the unit square."""
    covariance = np.array([[9.0, 2.0], [2.0, 1.0]])
    x = np.random.default_rng(seed).multivariate_normal([100.0, -3.0], covariance, size=num)
    residual = x - [100.0, -3.0]
    mahalanobis = np.einsum("ni,ij,nj->n", residual, np.linalg.inv(covariance), residual)
    return x, -0.5 * (mahalanobis + math.log(np.linalg.det(covariance)) + 2 * math.log(2 * math.pi))


def test_density_of_a_gaussian_and_its_samples():
    x, exact = gaussian(4000)
    density = CDMDensity(**QUICK).fit(x)
    new, exact = gaussian(500, seed=1)
    assert np.abs(density.score_samples(new) - exact).mean() < 0.1
    assert density.score(new) == pytest.approx(exact.mean(), abs=0.05)
    drawn = density.sample(2000)
    np.testing.assert_allclose(drawn.mean(0), [100.0, -3.0], atol=0.3)
    np.testing.assert_allclose(np.cov(drawn, rowvar=False), [[9.0, 2.0], [2.0, 1.0]], rtol=0.25)


def test_density_integrates_to_one():
    """Two far clusters on the line, which no Gaussian fits; Riemann sum over the line."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random(4000) < 0.3, -2.0, 1.0) + 0.3 * rng.normal(size=4000)
    density = CDMDensity(**{**QUICK, "max_iter": 700}).fit(x[:, None])
    grid = np.linspace(-6, 6, 2001)
    values = np.exp(density.score_samples(grid[:, None]))
    assert values.sum() * (grid[1] - grid[0]) == pytest.approx(1, abs=0.1)
    left = values[grid < -0.5].sum() / values.sum()
    assert left == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("widths", [[0.4], [0.3, 0.8]], ids=["levels", "levels-and-classes"])
@torch.no_grad()
def test_constants_are_fitted_whatever_they_were(widths):
    """x_0 ~ N(0, widths[c]^2) on the line: exact logits are -x^2 / 2v - log(v) / 2, v the variance of x_t."""
    schedule, num_classes = even_in_log_noise(10, 0.1), None if len(widths) == 1 else len(widths)
    conditioning = "embedding" if num_classes is None else "joint"
    network = MLP(1, 10, hidden=2, depth=1, num_classes=num_classes, conditioning=conditioning).double()
    head, width = network.linear_layer, torch.tensor(widths).double()
    shift = head.shift if num_classes is None else head.shift_each
    variance = (schedule.a[:-1, None] ** 2 * width**2 + schedule.s[:-1, None] ** 2).flatten()
    variance = torch.cat([variance, torch.ones(1)])
    for parameter, value in ((head.weight, 0), (network.square.weight, 1), (network.square.bias, 0)):
        parameter.fill_(value)
    head.bias.zero_()
    shift(-1 / (2 * variance))
    head.weight[:, -1] = head.bias  # of the squared feature
    head.bias.zero_()

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    before, spoiled = network(x), torch.randn(len(variance), dtype=torch.float64)
    torch.testing.assert_close(before, -(x**2) / (2 * variance))
    shift(spoiled)
    torch.testing.assert_close(network(x), before + spoiled)

    def draw(num, generator):
        label = torch.arange(num) % len(widths)
        x = (width[label] * torch.randn(num, generator=generator))[:, None]
        return x.float(), None if num_classes is None else label

    fit_constants(CDM(network, schedule), draw, 40_000, torch.Generator().manual_seed(0))
    constants = (network(x) - before)[0]
    exact = -variance.log() / 2
    exact[:-1] -= math.log(len(widths))  # a class holds a share of its level's rows, pure noise all of them
    torch.testing.assert_close(constants - constants[-1], exact, atol=0.05, rtol=0)


def test_density_of_whole_numbers_is_their_probability():
    x = np.random.default_rng(0).choice(4, p=[0.1, 0.2, 0.3, 0.4], size=(4000, 1)) * 2.0 + 5.0
    density = CDMDensity(**QUICK).fit(x)
    probability = 2.0 * np.exp(density.score_samples([[5.0], [7.0], [9.0], [11.0]]))
    np.testing.assert_allclose(probability, [0.1, 0.2, 0.3, 0.4], atol=0.06)
    assert set(np.unique(density.sample(200))) <= set(np.arange(3.0, 15.0, 2.0))


def shifted(num, seed):
    """Rows of N(0, I) and of N(1, I) in 3 dimensions: the log ratio is sum(x) - 3/2."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, 3)), 1.0 + rng.normal(size=(2 * num, 3))


def test_log_ratio_of_two_gaussians_whatever_their_numbers():
    low, high = shifted(3000, seed=0)
    x, y = np.concatenate([low, high]), np.repeat([0, 1], [len(low), len(high)])
    ratio = DensityRatio(**QUICK).fit(x, y)
    new = np.concatenate(shifted(300, seed=1))
    exact = new.sum(1) - 1.5
    error = ratio.log_ratio(new) - exact
    assert np.abs(error).mean() < 0.12 * np.abs(exact).mean()
    by_sets = log_density_ratio(high, low, **QUICK)
    np.testing.assert_array_equal(by_sets(new), ratio.log_ratio(new))


@pytest.mark.parametrize("reference", ["shuffled", "normal"])
def test_mutual_information_of_correlated_normals(reference):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8000, 2))
    y = 0.8 * x + 0.6 * rng.normal(size=(8000, 2))
    found = MutualInformation(reference=reference, **QUICK).fit(x, y)
    exact = -math.log(1 - 0.8**2)  # of two pairs, each -log(1 - rho^2)/2
    assert found.mutual_information_ == pytest.approx(exact, abs=0.1)
    low, high = found.confidence_interval_
    spread = math.sqrt(2 * 0.8**2 / 8000)  # variance rho^2 a pair, over all rows: each is held out once
    assert low < found.mutual_information_ < high
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_mutual_information_of_independent_columns_is_zero():
    x = np.random.default_rng(0).normal(size=(6000, 3))
    found = MutualInformation(**QUICK).fit(x[:, :2], x[:, 2])
    assert abs(found.mutual_information_) < 0.05


def test_mutual_information_with_a_discrete_variable():
    """y in {0, 1}, equally likely, x = y + noise: the entropy of x, by quadrature, less the noise's."""
    rng, sigma = np.random.default_rng(0), 0.4
    y = rng.integers(0, 2, size=6000)
    x = (y + sigma * rng.normal(size=6000))[:, None]
    grid = np.linspace(-4, 5, 9001)
    bells = np.exp(-0.5 * ((grid[:, None] - [0, 1]) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    density = bells.mean(1)
    exact = -(density * np.log(density)).sum() * 1e-3 - math.log(sigma * math.sqrt(2 * math.pi * math.e))
    more = {**QUICK, "hidden": 64, "depth": 2, "max_iter": 1000, "learning_rate": 5e-3}
    assert MutualInformation(**more).fit(x, y).mutual_information_ == pytest.approx(exact, abs=0.06)


def test_increasing_maps_of_columns_change_nothing():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2))
    y = x[:, :1] + rng.normal(size=(500, 1))
    plain = MutualInformation(**SMALL, random_state=3).fit(x, y)
    cubed = MutualInformation(**SMALL, random_state=3).fit(x**3, np.sign(y) * np.abs(y) ** 1.5)
    assert plain.mutual_information_ == cubed.mutual_information_


def test_a_seed_fixes_the_result_and_nothing_is_printed(capsys):
    x, _ = gaussian(300)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    fits = [CDMDensity(**SMALL, random_state=seed).fit(x) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    same, again, other = (fit.score_samples(x[:5]) for fit in fits)
    assert (same == again).all() and (same != other).any()
    np.testing.assert_array_equal(fits[0].sample(3), fits[1].sample(3))
    assert (fits[0].sample(3, random_state=1) != fits[0].sample(3)).any()
    assert capsys.readouterr() == ("", "")
    CDMDensity(**{**SMALL, "max_iter": 20}, verbose=1).fit(x)
    assert capsys.readouterr().err.count("\n") == 2  # one judgement of each network


def test_whitening_is_an_exact_change_of_variables():
    x, _ = gaussian(1000)
    columns = measure(x)
    z = columns.standardise(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(2).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.T.cov(correction=0), torch.eye(2).double(), atol=1e-9, rtol=0)
    np.testing.assert_allclose(columns.restore(z), x)
    assert columns.log_det == pytest.approx(-0.5 * np.linalg.slogdet(np.cov(x.T, bias=True))[1])


def test_normal_scores_are_quantiles_and_break_ties_at_random():
    x = np.array([[3.0, 1.0], [1.0, 1.0], [2.0, 1.0], [9.0, 0.0]])
    scores = normal_scores(x, np.random.default_rng(0))
    quantiles = torch.special.ndtri(torch.tensor([1, 3, 5, 7]).double() / 8)
    torch.testing.assert_close(scores[:, 0], quantiles[[2, 0, 1, 3]])
    torch.testing.assert_close(scores[:, 1].sort().values, quantiles)
    orders = {tuple(normal_scores(x, np.random.default_rng(i))[:3, 1].tolist()) for i in range(20)}
    assert len(orders) > 1


def test_values_repeated_off_any_grid_are_spread_halfway_to_their_neighbours():
    rng = np.random.default_rng(0)
    values, shares = np.array([0.0, 1.0, math.pi]), np.array([0.2, 0.5, 0.3])
    x = np.c_[rng.choice(values, 3000, p=shares), rng.normal(size=3000)]
    with pytest.warns(UserWarning, match=r"column 0 of X repeats values \(3 distinct ones in 3000 rows\)"):
        columns = measure(x)
    half = (1 + math.pi) / 2
    np.testing.assert_allclose(columns.cells[0].low, [-0.5, 0.5, half])
    np.testing.assert_allclose(columns.cells[0].high, [0.5, half, 2 * math.pi - half])
    z = columns.standardise(x)
    drawn = columns.draw(z, torch.arange(3000), torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn.T.cov(), torch.eye(2).double(), atol=0.1, rtol=0)
    np.testing.assert_allclose(columns.restore(drawn)[:, 0], x[:, 0])
    spread = columns.dequantise(x, torch.Generator().manual_seed(0))
    assert (spread[:, 1] == x[:, 1]).all()
    for value, low, high in zip(values, columns.cells[0].low, columns.cells[0].high, strict=True):
        of_value = spread[x[:, 0] == value, 0]
        assert low <= of_value.min() < low + 0.05 and high - 0.05 < of_value.max() <= high


@pytest.mark.parametrize("beside", [True, False], ids=["beside a normal column", "the only column"])
def test_a_value_repeated_among_continuous_ones_is_all_that_is_spread(beside):
    rng = np.random.default_rng(0)
    x = np.c_[np.where(rng.random(400) < 0.3, 0.0, rng.normal(5.0, 1.0, 400)), rng.normal(size=400)]
    x = x[:, : 1 + beside]
    with pytest.warns(UserWarning, match="column 0 of X repeats values"):
        columns = measure(x)
    assert columns.cells[0].values.tolist() == [0.0]
    spread = columns.dequantise(x, torch.Generator().manual_seed(0))
    assert ((spread == x).all(1) == (x[:, 0] != 0)).all()


@pytest.mark.parametrize("beside", [True, False], ids=["beside a normal column", "the only column"])
def test_the_density_over_the_interval_of_a_repeated_value_is_its_probability(beside):
    rng = np.random.default_rng(0)
    values, shares = np.array([0.0, 1.0, math.pi]), np.array([0.2, 0.5, 0.3])
    x = rng.permutation(np.repeat(values, [400, 1000, 600]))[:, None]
    x = np.c_[x, rng.normal(size=2000)] if beside else x
    with pytest.warns(UserWarning, match="column 0 of X repeats"):
        density = CDMDensity(max_iter=300, cv=2, random_state=0).fit(x)
    edges = np.array([-0.5, 0.5, (1 + math.pi) / 2, (3 * math.pi - 1) / 2])
    across = (np.arange(20) + 0.5) / 20
    y = np.linspace(-4, 4, 33) if beside else np.zeros(1)
    for low, high, share in zip(edges[:-1], edges[1:], shares, strict=True):
        points = np.array([(low + (high - low) * u, v) for u in across for v in y])
        mean = np.exp(density.score_samples(points[:, : x.shape[1]])).mean()
        assert mean * (high - low) * (8 * 33 / 32 if beside else 1) == pytest.approx(share, rel=0.1)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3))


@pytest.mark.parametrize(
    ("fit", "told"),
    [
        (lambda: CDMDensity().fit(np.c_[X, np.ones(60)]), "column 3 of X is constant"),
        (lambda: CDMDensity().fit(np.c_[X, X[:, 0] - 2 * X[:, 1]]), "depends linearly on the others"),
        (lambda: CDMDensity().fit(np.where(X > 2, np.nan, X)), "NaN"),
        (lambda: CDMDensity(max_iter=0).fit(X), "max_iter is 0"),
        (lambda: CDMDensity(level_weight=-1).fit(X), "level_weight is -1"),
        (lambda: CDMDensity(batch_size=10**9).fit(X), "batch_size is 1000000000"),
        (lambda: CDMDensity(hidden=1.5).fit(X), "hidden is 1.5"),
        (lambda: CDMDensity(smallest_noise=1.0).fit(X), "smallest_noise is 1.0"),
        (lambda: CDMDensity(**SMALL).fit(X).sample(0), "n_samples is 0"),
        (lambda: DensityRatio().fit(X, np.arange(60) % 3), "y holds 3 classes"),
        (lambda: DensityRatio().fit(X, np.zeros(60)), "y holds 1 class."),
        (lambda: log_density_ratio(X, X[:, :2]), "X_numerator has 3 columns and X_denominator 2"),
        (lambda: MutualInformation().fit(X, np.ones(60)), "column 0 of y is constant"),
        (lambda: MutualInformation().fit(X, X[:50]), "inconsistent numbers of samples"),
        (lambda: MutualInformation(test_size=1.0).fit(X, X), "test_size is 1.0"),
        (lambda: MutualInformation(reference="none").fit(X, X), "unknown reference"),
    ],
)
def test_what_has_no_density_is_refused_with_its_reason(fit, told):
    with pytest.raises(ValueError, match=told):
        fit()


def test_fewer_rows_than_columns_and_copied_rows_are_warned_of():
    with pytest.warns(UserWarning, match="20 rows of 30 columns"):
        wide = CDMDensity(**SMALL).fit(RNG.normal(size=(20, 30)))
    assert np.isfinite(wide.score_samples(RNG.normal(size=(4, 30)))).all()
    with pytest.warns(UserWarning, match="60 of the 120 rows of X are copies"):
        CDMDensity(**SMALL).fit(np.concatenate([X, X]))


def test_importing_the_package_does_not_import_scikit_learn():
    script = (
        "import cdm_fast, sys\n"
        "assert 'sklearn' not in sys.modules\n"
        "cdm_fast.CDMDensity\n"
        "assert 'sklearn' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_copies_are_rows_that_are_equal_without_a_reason():
    rng = np.random.default_rng(0)
    continuous = rng.normal(size=(50, 2))
    assert (copies(continuous) < 50).all() and copies(continuous).max() == 49
    twice = np.concatenate([continuous, continuous])
    assert copies(twice).max() == 49 and (copies(twice)[:50] == copies(twice)[50:]).all()
    dry = np.concatenate([twice, np.zeros((20, 2))])  # as 20 days without rain, of 120
    assert copies(dry).max() == 69 and len(np.unique(copies(dry)[100:])) == 20
    assert copies(rng.integers(0, 3, (100, 2)).astype(float)).max() == 99
    assert copies(rng.choice([0, 1, math.pi], (100, 1))).max() == 99


def test_copies_stay_on_one_side_of_a_split_and_make_no_information():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 1)), rng.normal(size=100)
    with pytest.warns(UserWarning, match="1900 of the 2000 rows .* are copies"):
        found = MutualInformation(max_iter=300, random_state=0).fit(np.repeat(x, 20, 0), np.repeat(y, 20))
    assert found.confidence_interval_.low <= 0 <= found.confidence_interval_.high


def test_many_independent_columns_and_few_rows_read_zero():
    x, y = np.random.default_rng(0).normal(size=(2, 1000, 50))
    with pytest.warns(UserWarning, match="1000 different rows for 100 columns are few"):
        found = MutualInformation(max_iter=200, random_state=0).fit(x, y)
    assert abs(found.estimate_) < 0.05 and found.mutual_information_ >= 0
    assert found.confidence_interval_.low <= 0 <= found.confidence_interval_.high


def test_a_diverging_fit_keeps_the_weights_it_started_from_and_without_validation_scores_nan():
    x = np.random.default_rng(0).normal(size=(300, 3))
    settings = {"max_iter": 100, "cv": 2, "hidden": 16, "learning_rate": 10.0, "random_state": 0}
    assert CDMDensity(**settings).fit(x).score(x) == pytest.approx(-4.26, abs=0.3)
    with pytest.warns(UserWarning, match="density's integral"):
        assert math.isnan(CDMDensity(**settings, early_stopping=False).fit(x).score(x))


def test_ambient_torch_state_changes_nothing():
    x = np.random.default_rng(0).normal(size=(60, 2))
    expected = CDMDensity(**SMALL, random_state=0).fit(x).score(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert CDMDensity(**SMALL, random_state=0).fit(x).score(x) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert CDMDensity(**SMALL, random_state=0).fit(x).score(x) == expected


def test_threads_give_what_one_gives():
    x = np.random.default_rng(0).normal(size=(50, 3))
    fits = Parallel(8, backend="threading")(
        delayed(lambda: CDMDensity(**SMALL, random_state=0).fit(x).score(x))() for _ in range(16)
    )
    assert len(set(fits)) == 1


def test_far_rows_are_left_out_with_a_warning_and_score_low():
    x = np.r_[np.random.default_rng(0).normal(size=(1000, 1)), [[1e6]]]
    with pytest.warns(UserWarning, match="row 1000"):
        density = CDMDensity(max_iter=100, random_state=0).fit(x)
    assert density.score(x[:-1]) == pytest.approx(-1.42, abs=0.1)
    assert density.score_samples([[1e6]])[0] < -1000 and np.isfinite(density.score_samples([[1e300]])).all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_columns_of_any_scale(scale):
    x = np.random.default_rng(0).normal(size=(200, 2))
    plain, scaled = (CDMDensity(**SMALL, random_state=0).fit(x * by) for by in (1.0, scale))
    assert scaled.score(x * scale) == pytest.approx(plain.score(x) - 2 * math.log(scale), abs=0.1)


@pytest.mark.parametrize("load", [load_iris, load_wine, load_diabetes, load_breast_cancer])
def test_tables_of_scikit_learn_are_accepted_raw(load):
    x = load().data
    assert np.isfinite(CDMDensity(**SMALL, random_state=0).fit(x).score(x))


def test_joint_rows_against_permuted_ones_are_accepted():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 1))
    joint = np.hstack([x, x + rng.normal(size=(400, 1))])
    product = np.hstack([x, rng.permutation(joint[:, 1:])])
    ratio = DensityRatio(max_iter=100, random_state=0).fit(np.r_[joint, product], np.repeat([1, 0], 400))
    assert ratio.two_sample_test(99).p_value < 0.05


def test_columns_are_matched_by_name():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    a, b = (pandas.DataFrame(rng.normal(size=(300, 2)) + [0, 5], columns=["age", "weight"]) for _ in "ab")
    plain = log_density_ratio(a, b, **SMALL, random_state=0)
    turned = log_density_ratio(a, b[["weight", "age"]], **SMALL, random_state=0)
    np.testing.assert_array_equal(plain(a), turned(a[["weight", "age"]]))
    with pytest.raises(ValueError, match="different columns: age, years"):
        log_density_ratio(a, b.rename(columns={"age": "years"}), **SMALL)


def test_weights_have_mean_one_and_are_clipped():
    low, high = shifted(400, seed=0)
    ratio = DensityRatio(**SMALL, random_state=0).fit(np.r_[low, high], np.repeat([0, 1], [400, 800]))
    weights = ratio.weights(low)
    clipped = ratio.weights(low, clip=3.0)
    assert weights.mean() == pytest.approx(1) and clipped.mean() == pytest.approx(1)
    assert weights.max() > 3 >= clipped.max() - 1e-9
    assert effective_sample_size(clipped) > effective_sample_size(weights)


def test_outliers_and_their_p_values():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    density = CDMDensity(max_iter=100, contamination=0.05, random_state=0).fit(x)
    assert (density.predict(x) == -1).mean() == pytest.approx(0.05, abs=0.01)
    assert (density.predict(10 + x[:20]) == -1).all()
    assert density.p_values(rng.normal(size=(1000, 2))).mean() == pytest.approx(0.5, abs=0.06)
    assert density.p_values([[10.0, 10.0]])[0] == pytest.approx(1 / 301)
