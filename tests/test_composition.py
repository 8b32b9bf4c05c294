"""Products, mixtures and negations of densities whose composition has a closed form."""

import math

import pytest
import torch

from benchmarks.support.analytic import ExactNetwork, GaussianMixture, mixture, product, random_mixture
from cdm_fast import CDM, DDM, MLP, MLPDenoiser, NoiseSchedule, UserError, sample
from cdm_fast.evaluation.quality import two_sample_test
from cdm_fast.model.composition import Mixture, Product, negation
from cdm_fast.model.conditioned import OfClass
from cdm_fast.sampling import MALA
from tests.opaque import Opaque

SCHEDULE = NoiseSchedule.uniform(60)
A, B = random_mixture(2, 4, seed=1), random_mixture(2, 4, seed=7)
WIDE = GaussianMixture.gaussian(torch.tensor([0.3, -0.2]), 1.2 * torch.eye(2))


def exact_model(density):
    return CDM(ExactNetwork(density, SCHEDULE), SCHEDULE, input_shape=(density.dim,))


CASES = {
    "product": (Product([exact_model(A), exact_model(B)]), product(A, B)),
    "mixture": (Mixture([exact_model(A), exact_model(B)], [3, 7]), mixture(A, B, 0.3)),
    "negation": (negation(exact_model(A), exact_model(WIDE)), product(A, WIDE, -1.0)),
}
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_level_0_is_the_composition_and_the_last_is_noise(case):
    model, density = CASES[case]
    x = torch.randn(6, 2, dtype=torch.float64)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for level, (a, s) in {0: (one, zero), SCHEDULE.T + 1: (zero, one)}.items():
        difference = model.log_prob(x, level) - density.log_prob(x, a, s)[:, 0]
        torch.testing.assert_close(difference, difference[:1].expand(6))  # equal up to a constant
    if case == "mixture":  # even that is right, at every level
        torch.testing.assert_close(model.log_prob_levels(x), density.log_prob(x, SCHEDULE.a, SCHEDULE.s))


@every_case
def test_the_score_is_the_gradient(case):
    model, _ = CASES[case]
    level = torch.tensor([0, 1, 20, 40, 60, 61])
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(model.log_prob(x, level).sum(), x)
    torch.testing.assert_close(model.score(x.detach(), level), expected)
    wanted = -SCHEDULE.s[level][:, None] * expected
    torch.testing.assert_close(model.denoise(x.detach(), level), wanted)
    log_prob, _ = model.log_prob_levels_and_score(x.detach(), level)
    torch.testing.assert_close(log_prob, model.log_prob_levels(x.detach()))


def p_value(density, drawn):
    exact = density.sample(400, torch.Generator().manual_seed(2))
    return two_sample_test(drawn, exact, 499).p_value


@every_case
def test_samples_match_the_analytic_composition(case):
    """Two-sample test of level 5 % by 499 permutations."""
    model, density = CASES[case]
    assert p_value(density, sample(model, 400, MALA(moves=4), 20, seed=1, batch_size=400)) > 0.05


@pytest.mark.parametrize("case", ["product", "negation"])
def test_no_number_of_plain_steps_will_do(case):
    """What the test above would find out: DDIM through every level."""
    model, density = CASES[case]
    assert p_value(density, sample(model, 400, "ddim", SCHEDULE.T, seed=1, batch_size=400)) < 0.01


def test_particles_match_the_analytic_product():
    """Every third of a population, as its members depend on each other."""
    model, density = CASES["product"]
    assert p_value(density, sample(model, 1200, "smc", 20, seed=1, batch_size=1200)[::3]) > 0.05


@pytest.mark.parametrize("conditioning", ["joint", "embedding"])
def test_classes_of_one_model(conditioning):
    torch.manual_seed(0)
    network = MLP(3, SCHEDULE.num_levels, hidden=16, num_classes=4, conditioning=conditioning).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = CDM(network, SCHEDULE)
    x, two, three = torch.randn(5, 3, dtype=torch.float64), torch.full((5,), 2), torch.full((5,), 3)
    torch.testing.assert_close(OfClass(model, 3).score(x, 9), model.score(x, 9, three))
    mixed = Mixture([OfClass(model, c) for c in range(4)]).log_prob(x, 9)
    torch.testing.assert_close(mixed, model.log_prob_classes(x, 9).logsumexp(1) - torch.tensor(4.0).log())
    nested = negation(Product([OfClass(model, 2), model]), OfClass(model, 3), 0.5)
    of_two, of_all, of_three = (model.log_prob(x, label=label) for label in (two, None, three))
    expected = of_two + of_all - 0.5 * of_three
    torch.testing.assert_close(nested.log_prob(x, 0), expected)


