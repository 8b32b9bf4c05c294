"""from_noise_down: against its definition and fp64; its transpose; every backend; bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from cdm_fast.ops import from_noise_down, use_backend
from tests.accuracy import assert_kernel_accurate

CASES = {  # levels, rows of a level, of these from noise, width (None: a bias)
    "joint": (5, 3, 3, 7),
    "low-rank": (9, 4, 1, 5),
    "bias": (6, 3, 1, None),
    "one-row": (4, 1, 1, 3),
    "none-from-noise": (4, 2, 0, 3),
    "one-level": (1, 2, 1, 3),
    "beyond-one-piece": (40, 6, 2, 131),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def _rows(levels, rows_per_level, width, dtype=torch.float64):
    shape = (levels * rows_per_level + 1,) if width is None else (levels * rows_per_level + 1, width)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _with_derivatives(rows, *sizes):
    """The cumulated rows, and the gradient of a weighted sum of them."""
    rows = rows.detach().requires_grad_()
    cumulated = from_noise_down(rows, *sizes)
    weight = torch.linspace(-1, 1, cumulated.numel(), dtype=torch.float64).view_as(cumulated).to(rows.dtype)
    (gradient,) = torch.autograd.grad((weight * cumulated).sum(), rows)
    return cumulated.detach(), gradient


def _check(backend, rows, *sizes):
    with use_backend(backend):
        got = _with_derivatives(rows, *sizes)
    with use_backend("reference"):
        plain = _with_derivatives(rows, *sizes)
        truth = _with_derivatives(rows.double(), *sizes)
    for name, ours, theirs, exact in zip(("rows", "gradient"), got, plain, truth, strict=True):
        assert_kernel_accurate(ours, theirs, exact, name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_definition(backend, case):
    levels, rows_per_level, common, width = case
    rows = _rows(levels, rows_per_level, width)
    found = from_noise_down(rows, rows_per_level, common)
    assert torch.equal(found[-1], rows[-1])
    for t in range(levels):
        for j in range(rows_per_level):
            above = sum(rows[u * rows_per_level + j] for u in range(t, levels))
            expected = (rows[-1] if j < common else 0) - above
            torch.testing.assert_close(found[t * rows_per_level + j], expected)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cpp(native, poison_empty, case, dtype):
    levels, rows_per_level, common, width = case
    _check(native, _rows(levels, rows_per_level, width, dtype), rows_per_level, common)


@pytest.mark.cpu
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_cpp_on_lesser_processors(limit_isa, capability, dtype):
    limit_isa(capability)
    _check("cpp", _rows(7, 3, 45, dtype), 3, 1)


@pytest.mark.cpu
@settings(max_examples=25, deadline=None)
@given(sizes=st.tuples(*(st.integers(1, high) for high in (9, 5, 40))), data=st.data())
def test_cpp_on_random_shapes(sizes, data):
    levels, rows_per_level, width = sizes
    common = data.draw(st.integers(0, rows_per_level))
    _check("cpp", _rows(levels, rows_per_level, width, torch.float32), rows_per_level, common)


@pytest.mark.parametrize("width", [None, 3])
def test_gradcheck_of_both_orders(backend, width):
    rows = _rows(4, 3, width).requires_grad_()
    assert gradcheck(lambda rows: from_noise_down(rows, 3, 1), rows)
    assert gradgradcheck(lambda rows: from_noise_down(rows, 3, 1).square(), rows)


def test_strided_rows_give_the_same(backend):
    rows = _rows(5, 2, 6)
    strided = rows.t().contiguous().t()
    assert torch.equal(from_noise_down(strided, 2, 1), from_noise_down(rows, 2, 1))


@pytest.mark.cpu
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(native, transposed):
    rows = _rows(5, 3, 4, torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.cdm_fast.from_noise_down.default, (rows, 3, 1, transposed))


@pytest.mark.cpu
def test_the_op_itself_refuses_what_it_cannot_read(native):
    with pytest.raises(RuntimeError, match="contiguous tensors"):
        torch.ops.cdm_fast.from_noise_down(torch.randn(4, 7).t(), 2, 1, False)


BAD_INPUT = {
    "int": (torch.ones(7, 2, dtype=torch.int64), 2, 1, TypeError, "rows: expected dtype"),
    "scalar": (torch.ones(()), 2, 1, ValueError, "at least one example"),
    "no-level": (torch.ones(1, 2), 1, 1, ValueError, "rows_per_level: 1 rows are not one more than"),
    "a-part-of-a-level": (torch.ones(8, 2), 3, 1, ValueError, "8 rows are not one more than several times 3"),
    "no-row": (torch.ones(7, 2), 0, 0, ValueError, "several times 0"),
    "too-many-from-noise": (torch.ones(7, 2), 2, 3, ValueError, r"common: expected 0\.\.2, got 3"),
}


@pytest.mark.parametrize(
    ("rows", "rows_per_level", "common", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT
)
def test_bad_input(backend, rows, rows_per_level, common, error, message):
    with pytest.raises(error, match=message):
        from_noise_down(rows, rows_per_level, common)
