"""The joint (level, class) head: closed forms, plain double backward, guidance, compiled graphs.

With joint logits `z[t,c] = log p(t, c | x) + const` one forward pass gives every class's density.
"""

import functools
import math

import pytest
import torch
from torch import nn

from benchmarks.support.analytic import GaussianMixture, eps_hat, noisy_sample, random_mixture
from cdm_fast import CDM, DDM, MLP, MLPDenoiser, NoiseSchedule, UNet, UserError, cdm_loss, sample, use_backend
from cdm_fast.model.conditioned import Between, Guided
from cdm_fast.nn.heads import JointHead, LowRankHead
from tests.accuracy import TOLERANCE, relative_error
from tests.opaque import Opaque

K = 3
SCHEDULE = NoiseSchedule.uniform(T=10)
EXACT = {"rtol": 1e-9, "atol": 1e-9}
NETWORKS = {
    "mlp": lambda: MLP(5, SCHEDULE.num_levels, hidden=8, depth=1, num_classes=K, conditioning="joint"),
    "unet": lambda: UNet(
        8,
        1,
        SCHEDULE.num_levels,
        base_channels=8,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_resolutions=(4,),
        num_groups=4,
        num_classes=K,
        conditioning="joint",
    ),
    "low-rank": lambda: MLP(
        5, SCHEDULE.num_levels, hidden=8, depth=1, num_classes=K, conditioning="joint", head_rank=2
    ),
}
LEVEL = torch.tensor([0, 1, 4, 10, 11, 7])
LABELS = {
    "labelled": torch.tensor([0, 1, 2, 0, 1, 2]),
    "unlabelled": torch.full((6,), -1),
    "mixed": torch.tensor([0, -1, 2, -1, 1, -1]),
    "none": None,
}


class ExactJoint(nn.Module):
    """Joint logits of a mixture whose components are the classes: `log p(t) p(c) p_t(x|c) + constant(x)`."""

    conditioning = "joint"
    num_classes = None

    def __init__(self, density, level_prior, schedule=SCHEDULE):
        super().__init__()
        self.density, self.level_prior = density, level_prior
        self.register_buffer("a", schedule.a)
        self.register_buffer("s", schedule.s)

    def forward(self, x):
        each = self.density.components_log_prob(x, self.a, self.s) + self.level_prior.log()[:, None]
        joint = (each[:, :-1] + self.density.weights.log()).flatten(1)
        constant = 0.3 * x.square().sum(1, keepdim=True) + x.sin().sum(1, keepdim=True)
        return torch.cat([joint, each[:, -1:, 0]], dim=1) + constant


@pytest.fixture
def mixture():
    """Three classes of different shares."""
    drawn = random_mixture(2, K, seed=4)
    return GaussianMixture(torch.tensor([0.75, 0.1875, 0.0625]), drawn.means, drawn.covariances)


@pytest.fixture
def exact(mixture):
    prior = torch.linspace(3, 1, SCHEDULE.num_levels, dtype=torch.float64)
    return CDM(ExactJoint(mixture, prior), SCHEDULE, prior, input_shape=(2,), class_prior=mixture.weights)


@pytest.mark.parametrize("level", [0, 1, 6, SCHEDULE.T, SCHEDULE.T + 1])
def test_densities_of_all_classes_are_exact(exact, mixture, level):
    x = noisy_sample(mixture, SCHEDULE, level, num=20)
    each = mixture.components_log_prob(x, SCHEDULE.a, SCHEDULE.s)
    torch.testing.assert_close(exact.log_prob_classes(x, level), each[:, level], **EXACT)
    label = torch.arange(20) % (K + 1) - 1
    marginal = mixture.log_prob(x, SCHEDULE.a, SCHEDULE.s)
    torch.testing.assert_close(exact.log_prob_levels(x), marginal, **EXACT)
    wanted = torch.where(label < 0, marginal[:, level], each[torch.arange(20), level, label.clamp(min=0)])
    torch.testing.assert_close(exact.log_prob(x, level, label=label), wanted, **EXACT)


def test_classifier_is_bayes_rule(exact, mixture):
    x = noisy_sample(mixture, SCHEDULE, 0, num=200, seed=1)
    each = mixture.components_log_prob(x, SCHEDULE.a, SCHEDULE.s)[:, 0]
    posterior = (each + mixture.weights.log()).log_softmax(1)
    torch.testing.assert_close(exact.log_class_posterior(x), posterior, **EXACT)
    assert torch.equal(exact.classify(x), posterior.argmax(1))
    equal = exact.log_class_posterior(x, class_prior=torch.ones(K))
    torch.testing.assert_close(equal, each.log_softmax(1), **EXACT)
    assert not torch.equal(exact.classify(x), equal.argmax(1))  # the prior of the training matters here


