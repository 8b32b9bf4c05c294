"""denoise: formulas, the cotangent against autograd, every backend against fp64, derivatives, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_fast.ops import use_backend
from cdm_fast.ops.denoise import denoise_epilogue, denoise_loss, denoise_x0, head_cotangent
from tests.accuracy import assert_kernel_accurate

SHAPES = {
    "one-pixel": (1, 1, 1, 1),
    "odd": (3, 1, 5, 7),
    "vectors": (5, 3),
    "aligned": (2, 3, 8, 8),
    "longer-than-a-tile": (2, 3, 20, 30),
}
# dtype of grad_x, dtype of x
DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32-fp64": (torch.float32, torch.float64),
}
# rows below pure noise = levels x classes, features; None: no class weights
HEADS = {
    "plain": (6, None, 40),
    "wide": (4, None, 300),
    "joint": (5, 3, 33),
    "one-class": (5, 1, 7),
    "one-feature": (2, 2, 1),
}


def _images(shape, dtypes=DTYPES["fp64"]):
    grad_x, x, eps = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    s_t = torch.linspace(0.1, 1.0, shape[0], dtype=torch.float64)
    return (
        grad_x.to(dtypes[0]),
        x.to(dtypes[1]),
        (1.2 - s_t).to(dtypes[1]),
        s_t.to(dtypes[1]),
        eps.to(dtypes[1]),
    )


def _outputs_and_gradients(grad_x, x, a_t, s_t, eps):
    leaves = [tensor.detach().requires_grad_() for tensor in (grad_x, x, eps)]
    grad_x, x, eps = leaves
    outputs = [
        denoise_epilogue(grad_x, x, s_t),
        denoise_x0(grad_x, x, a_t, s_t),
        denoise_loss(grad_x, x, s_t, eps),
    ]
    weight = torch.linspace(-1, 1, len(s_t)).to(outputs[2].dtype)
    gradients = torch.autograd.grad((weight * outputs[2]).sum(), leaves)
    linear = [torch.autograd.grad(out.sum(), (grad_x, x)) for out in outputs[:2]]
    return [out.detach() for out in outputs] + [*gradients, *linear[0], *linear[1]]


NAMES = ("eps_hat", "x0_hat", "loss", "d grad_x", "d x", "d eps", "eps_g", "eps_x", "x0_g", "x0_x")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_kernels_are_as_accurate_as_the_reference(kernels, poison_empty, shape, dtypes):
    arguments = _images(shape, dtypes)
    with use_backend("reference"):
        plain = _outputs_and_gradients(*arguments)
        truth = _outputs_and_gradients(*(tensor.double() for tensor in arguments))
    with use_backend(kernels):
        got = _outputs_and_gradients(*arguments)
    for name, *values in zip(NAMES, got, plain, truth, strict=True):
        assert_kernel_accurate(*values, name)


def test_formulas(backend):
    grad_x, x, a_t, s_t, eps = _images((2, 3))
    s, a = s_t[:, None], a_t[:, None]
    eps_hat = denoise_epilogue(grad_x, x, s_t)
    torch.testing.assert_close(eps_hat, s * (grad_x + x))
    torch.testing.assert_close(denoise_x0(grad_x, x, a_t, s_t), (x - s * eps_hat) / a)
    torch.testing.assert_close(denoise_loss(grad_x, x, s_t, eps), ((eps_hat - eps) ** 2).sum(1))


def test_the_denoiser_of_gaussian_data_is_exact(backend):
    # x_0 ~ N(0, v) gives x_t ~ N(0, a^2 v + s^2), and E[eps | x_t] = s x / (a^2 v + s^2).
    v, a, s = 0.3, 0.6, 0.8
    x = torch.randn(1, 50, dtype=torch.float64)
    variance = a * a * v + s * s
    score = -x / variance
    grad_f = -score - x  # CDM Thm 3.1: score = -(grad F + x)
    a_t, s_t = (torch.tensor([value], dtype=torch.float64) for value in (a, s))
    torch.testing.assert_close(denoise_epilogue(grad_f, x, s_t), s * x / variance)
    torch.testing.assert_close(denoise_x0(grad_f, x, a_t, s_t), a * v * x / variance)


def test_the_loss_sums_the_same_way_every_time(kernels):
    grad_x, x, _, s_t, eps = _images((2, 3, 50, 50), DTYPES["fp32"])
    with use_backend(kernels):
        first = denoise_loss(grad_x, x, s_t, eps)
        assert all(torch.equal(first, denoise_loss(grad_x, x, s_t, eps)) for _ in range(3))


def test_second_derivative_of_the_loss_raises_in_the_kernels_only(backend):
    grad_x, x, _, s_t, eps = _images((2, 3))
    grad_x.requires_grad_()
    if backend == "reference":
        assert torch.autograd.gradgradcheck(lambda g: denoise_loss(g, x, s_t, eps), grad_x)
        return
    (gradient,) = torch.autograd.grad(denoise_loss(grad_x, x, s_t, eps).sum(), grad_x, create_graph=True)
    with pytest.raises(RuntimeError, match="denoise_loss_backward has no derivative"):
        torch.autograd.grad(gradient.square().sum(), grad_x)


@pytest.mark.parametrize("name", ["epilogue", "x0", "loss"])
def test_gradcheck(kernels, name):
    grad_x, x, a_t, s_t, eps = _images((2, 3))
    leaves = [tensor.requires_grad_() for tensor in (grad_x, x, eps)]
    functions = {
        "epilogue": lambda g, x, eps: denoise_epilogue(g, x, s_t),
        "x0": lambda g, x, eps: denoise_x0(g, x, a_t, s_t),
        "loss": lambda g, x, eps: denoise_loss(g, x, s_t, eps),
    }
    with use_backend(kernels):
        assert torch.autograd.gradcheck(functions[name], leaves)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_cpp_on_random_shapes(shape):
    arguments = _images(tuple(shape))
    results = []
    for name in ("reference", "cpp"):
        with use_backend(name):
            results.append(_outputs_and_gradients(*arguments))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def _head(num_levels_below_noise, num_classes, num_features, dtype=torch.float64):
    rows = num_levels_below_noise * (num_classes or 1) + 1
    weight = torch.randn(rows, num_features, dtype=torch.float64).to(dtype)
    level = torch.tensor([num_levels_below_noise, 0, 1, 1, num_levels_below_noise - 1])
    if num_classes is None:
        return weight, level, None
    return (
        weight,
        level,
        torch.randn(5, num_classes, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32)),
    )


def _cotangent_and_gradients(weight, level, class_weight):
    leaves = [tensor.detach().requires_grad_() for tensor in (weight, class_weight) if tensor is not None]
    out = head_cotangent(leaves[0], level, *leaves[1:])
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
def test_cotangent_kernels_are_as_accurate_as_the_reference(kernels, poison_empty, head, dtype):
    weight, level, class_weight = _head(*head, dtype=dtype)
    with use_backend("reference"):
        plain = _cotangent_and_gradients(weight, level, class_weight)
        wide = None if class_weight is None else class_weight.double()
        truth = _cotangent_and_gradients(weight.double(), level, wide)
    with use_backend(kernels):
        got = _cotangent_and_gradients(weight, level, class_weight)
    for name, *values in zip(("cotangent", "d weight", "d class"), got, plain, truth, strict=False):
        assert_kernel_accurate(*values, name)


def test_more_classes_than_the_second_axis_of_a_grid_has_blocks(native):
    weight, level = torch.randn(65_536 + 1, 1, dtype=torch.float64), torch.tensor([0])
    class_weight = torch.randn(1, 65_536, dtype=torch.float64)
    arguments = (weight.float(), level, class_weight.float())
    with use_backend("reference"):
        plain, truth = (
            _cotangent_and_gradients(*arguments),
            _cotangent_and_gradients(weight, level, class_weight),
        )
    with use_backend(native):
        got = _cotangent_and_gradients(*arguments)
    for name, *values in zip(("cotangent", "d weight", "d class"), got, plain, truth, strict=True):
        assert_kernel_accurate(*values, name)


def test_cotangent_is_the_gradient_of_the_level_difference(backend):
    weight, level, _ = _head(6, None, 8)
    features = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    f = features @ weight.T
    difference = f[:, -1] - f.gather(1, level[:, None])[:, 0]
    (expected,) = torch.autograd.grad(difference.sum(), features)
    torch.testing.assert_close(head_cotangent(weight, level), expected)


def test_cotangent_of_the_marginal_and_its_parameter_gradient(backend):
    # F = z_N - logsumexp_c z[t, c]: its class weights are a softmax that depends on the weight too.
    weight, level, _ = _head(5, 3, 8)
    weight.requires_grad_()
    features = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(5, 8, dtype=torch.float64)

    def marginal(weight):
        z = torch.cat([features @ weight.T, torch.full((5, 2), -torch.inf, dtype=torch.float64)], 1)
        return z.gather(1, level[:, None] * 3 + torch.arange(3))

    of_noise = (features @ weight.T)[:, -1]
    difference = of_noise - marginal(weight).logsumexp(1)
    (expected,) = torch.autograd.grad(difference.sum(), features, create_graph=True)
    got = head_cotangent(weight, level, marginal(weight).softmax(1))
    torch.testing.assert_close(got, expected)
    assert float(got[0].detach().abs().max()) < 1e-12  # pure noise against itself
    (expected_gradient,) = torch.autograd.grad(expected, weight, probe, retain_graph=True)
    (gradient,) = torch.autograd.grad(got, weight, probe)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["joint"]], ids=["plain", "joint"])
def test_cotangent_gradcheck(kernels, head):
    weight, level, class_weight = _head(*head[:2], 4)
    leaves = [tensor.requires_grad_() for tensor in (weight, class_weight) if tensor is not None]
    with use_backend(kernels):
        assert torch.autograd.gradcheck(lambda w, *p: head_cotangent(w, level, *p), leaves, fast_mode=True)


def test_cotangent_second_derivative_raises():
    weight, level, class_weight = _head(5, 3, 4)
    weight.requires_grad_()
    with use_backend("cpp"):
        out = head_cotangent(weight, level, class_weight.requires_grad_())
        (gradient,) = torch.autograd.grad(out.sum(), class_weight, create_graph=True)
        with pytest.raises(RuntimeError, match="head_cotangent_backward has no derivative"):
            torch.autograd.grad(gradient.sum(), weight)


def _opcheck_cases():
    grad_x, x, a_t, s_t, eps = _images((2, 3, 4))
    grad_x.requires_grad_()
    weight, level, class_weight = _head(5, 3, 4)
    return {
        "denoise_epilogue": (grad_x, x, s_t),
        "denoise_x0": (grad_x, x, a_t, s_t),
        "denoise_loss": (grad_x, x, s_t, eps),
        "denoise_loss_backward": (grad_x.detach(), x, s_t, eps, s_t),
        "head_cotangent": (weight.requires_grad_(), level, class_weight),
        "head_cotangent_backward": (
            weight.detach(),
            level,
            class_weight,
            torch.randn(5, 4, dtype=torch.float64),
        ),
    }


@pytest.mark.cpu  # in fp64
@pytest.mark.parametrize("name", _opcheck_cases())
def test_opcheck(name):
    with use_backend("cpp"):
        torch.library.opcheck(getattr(torch.ops.cdm_fast, name).default, _opcheck_cases()[name])


def test_a_level_out_of_range_inside_a_compiled_step_gives_nan():
    weight = torch.randn(4, 5)
    compiled = torch.compile(lambda level: head_cotangent(weight, level), fullgraph=True, backend="aot_eager")
    out = compiled(torch.tensor([4, 2, -1, 3]))
    assert out.isnan().all(1).tolist() == [True, False, True, False]


IMAGES = dict(grad_x=torch.zeros(2, 3), x=torch.zeros(2, 3), s_t=torch.zeros(2), eps=torch.zeros(2, 3))
BAD_IMAGES = {
    "grad_x-int": (dict(grad_x=torch.zeros(2, 3, dtype=torch.int32)), TypeError, "grad_x: expected dtype"),
    "empty": (dict(grad_x=torch.zeros(0, 3)), ValueError, "grad_x: expected at least one"),
    "x-shape": (dict(x=torch.zeros(2, 4)), ValueError, r"x: expected shape \(2, 3\), got \(2, 4\)"),
    "x-device": (dict(x=torch.zeros(2, 3, device="meta")), ValueError, r"x: expected it on c\S+, got meta"),
    "s-shape": (dict(s_t=torch.zeros(3)), ValueError, r"s_t: expected shape \(2\)"),
    "s-grad": (dict(s_t=torch.zeros(2, requires_grad=True)), ValueError, "s_t: expected no gradient"),
    "eps-shape": (dict(eps=torch.zeros(2)), ValueError, "eps: expected shape"),
    "eps-type": (dict(eps=0.5), TypeError, "eps: expected a tensor, got float"),
}


@pytest.mark.parametrize(("change", "error", "says"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images_are_named(backend, change, error, says):
    with pytest.raises(error, match=says):
        denoise_loss(**(IMAGES | change))


HEAD = dict(weight_c=torch.zeros(7, 3), level=torch.zeros(2, dtype=torch.int64))
BAD_HEADS = {
    "weight-shape": (dict(weight_c=torch.zeros(7)), ValueError, r"weight_c: expected shape \(any, any\)"),
    "level-dtype": (dict(level=torch.zeros(2)), TypeError, "level: expected dtype int64"),
    "level-empty": (dict(level=HEAD["level"][:0]), ValueError, "level: expected at least one"),
    "level-high": (dict(level=HEAD["level"] + 7), ValueError, "level: expected values in 0..6, got 7"),
    "classes": (dict(class_weight=torch.ones(2, 4)), ValueError, "expected K that divides the 6 rows"),
    "class-level": (
        dict(class_weight=torch.ones(2, 3), level=HEAD["level"] + 3),
        ValueError,
        "level: expected values in 0..2, got 3",
    ),
    "class-batch": (dict(class_weight=torch.ones(3, 3)), ValueError, "class_weight: expected shape"),
}


@pytest.mark.parametrize(("change", "error", "says"), BAD_HEADS.values(), ids=BAD_HEADS.keys())
def test_bad_heads_are_named(backend, change, error, says):
    with pytest.raises(error, match=says):
        head_cotangent(**(HEAD | change))