NETWORKS = {
    "full head": {},
    "low-rank head": {"head_rank": 2},
    "no adjoint": {},
}


def joint_model(kind):
    """Four classes that differ, and the list of its network's evaluations."""
    torch.manual_seed(1)
    network = MLP(
        3, SCHEDULE.num_levels, hidden=16, num_classes=4, conditioning="joint", **NETWORKS[kind]
    ).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prior, calls = torch.tensor([1.0, 2.0, 3.0, 4.0]), []
    trunk = network.features
    network.features = lambda *args, **kwargs: calls.append(1) or trunk(*args, **kwargs)
    if kind == "no adjoint":
        model = CDM(Opaque(network), SCHEDULE, class_prior=prior, conditioning="joint")
    else:
        model = CDM(network, SCHEDULE, class_prior=prior)
    return model, calls


@pytest.mark.parametrize("kind", NETWORKS)
def test_classes_of_a_joint_model_take_one_evaluation(kind):
    """However many take part, however deep, beside another model; the score is that of the parts."""
    model, calls = joint_model(kind)
    other = CDM(ExactNetwork(random_mixture(3, 2, seed=3), SCHEDULE), SCHEDULE, input_shape=(3,))
    mixed = Mixture([OfClass(model, 0), model, other, OfClass(model, 2)], [1.0, 2.0, 2.0, 3.0])
    tree = negation(Product([mixed, OfClass(model, 1), other], [1.0, 0.7, 0.3]), OfClass(model, 3), 0.5)
    x, level = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 20, 40, 60, 61])
    log_prob, score = tree.log_prob_levels_and_score(x, level)
    assert len(calls) == 1

    def composed(x):
        of = [model.log_prob(x, level, label=torch.full((6,), c)) for c in range(4)]
        parts = torch.stack([of[0], model.log_prob(x, level), other.log_prob(x, level), of[2]])
        weight = torch.tensor([[1.0], [2.0], [2.0], [3.0]], dtype=torch.float64) / 8
        inner = torch.logsumexp(parts + weight.log(), 0) + 0.7 * of[1] + 0.3 * other.log_prob(x, level)
        noise = SCHEDULE.s[level] ** 2 * -0.5 * (x.square().sum(1) + 3 * math.log(2 * math.pi))
        return inner - noise - 0.5 * of[3] + 0.5 * noise

    torch.testing.assert_close(log_prob.gather(1, level[:, None])[:, 0], composed(x))
    x.requires_grad_()
    torch.testing.assert_close(score, torch.autograd.grad(composed(x).sum(), x)[0])
    before = len(calls)
    torch.testing.assert_close(tree.log_prob(x.detach(), level), composed(x).detach())
    assert len(calls) - before == 1 + 5  # five for `composed`


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda m: Product([]), "at least one part"),
        (lambda m: Product([m, exact_model(random_mixture(3, 1))]), "share the noise schedule"),
        (lambda m: Product([m, m], [1.0]), "one for each of the 2 parts"),
        (lambda m: Mixture([m, m], [1.0, 0.0]), "must be positive"),
        (lambda m: negation(m, m, 0.0), "strength is 0.0"),
        (lambda m: OfClass(m, 0), "trained without classes"),
        (lambda m: Product([m, DDM(MLPDenoiser(2, hidden=16), SCHEDULE)]), "a DDM knows no log p"),
        (lambda m: sample(Product([m]), 2, "mala", 3, label=0), "takes no label"),
    ],
    ids=["empty", "shape", "weights", "zero weight", "strength", "classless", "ddm", "label"],
)
def test_what_is_refused(make, told):
    with pytest.raises(UserError, match=told):
        make(exact_model(A))
