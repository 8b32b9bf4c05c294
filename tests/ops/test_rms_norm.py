"""rms_norm: against PyTorch, fp64 and double backward; every backend; bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from cdm_fast.ops import rms_norm, rms_norm_vjp, use_backend
from tests.accuracy import TOLERANCE, assert_kernel_accurate, relative_error

EPS = 1e-5
CASES = {  # (B, N, C)
    "odd": (2, 5, 7),
    "three-channels": (3, 4, 3),
    "one-token": (3, 1, 24),
    "aligned": (2, 16, 64),
    "whole-and-rest": (1, 9, 83),
    "many-tokens": (2, 70, 16),
}
LARGE_CASES = {"network": (4, 64, 512), "wide": (1, 3, 2100), "long": (1, 300, 40)}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("y", "rstd", "y/x", "y/weight", "vjp", "vjp/g", "vjp/x", "vjp/weight")


def _inputs(shape, dtype, per_image=False):
    """x, g, v, grad_y and weight; x is neither centred nor of unit size."""
    tokens = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    tokens[0] = 3 * tokens[0] + 1
    weight = torch.randn((shape[0], shape[2]) if per_image else shape[2], dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (*tokens, weight)]


def _all_quantities(inputs, eps=EPS):
    """The op, its VJP, and the gradients of both, in the order of NAMES."""
    x, g, v, grad_y, weight = inputs
    x, g, weight = (tensor.detach().requires_grad_() for tensor in (x, g, weight))
    y, rstd = rms_norm(x, weight, eps)
    of_y = torch.autograd.grad(y, (x, weight), grad_y)
    vjp = rms_norm_vjp(g, x, weight, rstd)
    of_vjp = torch.autograd.grad(vjp, (g, x, weight), v, materialize_grads=True)
    return [tensor.detach() for tensor in (y, rstd, *of_y, vjp, *of_vjp)]


def _check(backend, inputs):
    with use_backend(backend):
        got = _all_quantities(inputs)
    with use_backend("reference"):
        plain = _all_quantities(inputs)
        truth = _all_quantities([tensor.double() for tensor in inputs])
    for name, ours, theirs, exact in zip(NAMES, got, plain, truth, strict=True):
        if ours.dtype == torch.float64:
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert_kernel_accurate(ours, theirs, exact, name)


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_reference_is_pytorchs_rms_norm(shape):
    x, g, v, _, weight = (tensor.requires_grad_() for tensor in _inputs(shape, torch.float64))
    expected = F.rms_norm(x, shape[2:], weight, EPS)
    (expected_vjp,) = torch.autograd.grad(expected, x, g, create_graph=True)
    with use_backend("reference"):
        y, rstd = rms_norm(x, weight, EPS)
        vjp = rms_norm_vjp(g, x, weight, rstd)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(vjp, expected_vjp)
    of_vjp = torch.autograd.grad(vjp, (g, x, weight), v, materialize_grads=True)
    of_expected = torch.autograd.grad(expected_vjp, (g, x, weight), v, materialize_grads=True)
    for ours, theirs in zip(of_vjp, of_expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per-image"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_cpp_and_cuda(native, poison_empty, shape, dtype, per_image):
    _check(native, _inputs(shape, dtype, per_image))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", LARGE_CASES.values(), ids=LARGE_CASES.keys())
def test_cpp_and_cuda_where_work_is_divided(native, poison_empty, shape, dtype):
    _check(native, _inputs(shape, dtype))


@pytest.mark.cpu
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_cpp_on_lesser_processors(limit_isa, capability, dtype):
    limit_isa(capability)
    _check("cpp", _inputs((2, 5, 45), dtype))


@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per-image"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 40, 100)], ids=str)
def test_triton_interpreted(kernels, poison_empty, shape, dtype, per_image):
    # The interpreter rounds towards zero when it stores bf16: the accuracy rule of kernels is not for it.
    inputs = _inputs(shape, dtype, per_image)
    with use_backend(kernels):
        got = _all_quantities(inputs)
    with use_backend("reference"):
        truth = _all_quantities([tensor.double() for tensor in inputs])
    for name, ours, exact in zip(NAMES, got, truth, strict=True):
        assert relative_error(ours, exact) < TOLERANCE[dtype], name


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(*(st.integers(1, high) for high in (3, 40, 70))), per_image=st.booleans())
def test_cpp_on_random_shapes(shape, per_image):
    """In fp64, since the gradients of a token of one or two channels are differences of equal numbers."""
    _check("cpp", _inputs(shape, torch.float64, per_image))


def test_gradcheck(backend):
    """In fp64: the op, and its VJP as a function of g, x and weight, where rstd follows x."""
    x, g, _, _, weight = _inputs((2, 3, 5), torch.float64, per_image=True)
    x, g, weight = (tensor.requires_grad_() for tensor in (x, g, weight))
    assert gradcheck(lambda x, weight: rms_norm(x, weight, EPS)[0], (x, weight))

    def vjp(g, x, weight):
        return rms_norm_vjp(g, x, weight, rms_norm(x, weight, EPS)[1])

    assert gradcheck(vjp, (g, x, weight))


def test_strided_tokens_give_the_same(backend):
    x, g, _, _, weight = _inputs((2, 6, 10), torch.float64)
    y, rstd = rms_norm(x, weight)
    vjp = rms_norm_vjp(g, x, weight, rstd)
    strided, g_strided = (tensor.mT.contiguous().mT for tensor in (x, g))
    torch.testing.assert_close(rms_norm(strided, weight)[0], y)
    torch.testing.assert_close(rms_norm_vjp(g_strided, strided, weight, rstd), vjp)


def test_a_second_derivative_of_a_kernel_is_refused(native):
    x, g, v, _, weight = (tensor.requires_grad_() for tensor in _inputs((2, 3, 4), torch.float32))
    with use_backend(native):
        vjp = rms_norm_vjp(g, x, weight, rms_norm(x, weight)[1])
        (grad_x,) = torch.autograd.grad(vjp, x, v, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad_x.sum().backward()


def test_the_ops_themselves_refuse_what_has_gaps(native):
    x, weight = torch.randn(2, 4, 6), torch.ones(6)
    with use_backend(native), pytest.raises(RuntimeError, match="contiguous tensors"):
        torch.ops.cdm_fast.rms_norm(x.mT.contiguous().mT, weight, EPS)


def test_opcheck(native):
    x, g, v, _, weight = _inputs((2, 5, 7), torch.float32, per_image=True)
    x, g, weight = (tensor.requires_grad_() for tensor in (x, g, weight))
    rstd = rms_norm(x, weight)[1].detach()
    ops = torch.ops.cdm_fast
    with use_backend(native):
        torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS))
        torch.library.opcheck(ops.rms_norm_vjp.default, (g, x, weight, rstd))
        plain = [tensor.detach() for tensor in (v, g, x, weight, rstd)]
        torch.library.opcheck(ops.rms_norm_backward.default, tuple(plain[1:]))
        torch.library.opcheck(ops.rms_norm_vjp_backward.default, tuple(plain))


BAD_INPUT = {
    "x-int": ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "x: expected dtype"),
    "x-shape": ({"x": torch.ones(3, 4)}, ValueError, r"x: expected shape \(any, any, any\)"),
    "empty": ({"x": torch.ones(0, 3, 4)}, ValueError, "at least one example"),
    "weight-shape": ({"weight": torch.ones(3)}, ValueError, r"weight: expected shape \(4,\) or \(2, 4\)"),
    "weight-int": ({"weight": torch.ones(4, dtype=torch.int64)}, TypeError, "weight: expected dtype"),
    "weight-device": ({"weight": torch.ones(4, device="meta")}, ValueError, "weight: expected it on"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input(backend, change, error, message):
    with pytest.raises(error, match=message):
        rms_norm(**({"x": torch.randn(2, 3, 4), "weight": torch.ones(4)} | change))


BAD_COTANGENT = {
    "g-shape": ({"g": torch.randn(2, 3, 5)}, ValueError, "g: expected shape"),
    "g-dtype": ({"g": torch.randn(2, 3, 4).double()}, TypeError, "g: expected dtype float32"),
    "rstd-shape": ({"rstd": torch.ones(2, 4)}, ValueError, r"rstd: expected shape \(2, 3\)"),
    "rstd-dtype": ({"rstd": torch.ones(2, 3).bfloat16()}, TypeError, "rstd: expected dtype float32"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_COTANGENT.values(), ids=BAD_COTANGENT.keys())
def test_bad_cotangent(backend, change, error, message):
    arguments = {
        "g": torch.randn(2, 3, 4),
        "x": torch.randn(2, 3, 4),
        "weight": torch.ones(4),
        "rstd": torch.ones(2, 3),
    }
    with pytest.raises(error, match=message):
        rms_norm_vjp(**(arguments | change))
