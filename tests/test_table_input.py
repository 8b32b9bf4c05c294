"""Valid and invalid tables, and compatibility of the estimators with scikit-learn's tools."""

import pickle

import joblib
import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cdm_fast.tables import CDMDensity, DensityRatio, MutualInformation, log_density_ratio

SMALL = {
    "max_iter": 3,
    "hidden": 8,
    "depth": 1,
    "num_levels": 6,
    "batch_size": 16,
    "cv": 2,
    "random_state": 0,
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3))
Y = np.arange(60) % 2
NOISE = RNG.normal(size=60)


def fitted(name, x=X, **more):
    """(a fitted estimator, its figures on rows x)."""
    if name == "density":
        density = CDMDensity(**SMALL).fit(x, **more)
        return density, density.score_samples(x)
    if name == "ratio":
        ratio = DensityRatio(**SMALL).fit(x, Y, **more)
        return ratio, ratio.log_ratio(x)
    information = MutualInformation(**SMALL).fit(x, X[:, 0] + NOISE)
    return information, np.array([information.estimate_])


NAMES = ["density", "ratio", "information"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frames_give_what_arrays_give_and_their_names(library, name):
    frames = pytest.importorskip(library)
    frame = frames.DataFrame({column: X[:, j] for j, column in enumerate(["age", "height", "weight"])})
    estimator, found = fitted(name, frame)
    np.testing.assert_array_equal(found, fitted(name)[1])
    assert list(estimator.feature_names_in_) == ["age", "height", "weight"]
    if name != "information":
        score = estimator.score_samples if name == "density" else estimator.log_ratio
        with pytest.raises(ValueError, match="feature names"):
            score(frame[["weight", "age", "height"]])


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_sets_with_named_columns_are_matched_by_name(library):
    frames = pytest.importorskip(library)
    a, b = (frames.DataFrame({"age": rows[:, 0], "weight": rows[:, 1] + 5}) for rows in (X, X[::-1]))
    plain = log_density_ratio(a, b, **SMALL)
    turned = log_density_ratio(a, b[["weight", "age"]], **SMALL)
    np.testing.assert_array_equal(plain(a), turned(a[["weight", "age"]]))
    renamed = b.rename({"age": "years"}) if library == "polars" else b.rename(columns={"age": "years"})
    with pytest.raises(ValueError, match="different columns: age, years"):
        log_density_ratio(a, renamed, **SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_integer_and_float32_columns(name):
    whole = RNG.integers(0, 50, size=(60, 3))
    np.testing.assert_array_equal(fitted(name, whole)[1], fitted(name, whole.astype(float))[1])
    half = X.astype(np.float32)
    np.testing.assert_allclose(fitted(name, half)[1], fitted(name, half.astype(float))[1])


@pytest.mark.parametrize("name", NAMES)
def test_nullable_columns_are_taken_where_nothing_is_missing(name):
    pandas = pytest.importorskip("pandas")
    whole = RNG.integers(0, 50, size=(60, 3))
    frame = pandas.DataFrame(
        {
            "a": pandas.array(whole[:, 0], dtype="Int64"),
            "b": pandas.array(whole[:, 1] / 4, dtype="Float64"),
            "c": whole[:, 2],
        }
    )
    np.testing.assert_array_equal(fitted(name, frame)[1], fitted(name, frame.to_numpy(dtype=float))[1])
    frame.loc[0, "a"] = pandas.NA
    with pytest.raises(ValueError, match="NaN"):
        fitted(name, frame)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
def test_sparse_tables_are_refused_in_words(name, kind):
    with pytest.raises(TypeError, match="[Ss]parse data was passed.* dense"):
        fitted(name, kind(X))


@pytest.mark.parametrize("name", NAMES)
def test_pickles_and_joblib_files_score_alike(name, tmp_path):
    estimator, found = fitted(name)
    joblib.dump(estimator, tmp_path / "estimator.joblib")
    for again in (pickle.loads(pickle.dumps(estimator)), joblib.load(tmp_path / "estimator.joblib")):
        if name == "density":
            np.testing.assert_array_equal(again.score_samples(X), found)
            np.testing.assert_array_equal(again.sample(3), estimator.sample(3))
        elif name == "ratio":
            np.testing.assert_array_equal(again.log_ratio(X), found)
        else:
            assert again.confidence_interval_ == estimator.confidence_interval_


@pytest.mark.parametrize("name", NAMES)
def test_a_clone_is_unfitted_and_fits_alike(name):
    estimator, _ = fitted(name)
    again = clone(estimator)
    assert again.get_params() == estimator.get_params() and not hasattr(again, "n_iter_")


def test_pipelines_score_and_sample():
    pipeline = make_pipeline(StandardScaler(), CDMDensity(**SMALL)).fit(X)
    assert pipeline.score_samples(X).shape == (60,) and np.isfinite(pipeline.score(X))
    ratio = make_pipeline(StandardScaler(), DensityRatio(**SMALL)).fit(X, Y)
    assert np.isfinite(ratio.score(X, Y)) and set(ratio.predict(X)) <= {0, 1}


def test_transformers_that_give_data_frames_go_before_an_estimator():
    pytest.importorskip("pandas")
    scaler = StandardScaler().set_output(transform="pandas")
    pipeline = make_pipeline(scaler, CDMDensity(**SMALL)).fit(X)
    assert list(pipeline[-1].feature_names_in_) == ["x0", "x1", "x2"]


def test_a_grid_search_over_the_learning_rate_picks_no_diverged_density():
    """The rate 10 diverges without early stopping; its score is NaN, which a search never picks."""
    x = np.random.default_rng(0).normal(size=(300, 3))
    grid = {"learning_rate": [3e-3, 10.0]}
    density = CDMDensity(**{**SMALL, "max_iter": 100}, early_stopping=False)
    with pytest.warns(UserWarning, match="density's integral"):
        search = GridSearchCV(density, grid, cv=2).fit(x)
    assert search.best_params_ == {"learning_rate": 3e-3}
    assert search.best_score_ == pytest.approx(-4.26, abs=0.4)
    assert np.isnan(search.cv_results_["mean_test_score"][1])


def test_a_grid_search_over_a_ratio_finds_the_capacity_that_it_needs():
    """One step leaves a ring against a disc unseen."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    y = np.arange(400) % 2
    x[y == 1] *= 2.0 / np.linalg.norm(x[y == 1], axis=1, keepdims=True)
    search = GridSearchCV(DensityRatio(**{**SMALL, "learning_rate": 1e-2}), {"max_iter": [1, 150]}, cv=2)
    assert search.fit(x, y).best_params_ == {"max_iter": 150}
    assert 0 < search.best_score_ < np.log(2)


def test_score_of_a_ratio_is_its_loss_below_that_of_knowing_nothing():
    ratio = DensityRatio(**SMALL).fit(X, Y)
    log_ratio, weight = ratio.log_ratio(X), 1.0 + np.arange(60) % 3
    loss = [np.logaddexp(0, log_ratio[Y == 0]), np.logaddexp(0, -log_ratio[Y == 1])]
    assert ratio.score(X, Y) == pytest.approx(np.log(2) - (loss[0].mean() + loss[1].mean()) / 2)
    each = [np.average(part, weights=weight[c == Y]) for c, part in enumerate(loss)]
    assert ratio.score(X, Y, weight) == pytest.approx(np.log(2) - np.mean(each))
    np.testing.assert_allclose(
        np.log(ratio.predict_proba(X) @ [-1, 1] / 2 + 0.5), -np.logaddexp(0, -log_ratio)
    )
    with pytest.raises(ValueError, match="rows of both"):
        ratio.score(X, np.zeros(60))


@pytest.mark.parametrize("name", ["density", "ratio"])
class TestSampleWeight:
    def test_rows_of_weight_zero_are_left_out(self, name):
        x, far = X.copy(), np.arange(60) >= 50
        x[far] += 30.0
        weight = np.where(far, 0.0, 1.0 + np.arange(60) % 3)
        weighted, _ = fitted(name, x, sample_weight=weight)
        np.testing.assert_allclose(weighted.columns_.centre, np.average(x, axis=0, weights=weight))

    def test_equal_weights_are_none(self, name):
        np.testing.assert_array_equal(fitted(name, sample_weight=np.full(60, 2.5))[1], fitted(name)[1])

    @pytest.mark.parametrize(
        ("bad", "told"),
        [
            (np.full(60, -1.0), "smallest sample_weight is -1"),
            (np.zeros(60), "non-zero"),
            (np.ones(50), "shape"),
        ],
        ids=["negative", "all-zero", "too-few"],
    )
    def test_bad_weights_are_refused(self, name, bad, told):
        with pytest.raises(ValueError, match=told):
            fitted(name, sample_weight=bad)


def test_weights_make_a_density_that_of_another_sample():
    """Rows of N(0, 1) weighted by exp(x - 1/2) stand for N(1, 1)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 1))
    density = CDMDensity(max_iter=150, cv=2, random_state=0).fit(x, sample_weight=np.exp(x[:, 0]))
    grid = np.linspace(-1, 3, 9)[:, None]
    exact = -((grid[:, 0] - 1) ** 2) / 2 - np.log(2 * np.pi) / 2
    assert np.abs(density.score_samples(grid) - exact).mean() < 0.2
    assert (density.predict(x) == -1) @ np.exp(x[:, 0]) / np.exp(x).sum() == pytest.approx(0.1, abs=0.02)
    assert density.p_values(1 + rng.normal(size=(800, 1))).mean() == pytest.approx(0.5, abs=0.06)


def test_weights_make_a_ratio_that_of_another_sample():
    """Both sets are of N(0, 1); the numerator's rows, weighted by exp(x), stand for N(1, 1)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3000, 1)), np.arange(3000) % 2
    weight = np.where(y == 1, np.exp(x[:, 0]), 1.0)
    ratio = DensityRatio(max_iter=150, cv=2, random_state=0).fit(x, y, sample_weight=weight)
    grid = np.linspace(-1, 2, 7)[:, None]
    np.testing.assert_allclose(ratio.log_ratio(grid), grid[:, 0] - 0.5, atol=0.25)
    with pytest.raises(ValueError, match="takes no sample_weight"):
        ratio.two_sample_test()
