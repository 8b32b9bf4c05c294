"""The networks of tables: gates of squared features, and training that resumes from its best weights."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cdm_fast import MutualInformation
from cdm_fast.tables import pairs
from cdm_fast.tables.crossfit import FEW_COLUMNS, GATES, train_ratio
from cdm_fast.tables.fit import CUT, SEPARABLE, Budget, ClassValidation, train
from cdm_fast.tables.network import LengthGates, new_model, start_at_gaussians, table_network
from tests.test_table_mixture import SCHEDULE, assert_gradient_after_change

GROUPS = [2, 3]
DIM = sum(GROUPS)
BUDGET = Budget(
    hidden=8,
    depth=1,
    num_levels=8,
    max_iter=2000,
    batch_size=64,
    learning_rate=1e-2,
    alpha=0.0,
    tol=1e-4,
    n_iter_no_change=2,
    verbose=0,
)


def _model(gates):
    generator = torch.Generator().manual_seed(0)
    model = new_model(GROUPS, SCHEDULE, 16, 1, 2 * DIM, 2, None, generator, gates=gates)
    eye = torch.eye(DIM, dtype=torch.float64)
    start_at_gaussians(model, torch.zeros(2, DIM, dtype=torch.float64), torch.stack([eye, 2 * eye]))
    return model.double().eval()


def test_gates_change_nothing_at_the_start():
    x = torch.randn(20, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gated, plain = _model(gates=4), _model(gates=0)
    assert table_network(plain).gates is None
    torch.testing.assert_close(gated.log_prob_classes(x), plain.log_prob_classes(x))


def test_the_adjoint_of_a_gated_network_is_its_gradient():
    assert_gradient_after_change(_model(gates=4), DIM)


def test_the_adjoint_of_gates_is_their_gradient():
    gates = LengthGates(2, 4, 6).double()
    lengths = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 6, dtype=torch.float64)
    factors, residuals = gates(lengths)
    (gradient,) = torch.autograd.grad(factors, lengths, g)
    torch.testing.assert_close(gates.adjoint(residuals, g), gradient)


def test_the_scale_is_that_of_the_first_layer_alone():
    networks = []
    for scale in (1.0, 4.0):
        generator = torch.Generator().manual_seed(0)
        model = new_model(GROUPS, SCHEDULE, 16, 1, 2 * DIM, 2, None, generator, input_scale=scale)
        networks.append(dict(table_network(model).named_parameters()))
    for name, value in networks[0].items():
        factor = 4 if name.startswith("linear_in.") else 1
        torch.testing.assert_close(networks[1][name], factor * value, rtol=0, atol=0)


def test_with_the_scale_of_two_columns_edges_are_learned_sooner(monkeypatch):
    """Y = X + U(-0.1, 0.1) with X ~ U(0, 1): a narrow band, I = 1.71 nats."""
    rng = np.random.default_rng(0)
    X = rng.uniform(size=2000)
    Y = X + rng.uniform(-0.1, 0.1, size=2000)
    truth = 0.1 + np.log(1 / 0.2)
    few = {"max_iter": 150, "early_stopping": False, "test_size": 0.5, "random_state": 0}
    alone = []
    for scale in (pairs.INPUT_SCALE, {}):
        monkeypatch.setattr(pairs, "INPUT_SCALE", scale)
        monkeypatch.setattr(pairs, "experts", lambda *_: [])
        alone.append(MutualInformation(**few).fit(X[:, None], Y).held_out_)
    assert alone[1] + 0.05 < alone[0] < truth


@pytest.mark.parametrize("columns", [FEW_COLUMNS - 1, FEW_COLUMNS])
def test_ratios_of_many_columns_have_gates(columns):
    rows = torch.randn(2, 200, columns + 1, generator=torch.Generator().manual_seed(0))

    def draw(num, generator):
        label = torch.arange(num) % 2
        return rows[label, torch.randint(200, (num,), generator=generator)], label

    eye = torch.eye(columns + 1, dtype=torch.float64).expand(2, -1, -1)
    means = torch.zeros(2, columns + 1, dtype=torch.float64)
    budget = replace(BUDGET, max_iter=1)
    model, _ = train_ratio(draw, None, means, eye, [columns, 1], budget, 200, 0)
    gates = table_network(model).gates
    assert gates is None if columns + 1 <= FEW_COLUMNS else gates.linear_in.out_features == GATES


class Weight(torch.nn.Module):
    """One parameter, whose gradient is 1."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.network.weight)

    @property
    def value(self):
        return self.network.weight.item()


def _trained(validate, cuts):
    model = Weight()
    history = train(
        model, lambda m, _: m.network.weight.sum(), validate, BUDGET, torch.Generator(), 50 * 64, cuts
    )
    return model.value, history


@pytest.mark.parametrize("cuts", [0, 1, 2])
def test_training_ends_after_the_rate_was_cut_and_nothing_improved(cuts):
    end, history = _trained(lambda model: 1.0, cuts)
    assert history.n_iter == (cuts + 1) * BUDGET.n_iter_no_change * 50
    assert (end, history.best_iter) == (0.0, 0)


def test_training_does_not_resume_where_two_sets_are_almost_separable():
    _, history = _trained(lambda model: 0.5 * SEPARABLE, 2)
    assert history.n_iter == BUDGET.n_iter_no_change * 50


@pytest.mark.parametrize(
    ("initial", "later", "kept"), [(0.01, 0.005, 0), (0.01, 0.002, 50), (0.5, 0.499, 50), (0.5, 0.51, 0)]
)
def test_almost_separable_sets_want_a_lower_loss_than_chance_brings(initial, later, kept):
    """200 validation rows: the standard error of a loss of 0.01 is 0.007."""

    class Told(ClassValidation):
        def __call__(self, model):
            return later if model.value else initial

    rows = torch.zeros(100, 1)
    end, history = _trained(Told(rows, rows), 0)
    assert history.best_iter == kept and bool(end) == bool(kept)
    assert Told(rows, rows).margin(0.01) == pytest.approx(math.sqrt(0.01 / 200))


def test_training_resumes_from_the_best_weights_with_smaller_steps():
    seen = []

    def validate(model):
        seen.append(model.value)
        return 1 + abs(model.value + 0.02)

    end, history = _trained(validate, 1)
    best = min(range(3), key=lambda k: abs(seen[k] + 0.02))  # the weight falls past its optimum at once
    assert seen[2] < seen[1] < -0.02 and best == 0
    assert abs(seen[3]) < abs(seen[1]) / 2  # from the best weights again
    assert abs(seen[4] - seen[3]) < 1.5 * CUT * abs(seen[2] - seen[1])
    assert abs(end + 0.02) == min(abs(value + 0.02) for value in seen)
    assert history.n_iter > 3 * 50
