"""swiglu: against PyTorch, fp64 and double backward; every backend; dropout's mask; bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from cdm_fast.ops import swiglu, swiglu_vjp, swiglu_with_input, use_backend
from cdm_fast.ops.philox import Stream, philox_words
from tests.accuracy import TOLERANCE, assert_kernel_accurate, relative_error

SEED = torch.tensor([2024, 7])
CASES = {  # (B, N, H)
    "odd": (2, 5, 7),
    "one-channel": (3, 4, 1),
    "aligned": (2, 16, 64),
    "whole-and-rest": (1, 9, 83),
    "beyond-one-mask": (1, 2, 1100),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("y", "y/h", "vjp", "vjp/g", "vjp/h")
DROPOUT = {"keep": {}, "drop": {"dropout": 0.3, "seed": SEED}}


def _inputs(shape, dtype):
    """h, g, v, grad_y"""
    batch, tokens, hidden = shape
    wide, narrow = (batch, tokens, 2 * hidden), shape
    drawn = [torch.randn(size, dtype=torch.float64) for size in (wide, narrow, wide, narrow)]
    drawn[0] = 3 * drawn[0]
    return [tensor.to(dtype) for tensor in drawn]


def _all_quantities(inputs, **options):
    """The op, its VJP, and the gradients of both, in the order of NAMES."""
    h, g, v, grad_y = inputs
    h, g = (tensor.detach().requires_grad_() for tensor in (h, g))
    y = swiglu(h, **options)
    of_y = torch.autograd.grad(y, h, grad_y)
    vjp = swiglu_vjp(g, h, **options)
    return [tensor.detach() for tensor in (y, *of_y, vjp, *torch.autograd.grad(vjp, (g, h), v))]


def _check(backend, inputs, **options):
    with use_backend(backend):
        got = _all_quantities(inputs, **options)
    with use_backend("reference"):
        plain = _all_quantities(inputs, **options)
        truth = _all_quantities([tensor.double() for tensor in inputs], **options)
    for name, ours, theirs, exact in zip(NAMES, got, plain, truth, strict=True):
        if ours.dtype == torch.float64:
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert_kernel_accurate(ours, theirs, exact, name)


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_reference_is_silu_times_value(shape):
    h, g, v, _ = (tensor.requires_grad_() for tensor in _inputs(shape, torch.float64))
    gate, value = h.chunk(2, -1)
    expected = F.silu(gate) * value
    (expected_vjp,) = torch.autograd.grad(expected, h, g, create_graph=True)
    with use_backend("reference"):
        y, vjp = swiglu(h), swiglu_vjp(g, h)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(vjp, expected_vjp)
    of_vjp, of_expected = (torch.autograd.grad(of, (g, h), v) for of in (vjp, expected_vjp))
    for ours, theirs in zip(of_vjp, of_expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", DROPOUT.values(), ids=DROPOUT.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_cpp_and_cuda(native, poison_empty, shape, dtype, options):
    _check(native, _inputs(shape, dtype), **options)


@pytest.mark.cpu
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_cpp_on_lesser_processors(limit_isa, capability, dtype):
    limit_isa(capability)
    _check("cpp", _inputs((2, 5, 45), dtype), dropout=0.3, seed=SEED)


@pytest.mark.parametrize("options", DROPOUT.values(), ids=DROPOUT.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 30, 64)], ids=str)
def test_triton_interpreted(kernels, poison_empty, shape, dtype, options):
    # The interpreter rounds towards zero when it stores bf16: the accuracy rule of kernels is not for it.
    inputs = _inputs(shape, dtype)
    with use_backend(kernels):
        got = _all_quantities(inputs, **options)
    with use_backend("reference"):
        truth = _all_quantities([tensor.double() for tensor in inputs], **options)
    for name, ours, exact in zip(NAMES, got, truth, strict=True):
        assert relative_error(ours, exact) < TOLERANCE[dtype], name


@pytest.mark.cpu
@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(*(st.integers(1, high) for high in (3, 9, 70))), dropout=st.sampled_from([0.0, 0.4]))
def test_cpp_on_random_shapes(shape, dropout):
    _check("cpp", _inputs(shape, torch.float32), dropout=dropout, seed=SEED)


def test_the_dropout_mask_is_philox_in_contiguous_order(backend):
    h = torch.full((2, 3, 10), 2.0)
    words = philox_words(SEED, 30, Stream.DROPOUT).reshape(2, 3, 5)
    kept = torch.where(words >= 2**30, 1 / 0.75, 0.0)
    expected = swiglu(h) * kept
    torch.testing.assert_close(swiglu(h, dropout=0.25, seed=SEED), expected)


@pytest.mark.parametrize("hidden", [5, 8])
def test_a_part_of_a_batch_has_the_mask_of_the_whole(backend, hidden):
    h, g, _, _ = _inputs((5, 3, hidden), torch.float64)
    options = {"dropout": 0.4, "seed": SEED}
    whole, whole_vjp = swiglu(h, **options), swiglu_vjp(g, h, **options)
    options["seed"] = torch.tensor([*SEED.tolist(), 2])
    torch.testing.assert_close(swiglu(h[2:], **options), whole[2:])
    torch.testing.assert_close(swiglu_vjp(g[2:], h[2:], **options), whole_vjp[2:])


@pytest.mark.parametrize("options", DROPOUT.values(), ids=DROPOUT.keys())
def test_gradcheck(backend, options):
    h, g, _, _ = (tensor.requires_grad_() for tensor in _inputs((2, 3, 5), torch.float64))
    assert gradcheck(lambda h: swiglu(h, **options), h)
    assert gradcheck(lambda g, h: swiglu_vjp(g, h, **options), (g, h))


def _of_both_uses(inputs, **options):
    """y, the VJP, and the gradients of both together, added by `swiglu_with_input`, for g and h."""
    h, g, v, grad_y = inputs
    h, g = (tensor.detach().requires_grad_() for tensor in (h, g))
    y, again = swiglu_with_input(h, **options)
    vjp = swiglu_vjp(g, again, **options)
    of_both = torch.autograd.grad((y, vjp), (g, h), (grad_y, v))
    return [tensor.detach() for tensor in (y, vjp, *of_both)]


@pytest.mark.parametrize("options", DROPOUT.values(), ids=DROPOUT.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_gradients_of_two_uses_are_added(native, poison_empty, shape, dtype, options):
    inputs = _inputs(shape, dtype)
    with use_backend(native):
        got = _of_both_uses(inputs, **options)
    with use_backend("reference"):
        plain = _of_both_uses(inputs, **options)
        truth = _of_both_uses([tensor.double() for tensor in inputs], **options)
    for name, ours, theirs, exact in zip(("y", "vjp", "g", "h"), got, plain, truth, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
        else:
            assert_kernel_accurate(ours, theirs, exact, name)


def test_one_use_has_its_own_gradient(backend):
    h, g, v, grad_y = _inputs((2, 3, 5), torch.float64)
    h = h.requires_grad_()
    y, again = swiglu_with_input(h)
    (of_y,) = torch.autograd.grad(y, h, grad_y, retain_graph=True)
    torch.testing.assert_close(of_y, swiglu_vjp(grad_y, h.detach()))
    (of_input,) = torch.autograd.grad(again, h, v)
    assert torch.equal(of_input, v)
    plain_y, plain_h = swiglu_with_input(h.detach())
    assert torch.equal(plain_y, y) and not plain_h.requires_grad


def test_large_gates_are_neither_nan_nor_wrong(backend):
    h = torch.tensor([[[-200.0, -90.0, 90.0, 200.0, 1.0, 1.0, 1.0, 1.0]]])
    torch.testing.assert_close(swiglu(h), torch.tensor([[[0.0, 0.0, 90.0, 200.0]]]), rtol=1e-6, atol=1e-30)
    grad_h = swiglu_vjp(torch.ones(1, 1, 4), h)
    expected = torch.tensor([[[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 90.0, 200.0]]])
    torch.testing.assert_close(grad_h, expected, rtol=1e-6, atol=1e-30)


def test_strided_input_gives_the_same(backend):
    h, g, _, _ = _inputs((2, 6, 5), torch.float64)
    strided, g_strided = (tensor.mT.contiguous().mT for tensor in (h, g))
    torch.testing.assert_close(swiglu(strided), swiglu(h))
    torch.testing.assert_close(swiglu_vjp(g_strided, strided), swiglu_vjp(g, h))


def test_a_second_derivative_of_a_kernel_is_refused(native):
    h, g, v, _ = (tensor.requires_grad_() for tensor in _inputs((2, 3, 4), torch.float32))
    with use_backend(native):
        (grad_h,) = torch.autograd.grad(swiglu_vjp(g, h), h, v, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad_h.sum().backward()


def test_the_ops_themselves_refuse_what_they_cannot_read(native):
    h = torch.randn(2, 4, 6)
    with use_backend(native):
        with pytest.raises(RuntimeError, match="contiguous tensors"):
            torch.ops.cdm_fast.swiglu(h.mT.contiguous().mT, None, 0.0)
        with pytest.raises(RuntimeError, match="a seed of three numbers"):
            torch.ops.cdm_fast.swiglu(h, None, 0.5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(native, dropout):
    h, g, v, _ = _inputs((2, 5, 7), torch.float32)
    h, g = h.requires_grad_(), g.requires_grad_()
    seed = torch.tensor([1, 2, 0]) if dropout else None
    ops = torch.ops.cdm_fast
    with use_backend(native):
        torch.library.opcheck(ops.swiglu.default, (h, seed, dropout))
        torch.library.opcheck(ops.swiglu_vjp.default, (g, h, seed, dropout))
        plain = (v, g.detach(), h.detach(), seed, dropout)
        torch.library.opcheck(ops.swiglu_vjp_backward.default, plain)


def test_opcheck_of_the_sum(native):
    if native != "cpp":
        pytest.skip("the C++ kernel alone adds")
    h, g, v, _ = _inputs((2, 5, 7), torch.float32)
    for plus in (v, None):
        torch.library.opcheck(torch.ops.cdm_fast.swiglu_vjp_plus.default, (g, h, plus, None, 0.0))


BAD_INPUT = {
    "h-int": ({"h": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "h: expected dtype"),
    "h-shape": ({"h": torch.ones(3, 4)}, ValueError, r"h: expected shape \(any, any, any\)"),
    "h-odd": ({"h": torch.ones(2, 3, 5)}, ValueError, "h: expected an even number of channels, got 5"),
    "empty": ({"h": torch.ones(0, 3, 4)}, ValueError, "at least one example"),
    "dropout-one": ({"dropout": 1.0, "seed": SEED}, ValueError, r"dropout: .* in \[0, 1\), got 1.0"),
    "no-seed": ({"dropout": 0.5}, ValueError, "seed: dropout > 0 needs"),
    "seed-shape": ({"dropout": 0.5, "seed": SEED[:1]}, ValueError, "seed: expected shape"),
    "seed-dtype": ({"dropout": 0.5, "seed": SEED.int()}, TypeError, "seed: expected an int64"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input(backend, change, error, message):
    with pytest.raises(error, match=message):
        swiglu(**({"h": torch.randn(2, 3, 4)} | change))


@pytest.mark.parametrize("g", [torch.randn(2, 3, 4), torch.randn(2, 3)], ids=["wide", "flat"])
def test_bad_cotangent(backend, g):
    with pytest.raises(ValueError, match=r"g: expected shape \(2, 3, 2\)"):
        swiglu_vjp(g, torch.randn(2, 3, 4))
