"""noise_level_ce: closed forms, joint logits, safety, every backend against fp64, derivatives, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_fast.ops import use_backend
from cdm_fast.ops.noise_level_ce import level_logits, noise_level_ce
from tests.accuracy import TOLERANCE, assert_kernel_accurate

# batch, levels, classes, whether every level has K logits (else pure noise has one)
CASES = {
    "plain": (5, 12, 1, False),
    "one-image": (1, 33, 1, False),
    "two-levels": (3, 2, 1, False),
    "many-levels": (2, 1002, 1, False),
    "joint": (6, 9, 4, False),
    "joint-many-classes": (3, 4, 37, False),
    "joint-full": (5, 6, 3, True),
    "longer-than-a-block": (2, 500, 10, False),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def _case(batch, num_levels, num_classes, full, dtype=torch.float64, scale=3.0):
    shape = (batch, num_levels, num_classes) if full else (batch, (num_levels - 1) * num_classes + 1)
    logits = (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)
    level = torch.arange(batch) * 7 % num_levels
    level[-1] = num_levels - 1  # pure noise, whose label means nothing
    label = None if num_classes == 1 else torch.arange(batch) % (num_classes + 1) - 1
    return logits, level, label, num_classes


def _values_and_gradient(logits, level, label, num_classes):
    logits = logits.detach().requires_grad_()
    result = noise_level_ce(logits, level, label, num_classes)
    weight = torch.linspace(-1, 2, len(level)).to(result.loss.dtype)
    (gradient,) = torch.autograd.grad((weight * (2 * result.loss + result.log_ratio)).sum(), logits)
    return result.loss.detach(), result.log_ratio.detach(), gradient


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_kernels_are_as_accurate_as_the_reference(kernels, poison_empty, case, dtype):
    arguments = _case(*case, dtype=dtype)
    with use_backend("reference"):
        plain = _values_and_gradient(*arguments)
        truth = _values_and_gradient(arguments[0].double(), *arguments[1:])
    with use_backend(kernels):
        got = _values_and_gradient(*arguments)
    for name, *values in zip(("loss", "log_ratio", "gradient"), got, plain, truth, strict=True):
        assert_kernel_accurate(*values, name)


@pytest.mark.parametrize("most", ["baseline", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_lesser_instruction_sets_are_as_accurate(limit_isa, most, dtype):
    arguments = _case(*CASES["longer-than-a-block"], dtype=dtype)
    with use_backend("reference"):
        plain = _values_and_gradient(*arguments)
        truth = _values_and_gradient(arguments[0].double(), *arguments[1:])
    limit_isa(most)
    with use_backend("cpp"):
        got = _values_and_gradient(*arguments)
    for name, *values in zip(("loss", "log_ratio", "gradient"), got, plain, truth, strict=True):
        assert_kernel_accurate(*values, name)


def test_plain_logits_are_cross_entropy(backend):
    logits, level, _, _ = _case(5, 12, 1, False)
    result = noise_level_ce(logits, level)
    torch.testing.assert_close(result.loss, F.cross_entropy(logits, level, reduction="none"))
    torch.testing.assert_close(result.log_ratio, logits.gather(1, level[:, None])[:, 0] - logits[:, -1])


def test_uniform_logits_give_the_log_of_their_number(backend):
    label = torch.tensor([2, -1, 0])
    result = noise_level_ce(torch.zeros(3, 4 * 5 + 1), torch.tensor([1, 3, 4]), label, num_classes=5)
    expected = torch.tensor([math.log(21), math.log(21 / 5), math.log(21)])
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.log_ratio, torch.tensor([0.0, math.log(5), 0.0]))


def test_a_missing_label_is_the_marginal_over_classes(backend):
    logits, level, _, _ = _case(6, 9, 4, False)
    unlabelled = noise_level_ce(logits, level, None, 4)
    assert torch.equal(unlabelled.loss, noise_level_ce(logits, level, torch.full((6,), -1), 4).loss)
    of_each = torch.stack([noise_level_ce(logits, level, torch.full((6,), c), 4).loss for c in range(4)])
    expected = -(-of_each[:, :-1]).logsumexp(0)  # p(t) = sum_c p(t, c), below pure noise
    torch.testing.assert_close(unlabelled.loss[:-1], expected)


def test_the_labels_of_pure_noise_do_not_matter(backend):
    logits, _, _, _ = _case(2, 9, 4, False)
    level = torch.full((2,), 8)
    labelled = noise_level_ce(logits, level, torch.tensor([3, 1]), 4)
    assert torch.equal(labelled.loss, noise_level_ce(logits, level, None, 4).loss)
    assert float(labelled.log_ratio.abs().max()) == 0.0


def test_posterior_is_normalised_and_agrees_with_the_loss(backend):
    logits, level, _, _ = _case(6, 9, 4, False)
    posterior = level_logits(logits, 4).log_softmax(1)
    assert posterior.shape == (6, 9)
    torch.testing.assert_close(posterior.exp().sum(1), torch.ones(6, dtype=torch.float64))
    loss = noise_level_ce(logits, level, None, 4).loss
    torch.testing.assert_close(-posterior.gather(1, level[:, None])[:, 0], loss)


def test_level_logits_of_the_three_layouts_agree():
    joint = torch.randn(2, 5, 3)
    flat = torch.cat([joint[:, :-1].flatten(1), joint[:, -1:].logsumexp(-1)], 1)
    torch.testing.assert_close(level_logits(joint), level_logits(flat, 3))
    torch.testing.assert_close(level_logits(level_logits(joint)), level_logits(joint))


def _level_logits_and_gradient(logits, num_classes):
    logits = logits.detach().requires_grad_()
    posterior = level_logits(logits, num_classes).log_softmax(1)
    weight = torch.linspace(-1, 2, posterior.numel()).to(posterior.dtype).reshape(posterior.shape)
    (gradient,) = torch.autograd.grad((weight * posterior).sum(), logits)
    return level_logits(logits, num_classes).detach(), posterior.detach(), gradient


@pytest.mark.parametrize("most", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_level_logits_and_posterior_in_cpp(limit_isa, poison_empty, most, case, dtype):
    limit_isa(most)
    _assert_level_logits("cpp", case, dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_level_logits_and_posterior_in_triton(poison_empty, case, dtype):
    pytest.importorskip("triton", reason="triton is not installed")
    _assert_level_logits("triton", case, dtype)


def _assert_level_logits(kernels, case, dtype):
    logits, _, _, num_classes = _case(*case, dtype=dtype)
    with use_backend("reference"):
        plain = _level_logits_and_gradient(logits, num_classes)
        truth = _level_logits_and_gradient(logits.double(), num_classes)
    with use_backend(kernels):
        got = _level_logits_and_gradient(logits, num_classes)
    for name, *values in zip(("level_logits", "posterior", "gradient"), got, plain, truth, strict=True):
        assert_kernel_accurate(*values, name)


@pytest.mark.cpu  # in fp64
@pytest.mark.parametrize("case", [CASES["joint"], CASES["joint-full"]], ids=["joint", "full"])
def test_the_posterior_has_two_derivatives(case):
    logits, _, _, num_classes = _case(*case)
    with use_backend("cpp"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(
                lambda z: level_logits(z, num_classes).log_softmax(1), logits.requires_grad_(), fast_mode=True
            )


@pytest.mark.cpu
def test_opcheck_of_level_logits():
    logits, _, _, _ = _case(6, 9, 4, False)
    with use_backend("cpp"):
        torch.library.opcheck(torch.ops.cdm_fast.level_logits.default, (logits.requires_grad_(), 9, 4))


def test_a_nan_makes_its_level_nan_and_the_whole_posterior(backend):
    logits = torch.zeros(1, 20 * 3 + 1)
    logits[0, 17] = float("nan")
    assert level_logits(logits, 3)[0].isnan().nonzero().flatten().tolist() == [5]
    assert bool(level_logits(logits, 3).log_softmax(1).isnan().all())


@pytest.mark.parametrize("shift", [-1e4, 1e4], ids=["low", "high"])
def test_large_logits_lose_nothing(backend, shift):
    logits, level, label, num_classes = _case(6, 9, 4, False, scale=1.0)
    near = (logits * 1024).round() / 1024  # so that adding the shift is exact in fp32
    expected = noise_level_ce(near, level, label, num_classes)
    got = noise_level_ce((near + shift).float(), level, label, num_classes)
    tolerance = 1e-2 if backend == "reference" else 2e-5  # ulps of 1e4, or of the loss
    torch.testing.assert_close(got.loss.double(), expected.loss, rtol=0, atol=tolerance)
    torch.testing.assert_close(got.log_ratio.double(), expected.log_ratio, rtol=0, atol=tolerance)


def test_far_apart_logits_stay_finite(backend):
    logits = torch.full((2, 40), -1e4)
    logits[:, 3] = 1e4
    logits.requires_grad_()
    result = noise_level_ce(logits, torch.tensor([3, 5]))
    (gradient,) = torch.autograd.grad(result.loss.sum(), logits)
    assert result.loss.tolist() == [0.0, 2e4]
    assert gradient[1, 5] == -1 and gradient[1, 3] == 1 and float(gradient[0].abs().max()) < 1e-37


@pytest.mark.cpu
@pytest.mark.parametrize("most", ["baseline", "avx2", "avx512"])
def test_no_gradient_is_subnormal(limit_isa, most):
    """Products that read such a gradient take up to forty times as long on some processors."""
    limit_isa(most)
    logits = torch.linspace(0, -130, 4000).expand(3, -1).clone().requires_grad_()
    with use_backend("cpp"):
        loss = noise_level_ce(logits, torch.tensor([0, 2000, 3999])).loss / 512
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    exact = logits.detach().double().softmax(1) / 512
    seen = (exact > 1e-32) & (exact < 1e-20)
    assert seen.any()
    torch.testing.assert_close(gradient[seen].double(), exact[seen], rtol=1e-4, atol=0)
    assert not ((gradient != 0) & (gradient.abs() < torch.finfo(torch.float32).tiny)).any()


def test_nan_is_passed_on(backend):
    logits = torch.zeros(2, 40, requires_grad=True)
    with torch.no_grad():
        logits[0, 17] = float("nan")
    loss = noise_level_ce(logits, torch.tensor([3, 5])).loss
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool(loss[0].isnan()) and bool(gradient[0].isnan().all())
    assert bool(loss[1].isfinite()) and bool(gradient[1].isfinite().all())


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 5),
    num_levels=st.integers(2, 40),
    num_classes=st.integers(1, 40),
    full=st.booleans(),
)
def test_cpp_on_random_shapes(batch, num_levels, num_classes, full):
    arguments = _case(batch, num_levels, num_classes, full)
    results = []
    for name in ("reference", "cpp"):
        with use_backend(name):
            posterior = _level_logits_and_gradient(arguments[0], num_classes)
            results.append((*_values_and_gradient(*arguments), *posterior))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "case", [CASES["plain"], CASES["joint"], CASES["joint-full"]], ids=["plain", "joint", "full"]
)
def test_gradient_is_the_derivative(kernels, case):
    logits, level, label, num_classes = _case(*case)
    logits.requires_grad_()
    with use_backend(kernels):
        assert torch.autograd.gradcheck(
            lambda z: tuple(noise_level_ce(z, level, label, num_classes)), logits, fast_mode=True
        )


@pytest.mark.parametrize("name", ["loss", "log_ratio"])
def test_the_gradient_of_one_output_alone(kernels, name):
    logits, level, label, num_classes = _case(*CASES["joint"])
    logits.requires_grad_()
    gradients = []
    for backend in ("reference", kernels):
        with use_backend(backend):
            output = getattr(noise_level_ce(logits, level, label, num_classes), name)
            gradients.append(torch.autograd.grad(output.sum(), logits)[0])
    torch.testing.assert_close(*gradients)


def test_a_second_derivative_exists_in_the_reference_and_raises_in_the_kernels(backend):
    logits, level, _, _ = _case(2, 5, 1, False)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(noise_level_ce(logits, level).loss.sum(), logits, create_graph=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(lambda z: noise_level_ce(z, level).loss, logits)
        return
    with pytest.raises(RuntimeError, match="noise_level_ce_backward has no derivative"):
        torch.autograd.grad(gradient.square().sum(), logits)


@pytest.mark.cpu  # in fp64
def test_opcheck():
    logits, level, label, _ = _case(6, 9, 4, False)
    with use_backend("cpp"):
        torch.library.opcheck(
            torch.ops.cdm_fast.noise_level_ce.default, (logits.requires_grad_(), level, label, 9, 4)
        )


def test_compiles_whole():
    logits, level, _, _ = _case(4, 12, 1, False)

    def loss(logits):
        return noise_level_ce(logits, level).loss.sum()

    leaf = logits.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).backward()
    expected = torch.autograd.grad(loss(logits.requires_grad_()), logits)[0]
    assert torch.equal(leaf.grad, expected)


def test_a_level_out_of_range_inside_a_compiled_step_gives_nan():
    logits = torch.randn(3, 12)
    compiled = torch.compile(
        lambda level: noise_level_ce(logits, level).loss, fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.tensor([12, 3, -1])).isnan().tolist() == [True, False, True]


ZERO = torch.zeros(2, dtype=torch.int64)
BAD = {
    "logits-int": (dict(logits=torch.zeros(2, 5, dtype=torch.int32)), TypeError, "logits: expected dtype"),
    "logits-1d": (dict(logits=torch.zeros(5)), ValueError, "logits: expected shape"),
    "logits-empty": (dict(logits=torch.zeros(0, 5)), ValueError, "logits: expected at least one example"),
    "classes": (dict(num_classes=3), ValueError, r"num_classes K = 3, got \(2, 5\)"),
    "level-dtype": (dict(level=ZERO.int()), TypeError, "level: expected dtype int64, got int32"),
    "level-shape": (dict(level=ZERO[:1]), ValueError, r"level: expected shape \(2\), got \(1,\)"),
    "level-high": (dict(level=ZERO + 5), ValueError, "level: expected values in 0..4, got 5"),
    "level-low": (dict(level=ZERO - 1), ValueError, "level: expected values in 0..4, got -1"),
    "level-device": (dict(level=ZERO.to("meta")), ValueError, r"level: expected it on c\S+, got meta"),
    "label-high": (dict(label=ZERO + 2, num_classes=2), ValueError, "label: expected values in -1..1, got 2"),
    "label-shape": (dict(label=ZERO[:1], num_classes=2), ValueError, "label: expected shape"),
}


@pytest.mark.parametrize(("change", "error", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(backend, change, error, says):
    with pytest.raises(error, match=says):
        noise_level_ce(**(dict(logits=torch.zeros(2, 5), level=ZERO) | change))


# logits of -inf, as [image, entries], and what they are
MINUS_INFINITY = {
    "of another level": (1, slice(3, 6)),
    "all but the true one": (1, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]),
    "of the true level": (1, slice(7, 8)),
    "of pure noise": (1, slice(11, 12)),
    "some classes of a level": (4, slice(8, 10)),
    "one class of the true level": (4, slice(12, 13)),
    "a whole level": (4, slice(8, 12)),
    "pure noise below classes": (4, slice(-1, None)),
}


@pytest.mark.parametrize("num_classes, entries", MINUS_INFINITY.values(), ids=MINUS_INFINITY.keys())
@pytest.mark.parametrize("label", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_minus_infinity(backend, num_classes, entries, label, dtype):
    """Impossible levels and classes: finite wherever the reference is, infinite where it is."""
    logits = torch.randn(2, 12 if num_classes == 1 else 21).to(dtype)
    logits[:, entries] = -torch.inf
    level = torch.tensor([7 if num_classes == 1 else 3, 5 if num_classes == 1 else 2])
    labels = None if label is None or num_classes == 1 else torch.full((2,), label)

    def values(output):
        leaf = logits.detach().clone().requires_grad_()
        result = noise_level_ce(leaf, level, labels, num_classes)
        (gradient,) = torch.autograd.grad(getattr(result, output).sum(), leaf)
        return result.loss.detach(), result.log_ratio.detach(), gradient

    bounds = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for output in ("loss", "log_ratio"):
        got = values(output)
        with use_backend("reference"):
            *expected, gradient = values(output)
        torch.testing.assert_close(got[:2], tuple(expected), **bounds, equal_nan=True)
        known = gradient.isfinite()
        torch.testing.assert_close(got[2][known], gradient[known], **bounds)


@pytest.mark.parametrize("num_classes", [4, 40])
def test_level_logits_of_minus_infinity(backend, num_classes):
    logits = torch.randn(2, 30 * num_classes + 1)
    logits[0, :num_classes], logits[1, num_classes + 1], logits[:, -1] = (-torch.inf,) * 3
    with use_backend("reference"):
        expected = level_logits(logits, num_classes)
    torch.testing.assert_close(level_logits(logits, num_classes), expected)