@pytest.mark.parametrize("level", [1, 6, SCHEDULE.T])
def test_denoisers_are_exact(exact, mixture, level):
    x = noisy_sample(mixture, SCHEDULE, level, num=8)
    marginal = eps_hat(mixture, SCHEDULE, x, level)
    torch.testing.assert_close(exact.denoise(x, level), marginal, **EXACT)
    label = torch.arange(8) % (K + 1) - 1
    each = [marginal if c < 0 else eps_hat(mixture.component(int(c)), SCHEDULE, x, level) for c in label]
    conditional = torch.stack([eps[i] for i, eps in enumerate(each)])
    torch.testing.assert_close(exact.denoise(x, level, label), conditional, **EXACT)
    guided = Guided(exact, 1.7).denoise(x, level, label)
    torch.testing.assert_close(guided, 2.7 * conditional - 1.7 * marginal, **EXACT)


def test_given_a_class_the_level_posterior_is_bayes_rule_within_it(exact, mixture):
    x, label = noisy_sample(mixture, SCHEDULE, 3, num=6), torch.tensor([0, 1, 2, 2, 1, 0])
    log_prob = mixture.log_prob(x, SCHEDULE.a, SCHEDULE.s, label)
    wanted = (log_prob + exact.log_level_prior).log_softmax(1)
    torch.testing.assert_close(exact.log_posterior(x, label), wanted, **EXACT)


