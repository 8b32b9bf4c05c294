"""The experts that `MutualInformation` combines with its networks, and their weights."""

import math

import numpy as np
import pytest
from scipy.special import digamma
from scipy.stats import multivariate_t, t

from cdm_fast.tables import MutualInformation
from cdm_fast.tables.calibration import calibrate, offset
from cdm_fast.tables.columns import normal_scores
from cdm_fast.tables.experts import Neighbours, StudentCopula, experts, student_quantiles


def test_neighbours_are_those_counted_by_hand():
    """KSG's eq. 8 of one row after another, k = 5."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)), rng.normal(size=(40, 1))
    rows = np.concatenate([x, y], axis=1)
    new = rng.normal(size=(6, 3))
    expert = Neighbours(rows, 2)
    for z, found in zip(new, expert(new), strict=True):
        within = np.sort(np.abs(rows - z).max(1))[4]
        counts = [int((np.abs(rows - z)[:, part].max(1) < within).sum()) for part in ([0, 1], [2])]
        exact = digamma(5) + digamma(40) - sum(digamma(count + 1) for count in counts)
        assert found == pytest.approx(exact)
    for i, found in enumerate(expert(rows, own=True)):
        rest = np.delete(rows, i, axis=0)
        assert found == pytest.approx(Neighbours(rest, 2)(rows[i : i + 1])[0])


@pytest.mark.parametrize("degrees", [1.0, 3.0, 40.0])
def test_quantiles_of_a_student_come_from_a_fine_enough_table(degrees):
    scores = np.linspace(-5, 5, 1001)
    exact = t(degrees).isf(np.exp(np.log(0.5) + np.log1p(-np.vectorize(math.erf)(scores / math.sqrt(2)))))
    np.testing.assert_allclose(student_quantiles(scores, degrees), exact, rtol=1e-4, atol=1e-6)


def test_the_copula_of_a_student_is_found_with_its_degrees_of_freedom():
    shape = np.array([[1.0, 0.0, 0.6], [0.0, 1.0, 0.0], [0.6, 0.0, 1.0]])
    rows = multivariate_t(shape=shape, df=3, seed=0).rvs(4000)
    scores = normal_scores(rows, np.random.default_rng(0)).numpy()
    copula = StudentCopula(scores, 2)
    assert copula.degrees in (2.0, 3.0, 4.0)
    exact = multivariate_t(shape=shape, df=3).logpdf(rows)
    exact -= multivariate_t(shape=shape[:2, :2], df=3).logpdf(rows[:, :2]) + t(3).logpdf(rows[:, 2])
    assert copula(scores).mean() == pytest.approx(exact.mean(), abs=0.03)
    assert np.abs(copula(scores) - exact).mean() < 0.1


def test_normal_rows_have_the_most_degrees_of_freedom():
    rows = np.random.default_rng(0).normal(size=(2000, 4))
    assert StudentCopula(rows, 2).degrees == 40.0


def test_many_rows_or_columns_have_no_neighbours():
    rows = np.random.default_rng(0).normal(size=(100, 21))
    assert [type(o) for o in experts(rows, 10, 100)] == [StudentCopula]
    assert [type(o) for o in experts(rows[:, :20], 10, 100)] == [StudentCopula, Neighbours]
    assert experts(rows, 10, 20_001) == []


def logits(num, seed=0):
    """(numerator (num,), denominator (num,)) log ratios of N(1, 1) to N(0, 1) on rows of each."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=num) + 0.5, rng.normal(size=num) - 0.5


def test_the_better_of_two_experts_gets_the_weight():
    numerator, denominator = logits(20_000)
    rng = np.random.default_rng(1)
    noise = [rng.normal(size=20_000) for _ in range(2)]
    found = calibrate(np.stack([noise[0], 2 * numerator]), np.stack([noise[1], 2 * denominator]))
    np.testing.assert_allclose(found.alpha, [0.0, 0.5], atol=0.03)
    assert found.c == pytest.approx(0, abs=0.03)
    np.testing.assert_allclose(found(noise[0], 2 * numerator), numerator, atol=0.25)


def test_an_expert_of_the_wrong_sign_is_left_out():
    numerator, denominator = logits(2000)
    turned = logits(2000, seed=1)[::-1]
    both = calibrate(np.stack([numerator, turned[0]]), np.stack([denominator, turned[1]]))
    assert both.alpha[1] == 0
    assert both.alpha[0] == pytest.approx(calibrate(numerator, denominator).alpha[0])
    nothing = calibrate(-numerator, -denominator)
    assert nothing.alpha == (0.0,) and nothing.c == 0


def test_the_offset_of_a_network_is_found_where_the_rows_tell_it():
    numerator, denominator = logits(20_000)
    assert offset(numerator - 2, denominator - 2) == pytest.approx(2, abs=0.03)


def test_rows_far_apart_move_no_offset():
    """40 nats apart, the loss is flat: N(40, 80) against N(-40, 80) are right as they are."""
    rng = np.random.default_rng(0)
    numerator, denominator = (
        40 + np.sqrt(80) * rng.normal(size=5000),
        -40 + np.sqrt(80) * rng.normal(size=5000),
    )
    assert abs(offset(numerator, denominator - 20)) < 0.3


def test_few_misjudged_rows_hardly_calibrate():
    """N(24, 48) and N(-24, 48) are right as they are, and three rows of 10,000 lie on the wrong side.

    Regression alone moves the mean by 0.37 nats (root mean square).
    """
    rng = np.random.default_rng(0)
    moved = []
    for _ in range(8):
        numerator, denominator, unseen = (
            mean + np.sqrt(48) * rng.normal(size=10_000) for mean in (24, -24, 24)
        )
        moved.append((calibrate(numerator, denominator)(unseen) - unseen).mean())
    assert np.sqrt(np.mean(np.square(moved))) < 0.15


def test_weights_count_as_copies():
    numerator, denominator = logits(200)
    weight = 1.0 + np.arange(200) % 3
    weighted = calibrate(numerator, denominator, weight, weight)
    copied = calibrate(*(np.repeat(part, weight.astype(int)) for part in (numerator, denominator)))
    assert weighted.alpha[0] == pytest.approx(copied.alpha[0], abs=2e-3)
    assert weighted.c == pytest.approx(copied.c, abs=2e-3)


def test_a_sharp_edge_is_seen_by_neighbours_and_its_interval_holds_the_truth():
    """X uniform on (0, 1), Y = X + U(-0.1, 0.1): I = 0.1 - log(0.2) = 1.71 nats, and few steps miss it."""
    rng = np.random.default_rng(0)
    x = rng.random(800)
    y = x + rng.uniform(-0.1, 0.1, 800)
    found = MutualInformation(max_iter=100, random_state=0).fit(x[:, None], y)
    exact = 0.1 - math.log(0.2)
    assert found.missed_ > 0.1 and max(c.alpha[2] for c in found.calibrations_) > 0.2
    assert found.confidence_interval_.low < exact < found.confidence_interval_.high
    assert found.estimate_ == pytest.approx(exact, abs=0.2)


def test_heavy_tails_without_correlation_are_seen_by_the_copula():
    """A Cauchy of two columns: I = log(8 pi) - 3 = 0.2242 nats."""
    rows = multivariate_t(shape=np.eye(2), df=1, seed=1).rvs(2000)
    found = MutualInformation(max_iter=50, random_state=0).fit(rows[:, :1], rows[:, 1])
    assert found.confidence_interval_.low < 0.2242 < found.confidence_interval_.high
    assert found.estimate_ == pytest.approx(0.2242, abs=0.06)
