"""group_norm_silu: against PyTorch, fp64 and double backward; every backend; dropout's mask; bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from cdm_fast.ops import backend as _backend
from cdm_fast.ops import group_norm_silu, group_norm_silu_vjp, use_backend
from cdm_fast.ops.dropout import dropout_mask
from cdm_fast.ops.philox import Stream, philox_words
from tests.accuracy import TOLERANCE, assert_kernel_accurate, relative_error

EPS = 1e-5
SEED = torch.tensor([2024, 7])
# (B, C, *spatial), groups
CASES = {
    "odd": ((2, 6, 3, 5), 2),
    "one-group": ((1, 30, 7, 9), 1),
    "aligned": ((2, 64, 4, 4), 32),
    "group-of-12": ((1, 36, 6, 7), 3),
    "tokens": ((2, 8, 11), 4),
    "vectors": ((3, 24), 2),
}
LARGE_CASES = {"network": ((2, 128, 16, 16), 32), "long": ((1, 4, 70, 33), 1), "wide": ((1, 384, 9, 9), 32)}
# (B, C, *spatial), groups, channels of the first of two pieces
SPLIT_CASES = {
    "within-a-group": ((2, 9, 3, 5), 3, 5),
    "one-group": ((1, 30, 7, 9), 1, 1),
    "vectors-and-rest": ((2, 96, 4, 5), 32, 64),
    "between-groups": ((2, 64, 4, 4), 2, 32),
    "vectors": ((3, 24), 2, 17),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("y", "mean", "rstd", "y/x", "y/weight", "y/bias", "vjp", "vjp/g", "vjp/x", "vjp/weight", "vjp/bias")


def _inputs(shape, dtype, channels_last=False, per_image=False):
    """x, g, v, grad_y and weight, bias; x is far from centred, which loses digits in careless statistics."""
    images = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    images[0] = 3 * images[0] + 5
    if channels_last:
        images = [image.movedim(1, -1).contiguous().movedim(-1, 1) for image in images]
    parameters = [torch.randn(shape[:2] if per_image else shape[1], dtype=torch.float64) for _ in range(2)]
    return [tensor.to(dtype) for tensor in images + parameters]


def _all_quantities(inputs, groups, **options):
    """The op, its VJP, and the gradients of both, in the order of NAMES."""
    x, g, v, grad_y, weight, bias = inputs
    x, g, weight, bias = (tensor.detach().requires_grad_() for tensor in (x, g, weight, bias))
    y, mean, rstd = group_norm_silu(x, weight, bias, groups, EPS, **options)
    of_y = torch.autograd.grad(y, (x, weight, bias), grad_y)
    vjp = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, groups, **options)
    of_vjp = torch.autograd.grad(vjp, (g, x, weight, bias), v, materialize_grads=True)
    return [tensor.detach() for tensor in (y, mean, rstd, *of_y, vjp, *of_vjp)]


def _pieces(tensor, split):
    """The two parts of a tensor along its channels, each a dense tensor of the same layout."""
    if tensor.is_contiguous():
        return [tensor[:, :split].contiguous(), tensor[:, split:].contiguous()]
    return [
        piece.movedim(1, -1).contiguous().movedim(-1, 1) for piece in (tensor[:, :split], tensor[:, split:])
    ]


def _all_quantities_in_two(inputs, groups, split, **options):
    """As `_all_quantities`, with x, v and the gradients of x in two pieces."""
    x, g, v, grad_y, weight, bias = inputs
    x, skip = (piece.requires_grad_() for piece in _pieces(x, split))
    g, weight, bias = (tensor.detach().requires_grad_() for tensor in (g, weight, bias))
    options["skip"] = skip
    y, mean, rstd = group_norm_silu(x, weight, bias, groups, EPS, **options)
    grad_x, grad_skip, *of_y = torch.autograd.grad(y, (x, skip, weight, bias), grad_y)
    vjp = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, groups, **options)
    leaves = g, x, skip, weight, bias
    of_g, of_x, of_skip, *of_vjp = torch.autograd.grad(vjp, leaves, _pieces(v, split), materialize_grads=True)
    joined = [torch.cat(pair, 1) for pair in ((grad_x, grad_skip), vjp, (of_x, of_skip))]
    results = y, mean, rstd, joined[0], *of_y, joined[1], of_g, joined[2], *of_vjp
    return [tensor.detach() for tensor in results]


def _assert_accurate(got, plain, truth):
    for name, ours, theirs, exact in zip(NAMES, got, plain, truth, strict=True):
        if ours.dtype == torch.float64:
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert_kernel_accurate(ours, theirs, exact, name)


def _check(backend, inputs, groups, **options):
    with use_backend(backend):
        got = _all_quantities(inputs, groups, **options)
    with use_backend("reference"):
        plain = _all_quantities(inputs, groups, **options)
        truth = _all_quantities([tensor.double() for tensor in inputs], groups, **options)
    _assert_accurate(got, plain, truth)
    return got


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize(("shape", "groups"), CASES.values(), ids=CASES.keys())
def test_reference_is_group_norm_then_silu(shape, groups, silu):
    x, g, v, _, weight, bias = _inputs(shape, torch.float64)
    x, g, weight, bias = (tensor.requires_grad_() for tensor in (x, g, weight, bias))
    expected = F.group_norm(x, groups, weight, bias, EPS)
    expected = F.silu(expected) if silu else expected
    (expected_vjp,) = torch.autograd.grad(expected, x, g, create_graph=True)
    with use_backend("reference"):
        y, mean, rstd = group_norm_silu(x, weight, bias, groups, EPS, silu=silu)
        vjp = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, groups, silu=silu)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(vjp, expected_vjp)
    leaves = (g, x, weight, bias)
    of_vjp = torch.autograd.grad(vjp, leaves, v, materialize_grads=True)
    of_expected = torch.autograd.grad(expected_vjp, leaves, v, materialize_grads=True)
    for ours, theirs in zip(of_vjp, of_expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["keep", "drop"])
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("shape", "groups"), CASES.values(), ids=CASES.keys())
def test_cpp_and_cuda(native, poison_empty, shape, groups, dtype, channels_last, silu, dropout):
    inputs = _inputs(shape, dtype, channels_last, per_image=silu and len(shape) == 4)
    _check(native, inputs, groups, silu=silu, dropout=dropout, seed=SEED)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("shape", "groups"), LARGE_CASES.values(), ids=LARGE_CASES.keys())
def test_cpp_and_cuda_where_work_is_divided(native, poison_empty, shape, groups, dtype, channels_last):
    _check(native, _inputs(shape, dtype, channels_last), groups, dropout=0.1, seed=SEED)


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_cpp_on_lesser_processors(needs_cpp, capability, dtype):
    from cdm_fast import _C

    best = _C.cpu_capability()
    _C.limit_cpu_capability(capability)
    try:
        for channels_last in (False, True):
            inputs = _inputs((2, 24, 5, 7), dtype, channels_last)
            _check("cpp", inputs, 4, dropout=0.3, seed=SEED)
    finally:
        _C.limit_cpu_capability(best)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("options", [{}, {"silu": False}, {"dropout": 0.3, "seed": SEED}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=DTYPES.keys())
def test_triton_interpreted(needs_triton, poison_empty, dtype, options, channels_last):
    # The interpreter rounds towards zero when it stores bf16: the accuracy rule of kernels is not for it.
    inputs = _inputs((1, 12, 5, 7), dtype, channels_last, per_image=True)
    with use_backend("triton"):
        got = _all_quantities(inputs, 4, **options)
    with use_backend("reference"):
        truth = _all_quantities([tensor.double() for tensor in inputs], 4, **options)
    for name, ours, exact in zip(NAMES, got, truth, strict=True):
        assert relative_error(ours, exact) < TOLERANCE[dtype], name


# (B, C, *spatial), groups, channels of the first of two pieces or None; elements and channels of a tile
SPLIT_KERNELS = {
    "one-chunk": ((2, 12, 5, 7), 4, None, 2048, 128),
    "chunks-and-tiles": ((2, 12, 3, 3), 4, None, 8, 4),
    "group-over-tiles": ((1, 36, 6, 7), 3, None, 64, 16),
    "two-pieces": ((2, 9, 3, 5), 3, 5, 8, 4),
    "two-pieces-in-fours": ((1, 24, 3, 5), 2, 8, 32, 8),
}


@pytest.fixture(params=SPLIT_KERNELS.values(), ids=SPLIT_KERNELS.keys())
def split_kernels(request, needs_triton, monkeypatch):
    """(shape, groups, split) of a case, for which Triton splits groups over programs."""
    from cdm_fast.kernels import group_norm_silu, group_norm_silu_split

    *case, elements, width = request.param
    monkeypatch.setattr(group_norm_silu, "SPLIT_PIXELS", 0)
    monkeypatch.setattr(group_norm_silu_split, "_ELEMENTS", elements)
    monkeypatch.setattr(group_norm_silu_split, "_ELEMENTS_OF_MANY_SUMS", elements)
    monkeypatch.setattr(group_norm_silu_split, "_WIDTH", width)
    return case


# The dtype is that of loads and stores, which all cases share. The interpreter is slow: two take every dtype.
SPLIT_DTYPES = {
    f"{case}-{dtype}": (SPLIT_KERNELS[case], DTYPES[dtype])
    for case in SPLIT_KERNELS
    for dtype in (DTYPES if case in ("one-chunk", "two-pieces-in-fours") else ("fp32",))
}


@pytest.mark.parametrize("options", [{}, {"silu": False}, {"dropout": 0.3, "seed": SEED}], ids=str)
@pytest.mark.parametrize(
    "split_kernels, dtype", SPLIT_DTYPES.values(), ids=SPLIT_DTYPES.keys(), indirect=["split_kernels"]
)
def test_triton_splits_groups_over_programs(split_kernels, poison_empty, dtype, options):
    shape, groups, split = split_kernels
    inputs = _inputs(shape, dtype, channels_last=True, per_image=shape[0] == 2)
    with use_backend("triton"):
        if split is None:
            got = _all_quantities(inputs, groups, **options)
        else:
            got = _all_quantities_in_two(inputs, groups, split, **options)
    with use_backend("reference"):
        plain = _all_quantities(inputs, groups, **options)
        truth = _all_quantities([tensor.double() for tensor in inputs], groups, **options)
    if dtype != torch.bfloat16:
        _assert_accurate(got, plain, truth)
    for name, ours, exact in zip(NAMES, got, truth, strict=True):  # the interpreter truncates to bf16
        assert relative_error(ours, exact) < TOLERANCE[dtype], name


def test_a_group_too_large_for_shared_memory_is_refused_and_leaves_no_error(native):
    inputs, small = _inputs((1, 4000, 2, 2), torch.float32), _inputs((2, 6, 3, 5), torch.float32)
    if native == "cuda":
        with use_backend(native), pytest.raises(RuntimeError, match="4000 channels in a group are more than"):
            group_norm_silu(inputs[0], *inputs[4:], 1)
    else:
        _check(native, inputs, 1)
    _check(native, small, 2)


def test_a_group_that_needs_more_shared_memory_than_a_launch_has_unasked(native):
    _check(native, _inputs((1, 1000, 2, 2), torch.float32), 1)


TWO_PIECES = {
    f"{backend}-{case}": (backend, *arguments)
    for backend in ("reference", "native")
    for case, arguments in SPLIT_CASES.items()
} | {"triton-within-a-group": ("triton", *SPLIT_CASES["within-a-group"])}  # interpreted: slow


@pytest.mark.parametrize("options", [{}, {"silu": False}, {"dropout": 0.3, "seed": SEED}], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("name", "shape", "groups", "split"), TWO_PIECES.values(), ids=TWO_PIECES.keys())
def test_two_pieces_give_what_their_concatenation_gives(
    request, poison_empty, name, shape, groups, split, dtype, channels_last, options
):
    name = request.getfixturevalue("native") if name == "native" else name
    _skip_without(name)
    inputs = _inputs(shape, dtype, channels_last, per_image=split == 5)
    with use_backend(name):
        got = _all_quantities_in_two(inputs, groups, split, **options)
        expected = _all_quantities(inputs, groups, **options)
    for quantity, ours, theirs in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, q=quantity: f"{q}: {m}")


def test_two_pieces_of_different_layouts(backend):
    x, g, _, _, weight, bias = _inputs((2, 9, 4, 5), torch.float64)
    y, mean, rstd = group_norm_silu(x, weight, bias, 3)
    vjp = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, 3)
    x, skip = x[:, :5].to(memory_format=torch.channels_last), x[:, 5:]
    torch.testing.assert_close(group_norm_silu(x, weight, bias, 3, skip=skip)[0], y)
    pair = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, 3, skip=skip)
    torch.testing.assert_close(torch.cat(pair, 1), vjp)


def test_outputs_are_like_the_input_in_dtype_and_layout(backend):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 4, 6).to(torch.bfloat16).to(memory_format=memory_format)
        weight, bias = torch.ones(8), torch.zeros(8)
        y, mean, rstd = group_norm_silu(x, weight, bias, 2)
        vjp = group_norm_silu_vjp(torch.randn_like(x), x, weight, bias, mean, rstd, 2)
        for result in (y, vjp):
            assert result.dtype == torch.bfloat16
            assert result.is_contiguous(memory_format=memory_format)
        assert mean.shape == rstd.shape == (2, 2)
        assert mean.dtype == rstd.dtype == torch.float32


def test_strided_inputs_and_mixed_layouts_give_the_same(backend):
    x, g, _, _, weight, bias = _inputs((2, 6, 4, 10), torch.float64)
    y, mean, rstd = group_norm_silu(x, weight, bias, 3)
    vjp = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, 3)
    strided = torch.stack((x, x), -1)[..., 0]
    g_last = g.to(memory_format=torch.channels_last)
    torch.testing.assert_close(group_norm_silu(strided, weight, bias, 3)[0], y)
    torch.testing.assert_close(group_norm_silu_vjp(g_last, strided, weight, bias, mean, rstd, 3), vjp)


def test_strided_statistics_give_the_same(backend):
    x, g, _, _, weight, bias = _inputs((2, 6, 4, 10), torch.float64)
    _, mean, rstd = group_norm_silu(x, weight, bias, 3)
    expected = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, 3)
    strided = [torch.stack((statistic, statistic), -1)[..., 0] for statistic in (mean, rstd)]
    torch.testing.assert_close(group_norm_silu_vjp(g, x, weight, bias, *strided, 3), expected)


def test_the_ops_themselves_refuse_what_is_not_dense_or_not_in_one_layout(native):
    x, g, _, _, weight, bias = _inputs((2, 6, 4, 5), torch.float64)
    mean = rstd = torch.ones(2, 3, dtype=torch.float64)
    ops, options = torch.ops.cdm_fast, (None, 3, True, 0.0)
    g_last = g.to(memory_format=torch.channels_last)
    for wrong in (x[:1].expand_as(x), x.transpose(2, 3)):
        with pytest.raises(RuntimeError, match="dense tensors, all in x's layout"):
            ops.group_norm_silu(wrong, None, weight, bias, *options, EPS)
    with pytest.raises(RuntimeError, match="dense tensors, all in x's layout"):
        ops.group_norm_silu_vjp(g_last, x, None, weight, bias, mean, rstd, *options)
    with pytest.raises(RuntimeError, match="dense tensors, all in x's layout"):
        ops.group_norm_silu_vjp_backward(x, None, g, g_last, None, weight, bias, mean, rstd, *options)


def test_bf16_results_are_those_of_fp32_rounded_to_nearest_even(needs_cpp, limit_isa):
    x = torch.randn(4, 32, 15, 17).bfloat16()
    x[0, 0, 0, 0], x[1, 9, 0, 0] = float("nan"), float("inf")
    weight, bias = torch.randn(32), torch.randn(32)
    for isa in ("baseline", "avx2", "avx512"):
        limit_isa(isa)
        with use_backend("cpp"):
            y = group_norm_silu(x, weight, bias, 4, silu=False)[0]
            expected = group_norm_silu(x.float(), weight, bias, 4, silu=False)[0].bfloat16()
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_not_there_is_zero(backend):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    y = group_norm_silu(x, torch.ones(4), torch.zeros(4), 2)[0]
    assert torch.autograd.grad(Cut.apply(y).sum(), x, allow_unused=True) == (None,)


def test_one_weight_per_channel_and_one_bias_per_image(backend):
    x, g, _, _, weight, _ = _inputs((2, 6, 3, 3), torch.float64)
    bias = torch.randn(2, 6, dtype=torch.float64).requires_grad_()
    weight.requires_grad_()
    both = [tensor.detach().expand(2, 6).requires_grad_() for tensor in (weight, bias)]
    y = group_norm_silu(x, weight, bias, 3)[0]
    expected = group_norm_silu(x, *both, 3)[0]
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y, (weight, bias), g)
    grads_of_both = torch.autograd.grad(expected, both, g)
    torch.testing.assert_close(grads[0], grads_of_both[0].sum(0))
    torch.testing.assert_close(grads[1], grads_of_both[1])


def test_gradcheck_of_the_op_and_of_its_vjp(needs_cpp):
    x, g, _, _, weight, bias = _inputs((2, 4, 3, 2), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def vjp(g, x, weight, bias):
        _, mean, rstd = group_norm_silu(x, weight, bias, 2, dropout=0.2, seed=SEED)
        return group_norm_silu_vjp(g, x, weight, bias, mean, rstd, 2, dropout=0.2, seed=SEED)

    with use_backend("cpp"):
        assert gradcheck(lambda *tensors: group_norm_silu(*tensors, 2)[0], leaves)
        assert gradcheck(vjp, (g.requires_grad_(), *leaves))


def test_gradcheck_in_two_pieces(needs_cpp):
    x, g, _, _, weight, bias = _inputs((2, 6, 3, 2), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*_pieces(x, 4), weight, bias)]

    def op(x, skip, weight, bias):
        return group_norm_silu(x, weight, bias, 2, skip=skip)

    def vjp(g, x, skip, weight, bias):
        _, mean, rstd = op(x, skip, weight, bias)
        return group_norm_silu_vjp(g, x, weight, bias, mean, rstd, 2, skip=skip)

    with use_backend("cpp"):
        assert gradcheck(lambda *tensors: op(*tensors)[0], leaves)
        assert gradcheck(vjp, (g.requires_grad_(), *leaves))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 5),
    group_channels=st.integers(1, 9),
    height=st.integers(1, 9),
    width=st.integers(2, 20),
    channels_last=st.booleans(),
)
def test_any_shape(needs_cpp, batch, groups, group_channels, height, width, channels_last):
    # In a group of two, xhat is 1 and -1 whatever x is: every gradient is rounding error and has no accuracy.
    assume(group_channels * height * width >= 16)
    inputs = _inputs((batch, groups * group_channels, height, width), torch.float32, channels_last)
    with use_backend("cpp"):
        got = _all_quantities(inputs, groups)
    with use_backend("reference"):
        truth = _all_quantities([tensor.double() for tensor in inputs], groups)
    for name, ours, exact in zip(NAMES, got, truth, strict=True):
        assert relative_error(ours, exact) < TOLERANCE[torch.float32], name


def test_the_result_does_not_depend_on_the_number_of_threads(needs_cpp):
    inputs = _inputs((3, 64, 16, 16), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                results.append(_all_quantities(inputs, 32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_the_dropout_mask_is_philox_in_channels_last_order(backend):
    x, _, _, _, weight, bias = _inputs((2, 8, 3, 3), torch.float32)
    kept = group_norm_silu(x, weight, bias, 2, dropout=0.25, seed=SEED)[0]
    whole = group_norm_silu(x, weight, bias, 2)[0]
    words = philox_words(SEED, x.numel(), Stream.DROPOUT).reshape(2, 3, 3, 8).movedim(-1, 1)
    expected = torch.where(words >= 2**30, whole / 0.75, 0)
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(dropout_mask(x, 0.25, SEED), torch.where(words >= 2**30, 1 / 0.75, 0.0))


@pytest.mark.parametrize("shape", [(5, 8, 3, 2), (5, 6, 3, 3)], ids=["whole-blocks", "odd"])
def test_a_part_of_a_batch_drops_what_it_drops_within_the_whole(backend, shape):
    whole = _inputs(shape, torch.float32)
    part = [tensor[3:].contiguous() for tensor in whole[:4]] + whole[4:]
    numbered = torch.cat([SEED, torch.tensor([3])])
    for of_whole, of_part, name in zip(
        _all_quantities(whole, 2, dropout=0.4, seed=SEED),
        _all_quantities(part, 2, dropout=0.4, seed=numbered),
        NAMES,
        strict=True,
    ):
        if not name.endswith(("weight", "bias")):  # these are sums over the images
            torch.testing.assert_close(of_part, of_whole[3:], msg=name)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_the_share_it_should(dropout):
    mask = dropout_mask(torch.empty(64, 64, 8, 8), dropout, SEED)
    share = (mask != 0).double().mean()
    assert abs(share - (1 - dropout)) < 5 * (dropout * (1 - dropout) / mask.numel()) ** 0.5


def test_a_second_derivative_raises(needs_cpp):
    x, g, v, grad_y, weight, bias = _inputs((2, 4, 3, 2), torch.float64)
    x.requires_grad_()
    with use_backend("cpp"):
        y, mean, rstd = group_norm_silu(x, weight, bias, 2)
        vjp = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, 2)
        for result, cotangent in ((y, grad_y), (vjp, v)):
            (grad,) = torch.autograd.grad(result, x, cotangent, create_graph=True)
            with pytest.raises(RuntimeError, match="has no derivative"):
                grad.sum().backward()


def test_statistics_carry_no_gradient(backend):
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    _, mean, rstd = group_norm_silu(x, torch.ones(4), torch.zeros(4), 2)
    assert not mean.requires_grad and not rstd.requires_grad


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, under Triton's interpreter
def test_nan_and_huge_values(backend):
    x = torch.randn(2, 4, 4, 5)
    x[0, 0, 1, 1] = float("nan")
    y = group_norm_silu(x, torch.ones(4), torch.zeros(4), 2)[0]
    assert y[0, :2].isnan().all()
    assert y[0, 2:].isfinite().all() and y[1].isfinite().all()
    # u reaches +-1e30 times 2: silu is u above and 0 below, its derivative 1 and 0.
    weight = torch.full((4,), 1e30)
    y, mean, rstd = group_norm_silu(x[1:], weight, torch.zeros(4), 2)
    u = F.group_norm(x[1:], 2, weight, None, 1e-6)
    torch.testing.assert_close(y, u.clamp(min=0))
    assert group_norm_silu_vjp(x[1:], x[1:], weight, weight, mean, rstd, 2).isfinite().all()


@pytest.mark.cpu  # in fp64
@pytest.mark.parametrize("split", [None, 3], ids=["one", "two"])
def test_opcheck(needs_cpp, split):
    x, g, v, _, weight, bias = _inputs((2, 4, 3, 2), torch.float64)
    _, mean, rstd = group_norm_silu(x, weight, bias, 2)
    (x, skip), (v, v_skip) = (
        ((x, None), (v, None)) if split is None else (_pieces(x, split), _pieces(v, split))
    )
    seed = torch.cat([SEED, torch.tensor([0])])  # as the ops themselves take it
    inputs, saved = (x, skip, weight, bias), (mean, rstd, seed, 2, True, 0.2)
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (g, *inputs)]
    ops = torch.ops.cdm_fast
    torch.library.opcheck(ops.group_norm_silu.default, (*leaves[1:], seed, 2, True, 0.2, EPS))
    torch.library.opcheck(ops.group_norm_silu_vjp.default, (*leaves, *saved))
    torch.library.opcheck(ops.group_norm_silu_backward.default, (g, *inputs, *saved))
    torch.library.opcheck(ops.group_norm_silu_vjp_backward.default, (v, v_skip, g, *inputs, *saved))


@pytest.mark.parametrize("split", [None, 3], ids=["one", "two"])
def test_compiles_as_one_graph(needs_cpp, split):
    x, g, _, _, weight, bias = _inputs((2, 8, 3, 3), torch.float32)
    x, skip = (x, None) if split is None else _pieces(x, split)
    leaves = [tensor.requires_grad_() for tensor in (x, g, weight, bias)]

    def loss(x, g, weight, bias):
        y, mean, rstd = group_norm_silu(x, weight, bias, 2, skip=skip)
        vjp = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, 2, skip=skip)
        return y.square().sum() + (vjp if split is None else torch.cat(vjp, 1)).square().sum()

    with use_backend("cpp"):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for ours, expected in zip(
            torch.autograd.grad(compiled(*leaves), leaves),
            torch.autograd.grad(loss(*leaves), leaves),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected)


def test_the_reference_works_under_functional_transforms():
    x, g, _, _, weight, bias = _inputs((2, 4, 3, 2), torch.float64)
    with use_backend("reference"):
        y, mean, rstd = group_norm_silu(x, weight, bias, 2)
        expected = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, 2)
        grad = torch.func.grad(lambda x: (g * group_norm_silu(x, weight, bias, 2)[0]).sum())(x)
    torch.testing.assert_close(grad, expected)


BAD_INPUT = {
    "integer-x": ({"x": torch.ones(2, 4, 3, dtype=torch.int64)}, TypeError, "x: expected a floating-point"),
    "one-dimension": ({"x": torch.ones(4)}, ValueError, "x: expected a non-empty"),
    "empty-batch": ({"x": torch.ones(0, 4, 3)}, ValueError, "x: expected a non-empty"),
    "groups": ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of the 4 channels, got 3"),
    "no-groups": ({"num_groups": 0}, ValueError, "num_groups: expected a divisor"),
    "weight-shape": ({"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(4,\) or \(2, 4\)"),
    "bias-dtype": ({"bias": torch.ones(4, dtype=torch.int32)}, TypeError, "bias: expected a floating-point"),
    "weight-device": (
        {"weight": torch.ones(4, device="meta")},
        ValueError,
        "weight: expected it on x's device",
    ),
    "skip-batch": ({"skip": torch.ones(1, 4, 3)}, ValueError, "skip: expected a tensor like x"),
    "skip-spatial": ({"skip": torch.ones(2, 4, 3, 1)}, ValueError, "skip: expected a tensor like x"),
    "skip-dtype": ({"skip": torch.ones(2, 4, 3).double()}, ValueError, "skip: .*float32 .*got .*float64"),
    "skip-empty": ({"skip": torch.ones(2, 0, 3)}, ValueError, "skip: expected a tensor like x"),
    "skip-weight": ({"skip": torch.ones(2, 2, 3)}, ValueError, r"weight: expected shape \(6,\) or"),
    "dropout-one": ({"dropout": 1.0, "seed": SEED}, ValueError, r"dropout: .* in \[0, 1\), got 1.0"),
    "no-seed": ({"dropout": 0.5}, ValueError, "seed: dropout > 0 needs"),
    "seed-shape": ({"dropout": 0.5, "seed": SEED[:1]}, ValueError, "seed: expected shape"),
    "seed-dtype": ({"dropout": 0.5, "seed": SEED.int()}, TypeError, "seed: expected an int64"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input(backend, change, error, message):
    arguments = {"x": torch.randn(2, 4, 3), "weight": torch.ones(4), "bias": torch.zeros(4), "num_groups": 2}
    with pytest.raises(error, match=message):
        group_norm_silu(**(arguments | change))


BAD_COTANGENT = {
    "g-shape": ({"g": torch.randn(2, 4, 4)}, "g: expected a tensor like y"),
    "g-dtype": ({"g": torch.randn(2, 4, 3, dtype=torch.float64)}, "g: expected a tensor like y"),
    "mean-shape": ({"mean": torch.zeros(2, 4)}, r"mean: expected \(2, 2\)"),
    "rstd-dtype": ({"rstd": torch.ones(2, 2, dtype=torch.bfloat16)}, "rstd: expected .*float32"),
}


@pytest.mark.parametrize(("change", "message"), BAD_COTANGENT.values(), ids=BAD_COTANGENT.keys())
def test_bad_cotangent(backend, change, message):
    arguments = {
        "g": torch.randn(2, 4, 3),
        "x": torch.randn(2, 4, 3),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "mean": torch.zeros(2, 2),
        "rstd": torch.ones(2, 2),
        "num_groups": 2,
    }
    with pytest.raises(ValueError, match=message):
        group_norm_silu_vjp(**(arguments | change))


@pytest.fixture(scope="module")
def needs_cpp():
    _skip_without("cpp")


@pytest.fixture(scope="module")
def needs_triton():
    _skip_without("triton")


def _skip_without(name):
    reason = _backend.missing(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