def randomised(name):
    network = NETWORKS[name]().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def gradients(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def double_backward_loss(network, x_t, eps, level, label, ce_weight, class_weight=0.0):
    """The loss by its definition: joint cross-entropy, and the denoiser by autograd of autograd."""
    x_t = x_t.detach().requires_grad_()
    with use_backend("reference"):
        logits = network(x_t)
    joint = logits[:, :-1].unflatten(1, (-1, K))
    f = torch.cat([joint.logsumexp(2), logits[:, -1:]], dim=1)
    true, of_class = [], torch.zeros((), dtype=logits.dtype)
    for i, t in enumerate(level.tolist()):
        c = -1 if label is None else int(label[i])
        known = c >= 0 and t <= SCHEDULE.T
        true.append(joint[i, t, c] if known else f[i, t])
        of_class = of_class + (f[i, t] - joint[i, t, c] if known else 0.0) / len(level)
    true = torch.stack(true)
    (grad_x,) = torch.autograd.grad((logits[:, -1] - true).sum(), x_t, create_graph=True)
    s = SCHEDULE.s[level].view(-1, *[1] * (x_t.dim() - 1))
    mse = (s * (grad_x + x_t) - eps).square().mean()
    return ce_weight * (logits.logsumexp(1) - true).mean() + mse + class_weight * of_class


@pytest.mark.parametrize("class_weight", [0.0, 0.3])
@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_gradient_equals_plain_double_backward(name, label, class_weight):
    network = randomised(name)
    model = CDM(network, SCHEDULE)
    x0 = torch.rand(6, *network.input_shape, dtype=torch.float64) * 2 - 1
    eps = torch.randn_like(x0)
    weights = {"ce_weight": 0.1, "class_weight": class_weight}
    expected = double_backward_loss(network, SCHEDULE.noise(x0, LEVEL, eps), eps, LEVEL, label, **weights)
    terms = cdm_loss(model, x0, LEVEL, eps, label, **weights)
    assert relative_error(terms.loss, expected) < 1e-9
    assert relative_error(gradients(terms.loss, network), gradients(expected, network)) < 1e-9


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_fast_path_agrees_with_torch_func(name, guidance, label):
    network = randomised(name)
    x = torch.randn(6, *network.input_shape, dtype=torch.float64)
    general = CDM(Opaque(network), SCHEDULE, conditioning="joint", class_prior=torch.ones(K))
    with torch.no_grad():
        got = CDM(network, SCHEDULE).ratio_gradient(x, LEVEL, label, guidance)
        wanted = general.ratio_gradient(x, LEVEL, label, guidance)
        logits, from_training = CDM(network, SCHEDULE).logits_and_ratio_gradient(x, LEVEL, label)
    assert relative_error(got, wanted) < 1e-9
    assert relative_error(logits, network(x)) < 1e-9
    assert guidance or relative_error(from_training, wanted) < 1e-9


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_many_classes_train_alike_without_all_their_logits(name, label, monkeypatch):
    network = randomised(name)
    x0 = torch.rand(6, *network.input_shape, dtype=torch.float64)
    eps = torch.randn_like(x0)
    weights = {"ce_weight": 0.1, "class_weight": 0.3}
    terms = [cdm_loss(CDM(network, SCHEDULE), x0, LEVEL, eps, label, **weights)]
    monkeypatch.setattr("cdm_fast.model.cdm.MANY_CLASSES", K)
    monkeypatch.setattr(type(network), "logits_and_ratio_gradient", None)
    terms.append(cdm_loss(CDM(network, SCHEDULE), x0, LEVEL, eps, label, **weights))
    assert relative_error(terms[1].ce, terms[0].ce) < 1e-9
    assert relative_error(terms[1].loss, terms[0].loss) < 1e-9
    few, many = (gradients(each.loss, network) for each in terms)
    assert relative_error(many, few) < 1e-9


def test_head_cumulates_from_noise_down_and_starts_without_opinion():
    head = JointHead(4, num_levels=5, num_classes=K).double()
    h = torch.randn(2, 4, dtype=torch.float64)
    z = head(h)
    joint = z[:, :-1].view(2, 4, K)
    torch.testing.assert_close(joint[:, :, 1], joint[:, :, 0], **EXACT)  # all classes alike at first
    nn.init.normal_(head.weight)
    increments = nn.functional.linear(h, head.weight, head.bias)[:, :-1].view(2, 4, K)
    z = head(h)
    for t in range(4):
        wanted = z[:, -1:] - increments[:, t:].sum(1)
        torch.testing.assert_close(z[:, t * K : (t + 1) * K], wanted, **EXACT)


@pytest.mark.parametrize("rank", [1, 2, K, K + 1])
def test_low_rank_head_is_a_full_one_of_that_rank(rank):
    low = LowRankHead(4, num_levels=5, num_classes=K, rank=rank).double()
    h = torch.randn(6, 4, dtype=torch.float64)
    joint = low(h)[:, :-1].view(6, 4, K)
    torch.testing.assert_close(joint[:, :, 1], joint[:, :, 0], **EXACT)  # all classes alike at first
    for parameter in low.parameters():
        nn.init.normal_(parameter)
    full = JointHead(4, num_levels=5, num_classes=K).double()
    vectors = torch.cat([torch.ones(K, 1, dtype=torch.float64), low.classes], dim=1)  # (K, R+1)
    with torch.no_grad():
        for mine, theirs in ((full.weight, low.weight), (full.bias, low.bias)):
            rows = theirs[:-1].unflatten(0, (4, rank + 1))
            mine[:-1] = torch.einsum("cr,tr...->tc...", vectors, rows).flatten(0, 1)
            mine[-1] = theirs[-1]
    torch.testing.assert_close(low(h), full(h), **EXACT)
    for head in (low, full):
        label = LABELS["mixed"]
        level = torch.tensor([0, 1, 2, 3, 4, 2])
        head.told = (
            head.cotangent(h, head.cumulated(), level, label, 1.5),
            head.cross_entropy(h, head.cumulated(), level, label),
        )
    for got, wanted in zip(low.told, full.told, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("head", [JointHead(4, 5, K), LowRankHead(4, 5, K, rank=2)], ids=["full", "low-rank"])
def test_autocast_leaves_the_head_in_full_precision(head):
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    h, level, weight = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 2]), torch.randn(6, K)

    def told():
        cumulated = head.cumulated()
        return (
            head(h),
            head.cotangent(h, cumulated, level),
            head.weighted_cotangent(cumulated[0], level, weight),
        )

    expected = told()
    with torch.autocast("cpu", torch.bfloat16):
        got = told()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_one_class_is_the_plain_head():
    joint = MLP(5, 12, hidden=8, depth=1, num_classes=1, conditioning="joint")
    plain = MLP(5, 12, hidden=8, depth=1)
    state = joint.state_dict()
    for part in ("weight", "bias"):  # z_N - sum_{u>=t} w[u]  =  w_N - sum_u w[u] + w[0] + .. + w[t-1]
        w = state[f"linear_layer.{part}"]
        state[f"linear_layer.{part}"] = torch.cat([(w[-1] - w[:-1].sum(0))[None], w[:-1]])
    plain.load_state_dict(state)
    x = torch.randn(4, 5)
    torch.testing.assert_close(joint(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "label"),
    [("mlp", LABELS["mixed"]), ("mlp", None), ("unet", LABELS["mixed"]), ("low-rank", LABELS["mixed"])],
    ids=["mlp-mixed", "mlp-none", "unet-mixed", "low-rank-mixed"],
)
def test_loss_and_guided_denoiser_compile_as_one_graph(name, label):
    torch.compiler.reset()
    network = NETWORKS[name]()
    model = CDM(network, SCHEDULE)
    x0, eps = torch.rand(6, *network.input_shape), torch.randn(6, *network.input_shape)
    loss = functools.partial(cdm_loss, model, class_weight=0.3)
    expected = gradients(loss(x0, LEVEL, eps, label).loss, network)
    compiled = torch.compile(lambda *args: loss(*args).loss, fullgraph=True, backend="aot_eager")
    got = gradients(compiled(x0, LEVEL, eps, label), network)
    assert relative_error(got, expected) < TOLERANCE[torch.float32]
    with torch.no_grad():
        for function in (model.log_prob, model.denoise, Guided(model, 2.0).denoise):
            whole = torch.compile(function, fullgraph=True, backend="aot_eager")
            assert relative_error(whole(x0, LEVEL, label=label), function(x0, LEVEL, label=label)) < 1e-5


def test_two_evaluations_of_an_embedding_or_a_plain_denoiser_guide_alike():
    schedule, x = NoiseSchedule.uniform(T=10), torch.randn(4, 5)
    label, level = torch.tensor([0, 2, 1, -1]), torch.tensor([1, 3, 5, 9])
    networks = (
        MLP(5, 12, hidden=8, depth=1, num_classes=K),
        MLPDenoiser(5, hidden=8, depth=1, num_classes=K),
    )
    for model in (CDM(networks[0], schedule), DDM(networks[1], schedule)):
        with torch.no_grad():
            guided = Guided(model, 0.8).denoise(x, level, label)
            wanted = 1.8 * model.denoise(x, level, label) - 0.8 * model.denoise(x, level)
        torch.testing.assert_close(guided, wanted, rtol=1e-4, atol=1e-5)


def test_embedding_gives_every_class_by_one_pass_each():
    model = CDM(MLP(5, 12, hidden=8, depth=1, num_classes=K), SCHEDULE, class_prior=torch.tensor([1, 2, 5]))
    x = torch.randn(4, 5)
    each = model.log_prob_classes(x, 2)
    for c in range(K):
        torch.testing.assert_close(each[:, c], model.log_prob(x, 2, label=torch.full((4,), c)))
    wanted = (each + torch.tensor([1 / 8, 2 / 8, 5 / 8]).log()).log_softmax(1)
    torch.testing.assert_close(model.log_class_posterior(x, 2), wanted)


def test_guidance_pushes_samples_away_from_the_other_classes():
    """Two classes N(-m, v) and N(m, v) on the line."""
    schedule = NoiseSchedule.uniform(T=100)
    halves = torch.tensor([0.5, 0.5])
    mixture = GaussianMixture(halves, torch.tensor([[-0.5], [0.5]]), torch.full((2, 1, 1), 0.25))
    network = ExactJoint(mixture, torch.ones(schedule.num_levels), schedule)
    model = CDM(network, schedule, None, (1,), class_prior=halves)
    draws = [sample(model, 400, "ddim", 20, label=1, guidance=w) for w in (0.0, 1.0, 3.0)]
    means = [float(x.mean()) for x in draws]
    assert means[0] == pytest.approx(0.5, abs=0.1)
    assert means[0] + 0.1 < means[1] < means[2] - 0.1


def test_between_two_classes_the_denoiser_is_that_of_mixed_logits(exact, mixture):
    x, level = noisy_sample(mixture, SCHEDULE, 4, num=6), 4
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    here, there = (exact.score(x, level, c) for c in (label, torch.full_like(label, 2)))
    mixed = -SCHEDULE.s[level] * (0.75 * here + 0.25 * there)
    torch.testing.assert_close(Between(exact, 2, 0.25).denoise(x, level, label), mixed, **EXACT)
    for share, c in ((0.0, label), (1.0, torch.full_like(label, 2))):
        got = Between(Guided(exact, 1.5), 2, share).denoise(x, level, label)
        torch.testing.assert_close(got, Guided(exact, 1.5).denoise(x, level, c), **EXACT)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: MLP(5, 12, conditioning="joint"), "needs num_classes"),
        (lambda: MLP(5, 12, num_classes=2, conditioning="both"), "unknown conditioning"),
        (lambda: CDM(NETWORKS["mlp"](), SCHEDULE, class_prior=torch.ones(2)), "class_prior has shape"),
        (lambda: CDM(NETWORKS["mlp"](), SCHEDULE, class_prior=torch.tensor([1, 0, 1])), "must be positive"),
        (lambda: CDM(nn.Identity(), SCHEDULE, conditioning="joint"), "how many classes"),
        (lambda: CDM(MLP(5, 12), SCHEDULE).classify(torch.ones(1, 5)), "without classes"),
        (
            lambda: CDM(NETWORKS["mlp"](), SCHEDULE).denoise(torch.ones(1, 5), 1, torch.tensor([K])),
            f"label {K} does not exist",
        ),
        (
            lambda: sample(CDM(NETWORKS["mlp"](), SCHEDULE), 1, steps=2, guidance=1.0),
            "no class to guide towards",
        ),
        (
            lambda: sample(CDM(NETWORKS["mlp"](), SCHEDULE), 1, steps=2, label=0, guidance=math.nan),
            "finite number",
        ),
    ],
)
def test_wrong_use_is_told(wrong, told):
    with pytest.raises(UserError, match=told):
        wrong()
