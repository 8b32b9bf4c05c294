"""attention: every backend against fp64 double backward, closed forms, derivatives, bad input, GPU code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from cdm_fast.ops import (
    attention,
    attention_cpu,
    attention_gpu,
    attention_vjp,
    use_attention_method,
    use_backend,
)
from cdm_fast.ops import backend as _backend
from cdm_fast.ops.attention import attention_reference
from tests.accuracy import TOLERANCE, assert_kernel_accurate

# batch, tokens, channels, heads
CASES = {
    "odd": (2, 5, 6, 1),
    "three-heads": (1, 35, 33, 3),
    "two-heads": (2, 32, 32, 2),
    "several-blocks": (1, 66, 5, 1),
    "wide-head": (1, 9, 136, 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_g", "grad_grad_q", "grad_grad_k", "grad_grad_v")


def _case(batch, tokens, channels, heads, dtype=torch.float64):
    """(u_q, u_k, u_v, g, q, k, v), the scale, and the number of heads; the keys share a large component."""
    tensors = [torch.randn(batch, tokens, channels, dtype=torch.float64) for _ in range(7)]
    tensors[5] += 2 * torch.randn(channels, dtype=torch.float64)
    return [x.to(dtype) for x in tensors], (channels // heads) ** -0.5, heads


def _softmax_attention(q, k, v, scale, heads):
    """The textbook's lines, in the inputs' own precision: (out, lse)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = scale * (q @ k.mT)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores.logsumexp(-1).detach()


def _by_double_backward(tensors, scale, heads):
    *u, g, q, k, v = (x.detach().requires_grad_() for x in tensors)
    out, lse = _softmax_attention(q, k, v, scale, heads)
    gradients = torch.autograd.grad(out, (q, k, v), g, create_graph=True)
    return out, lse, *gradients, *torch.autograd.grad(gradients, (g, q, k, v), u)


def _by_op(tensors, scale, heads):
    *u, g, q, k, v = (x.detach().requires_grad_() for x in tensors)
    out, lse = attention(q, k, v, scale, heads)
    gradients = attention_vjp(g, q, k, v, out, lse, scale, heads)
    return out, lse, *gradients, *torch.autograd.grad(gradients, (g, q, k, v), u)


@pytest.fixture(params=["fused", "composed"])
def method(request):
    """Both methods of attention on Triton; other backends have one, and run once."""
    names = [value for value in request.node.callspec.params.values() if isinstance(value, str)]
    if request.param == "composed" and "triton" not in names:
        pytest.skip("this backend has one method")
    with use_attention_method(request.param):
        yield request.param


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_kernels_are_as_accurate_as_plain_pytorch(kernels, method, poison_empty, case, dtype):
    if dtype == torch.float16 and "fused" not in (kernels, method):
        pytest.skip("the composed method takes no fp16")
    if (kernels, dtype) == ("cpp", torch.float16):
        pytest.skip("the CPU kernels take no fp16")
    tensors, scale, heads = _case(*case, dtype=dtype)
    truth = _by_double_backward([x.double() for x in tensors], scale, heads)
    plain = _by_double_backward(tensors, scale, heads)
    with use_backend(kernels):
        got = _by_op(tensors, scale, heads)
    for name, value, plain_value, true_value in zip(NAMES, got, plain, truth, strict=True):
        assert_kernel_accurate(value, plain_value.to(value.dtype), true_value, name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_forward_then_vjp_is_double_backward(backend, case):
    tensors, scale, heads = _case(*case)
    expected = _by_double_backward(tensors, scale, heads)
    with use_backend(backend):
        for name, value, true_value in zip(NAMES, _by_op(tensors, scale, heads), expected, strict=True):
            assert (value - true_value).norm() <= 1e-12 * (1 + true_value.norm()), name


def test_autograd_differentiates_attention_twice(backend, method):
    tensors, scale, heads = _case(2, 21, 24, 2, torch.float32)
    *u, g, q, k, v = (x.requires_grad_() for x in tensors)
    gradients = torch.autograd.grad(attention(q, k, v, scale, heads)[0], (q, k, v), g, create_graph=True)
    got = *gradients, *torch.autograd.grad(gradients, (g, q, k, v), u)
    plain = _by_double_backward(tensors, scale, heads)[2:]
    truth = _by_double_backward([x.double() for x in tensors], scale, heads)[2:]
    for values in zip(got, plain, truth, NAMES[2:], strict=True):
        assert_kernel_accurate(*values)


@pytest.mark.parametrize("heads", [1, 2])
def test_gradcheck(heads):
    (*_, g, q, k, v), scale, _ = _case(2, 4, 6, heads)
    tensors = [x.requires_grad_() for x in (g, q, k, v)]

    def vjp(g, q, k, v):
        out, lse = attention(q.detach(), k.detach(), v.detach(), scale, heads)
        return attention_vjp(g, q, k, v, out, lse, scale, heads)

    with use_backend("cpp"):
        assert gradcheck(lambda q, k, v: attention(q, k, v, scale, heads)[0], tensors[1:])
        assert gradgradcheck(lambda q, k, v: attention(q, k, v, scale, heads)[0], tensors[1:])
        assert gradcheck(vjp, tensors)


def test_a_third_derivative_raises(kernels, method):
    tensors, scale, heads = _case(1, 4, 6, 1, torch.float32)
    *u, g, q, k, v = (x.requires_grad_() for x in tensors)
    with use_backend(kernels):
        gradients = attention_vjp(g, q, k, v, *attention(q, k, v, scale), scale)
        (tangent,) = torch.autograd.grad(gradients, q, u, create_graph=True)
        with pytest.raises(RuntimeError, match="attention_vjp_backward has no derivative"):
            torch.autograd.grad(tangent.sum(), q)


def test_registration_of_the_ops(kernels, method):
    suffix = "" if kernels == "cpp" else "_triton"  # there is none in CUDA C++
    (*u, g, q, k, v), scale, heads = _case(2, 6, 8, 2, torch.float32)
    out, lse = attention_reference(q, k, v, scale, heads)
    leaves = [x.requires_grad_() for x in (g, q, k, v)]
    ops = torch.ops.cdm_fast
    torch.library.opcheck(getattr(ops, f"attention{suffix}").default, (*leaves[1:], scale, heads))
    arguments = (*leaves, out.detach(), lse, scale, heads)
    torch.library.opcheck(getattr(ops, f"attention_vjp{suffix}").default, arguments)
    arguments = (*u, *(x.detach() for x in leaves), out.detach(), lse, scale, heads)
    torch.library.opcheck(getattr(ops, f"attention_vjp_backward{suffix}").default, arguments)


def test_equal_scores_average_the_values(backend, method):
    v = torch.randn(2, 7, 6)
    out, lse = attention(torch.zeros(2, 7, 6), torch.randn(2, 7, 6), v, 1.0, num_heads=2)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(v))
    torch.testing.assert_close(lse, torch.full((2, 2, 7), 7.0).log())


def test_one_token_returns_its_value(kernels, method):
    tensors, scale, _ = _case(2, 1, 8, 1, torch.float32)
    with use_backend(kernels):
        out, _, grad_q, grad_k, grad_v, grad_g, *others = _by_op(tensors, scale, 1)
    torch.testing.assert_close((out, grad_v, grad_g), (tensors[6], tensors[3], tensors[2]))
    for zero in (grad_q, grad_k, *others):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=20 * TOLERANCE[torch.float32])


def test_far_apart_scores_pick_one_value(backend, method):
    q = 1e4 * torch.eye(5)[None]
    v = torch.randn(1, 5, 5)
    out, lse = attention(q, torch.eye(5)[None], v, 1.0)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(lse, torch.full((1, 1, 5), 1e4))


def test_a_nan_stays_in_its_row(backend, method):
    (*_, q, k, v), scale, _ = _case(1, 20, 8, 1, torch.float32)
    q[0, 3, 2] = torch.nan
    out, _ = attention(q, k, v, scale)
    nan_rows = out.isnan().any(-1)[0]
    assert out[0, 3].isnan().all()
    assert nan_rows.sum() == 1


def test_strides_do_not_matter(backend, method):
    """Tokens of an NCHW image, of which the channels are not contiguous, and an expanded cotangent."""
    image = torch.randn(3, 2, 8, 5, 5)
    q, k, v = (x.flatten(2).mT.requires_grad_() for x in image)
    out, lse = attention(q, k, v, 0.3)
    same, same_lse = attention(q.contiguous(), k.contiguous(), v.contiguous(), 0.3)
    assert out.is_contiguous()
    torch.testing.assert_close((out, lse), (same, same_lse))
    g = torch.ones(()).expand(2, 25, 8)
    expected = attention_vjp(g.contiguous(), q, k, v, out, lse, 0.3)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), g), expected)


@pytest.mark.parametrize("tile", [1, 100, 1000], ids=["row-by-row", "some-rows", "some-heads"])
@pytest.mark.parametrize(
    "kernels, dtype", [("cpp", torch.float64), ("triton", torch.float32)], indirect=["kernels"]
)
def test_cutting_the_work_changes_nothing(monkeypatch, kernels, tile, dtype):
    tensors, scale, heads = _case(3, 19, 12, 2, dtype)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    with use_backend(kernels), use_attention_method("composed"):
        whole = _by_op(tensors, scale, heads)
        for module in (attention_cpu, attention_gpu):
            monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
        torch.testing.assert_close(_by_op(tensors, scale, heads), whole, rtol=bound, atol=bound)


def test_autocast_changes_nothing(backend):
    (*_, g, q, k, v), scale, heads = _case(2, 9, 8, 2, torch.float32)

    def forward_and_vjp():
        out, lse = attention(q, k, v, scale, heads)
        return out, lse, *attention_vjp(g, q, k, v, out, lse, scale, heads)

    expected = forward_and_vjp()
    with torch.autocast(q.device.type, torch.bfloat16):
        got = forward_and_vjp()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_reference_works_under_torch_func():
    (*_, q, k, v), scale, heads = _case(2, 5, 6, 2)
    with use_backend("reference"):
        gradient = torch.func.grad(lambda q: attention(q, k, v, scale, heads)[0].square().sum())(q)
        out, lse = attention(q, k, v, scale, heads)
        expected = attention_vjp(2 * out, q, k, v, out, lse, scale, heads)[0]
    torch.testing.assert_close(gradient, expected)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    width=st.integers(1, 20),
    heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    tile=st.integers(1, 2000),
)
def test_random_shapes(batch, tokens, width, heads, dtype, tile):
    torch.manual_seed(batch * tokens * width)
    tensors, scale, heads = _case(batch, tokens, width * heads, heads, dtype)
    truth = _by_double_backward([x.double() for x in tensors], scale, heads)
    with use_backend("cpp"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cpu, "TILE_ELEMENTS", tile)
        got = _by_op(tensors, scale, heads)
    largest = max(float(x.detach().abs().max()) for x in truth)
    for name, value, true_value in zip(NAMES, got, truth, strict=True):
        assert float((value - true_value).detach().abs().max()) <= TOLERANCE[dtype] * largest, name


X = torch.zeros(2, 5, 6)
BAD_INPUT = {
    "dimensions": ((X[0], X, X, 1.0), ValueError, r"q: expected shape \(any, any, any\), got \(5, 6\)"),
    "empty": ((X[:0], X[:0], X[:0], 1.0), ValueError, "q: expected at least one example"),
    "shape": ((X, X[:, :4], X, 1.0), ValueError, r"k: expected shape \(2, 5, 6\), got \(2, 4, 6\)"),
    "dtype": ((X, X, X.bfloat16(), 1.0), TypeError, "v: expected dtype float32, got bfloat16"),
    "integer": ((X.long(), X, X, 1.0), TypeError, "q: expected dtype .*, got int64"),
    "device": ((X, X.to("meta"), X, 1.0), ValueError, r"k: expected it on c\S+, got meta"),
    "heads": ((X, X, X, 1.0, 4), ValueError, "num_heads: expected a divisor of q's 6 channels, got 4"),
    "no-heads": ((X, X, X, 1.0, 0), ValueError, "num_heads: expected a divisor of q's 6 channels, got 0"),
}


@pytest.mark.parametrize("arguments, error, message", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        attention(*arguments)


def test_bad_input_of_the_vjp(backend):
    lse = torch.zeros(2, 1, 5)
    with pytest.raises(ValueError, match=r"g: expected shape \(2, 5, 6\), got \(2, 5, 3\)"):
        attention_vjp(X[..., :3], X, X, X, X, lse, 1.0)
    with pytest.raises(ValueError, match=r"lse: expected shape \(2, 2, 5\), got \(2, 1, 5\)"):
        attention_vjp(X, X, X, X, X, lse, 1.0, num_heads=2)


# Per row a kernel reads and writes fp32, whatever the inputs are.
STATISTICS = ("lse", "mean", "delta", "delta_dot", "result")
PRODUCTS = {
    "_forward_kernel": 1,
    "_vjp_rows_kernel": 1,
    "_vjp_columns_kernel": 2,
    "_out_dot_kernel": 2,
    "_vjp_backward_rows_kernel": 2,
    "_vjp_backward_columns_kernel": 3,
}
COMPILED = {
    "bf16-sm_80": ("bf16", torch.bfloat16, 256, 256, 80),
    "bf16-sm_90": ("bf16", torch.bfloat16, 256, 256, 90),
    "bf16-long-sm_90": ("bf16", torch.bfloat16, 64, 4096, 90),
    "bf16-sm_100": ("bf16", torch.bfloat16, 256, 256, 100),
    "fp32-sm_80": ("fp32", torch.float32, 64, 256, 80),
}


def _constants(blocks, width):
    return {
        "WIDTH": width,
        "CHUNK": blocks.chunk,
        "OUT_WIDTH": blocks.out_width,
        "BLOCK": blocks.block,
        "STEP": blocks.step,
    }


def _compile_job(kernels, kernel, kind, constants, arch, warps):
    scalars = {"scale": "fp32", **dict.fromkeys(("num_tokens", "num_blocks", "num_heads"), "i32")}
    fixed = {**dict.fromkeys(constants, "constexpr"), **dict.fromkeys(STATISTICS, "*fp32"), **scalars}
    names = getattr(kernels, kernel).arg_names
    return {
        "module": "cdm_fast.kernels.attention",
        "kernel": kernel,
        "signature": {name: fixed.get(name, f"*{kind}") for name in names},
        "constants": constants,
        "arch": arch,
        "warps": warps,
    }


@pytest.mark.cpu
@pytest.mark.parametrize("kind, dtype, width, tokens, arch", COMPILED.values(), ids=COMPILED.keys())
def test_triton_kernels_compile_for_gpus(kind, dtype, width, tokens, arch):
    kernels = pytest.importorskip("cdm_fast.kernels.attention")
    row_dot = {"WIDTH": width, "PADDED": width, "BLOCK": 16}
    jobs = [_compile_job(kernels, "_row_dot_kernel", kind, row_dot, arch, 4)]
    for kernel, products in PRODUCTS.items():
        blocks = kernels.choose_blocks(width, dtype, products, tokens, arch)
        jobs.append(_compile_job(kernels, kernel, kind, _constants(blocks, width), arch, blocks.warps))
    program = Path(__file__).with_name("compile_triton.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, program], input=json.dumps(jobs), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for job, report in zip(jobs, json.loads(done.stdout), strict=True):
        assert report["spills"] <= 16, (job["kernel"], report)  # bytes per thread: four registers
        assert report["shared"] <= 163 * 1024, (job["kernel"], report)
        if arch == 90 and job["kernel"] != "_row_dot_kernel":
            assert report["wgmma"] > 0, (job["kernel"], report)


def test_the_method_comes_from_the_table():
    method = _backend.attention_method
    assert method(256, 256, torch.bfloat16) == "composed"  # the 33.4 M network at 16x16 pixels
    assert method(4096, 64, torch.bfloat16) == "fused"
    assert method(5000, 256, torch.bfloat16) == "fused"  # a row would not fit a program
    assert method(256, 256, torch.float16) == "fused"


def test_the_nearest_entry_of_the_table_counts(monkeypatch, tmp_path):
    table = tmp_path / "methods.json"
    sizes = {"fused": (100, 32), "composed": (1000, 256)}
    entries = [
        {"dtype": "bfloat16", "tokens": tokens, "width": width, "method": name}
        for name, (tokens, width) in sizes.items()
    ]
    table.write_text(json.dumps({"methods": entries}))
    monkeypatch.setattr(_backend, "ATTENTION_TABLE", table)
    nearest = _backend._nearest_method.__wrapped__
    assert nearest(90, 64, torch.bfloat16) == "fused"
    assert nearest(900, 64, torch.bfloat16) == "composed"
    assert nearest(900, 64, torch.float32) == "fused"  # no entry


@pytest.mark.parametrize("tokens, dtype", [(8, torch.float16), (4097, torch.float32)])
def test_a_method_that_cannot_run_raises_and_says_so(tokens, dtype):
    with (
        use_attention_method("composed"),
        pytest.raises(RuntimeError, match="up to 4096 tokens.*use 'fused'"),
    ):
        _backend.attention_method(tokens, 64, dtype)
    with pytest.raises(ValueError, match="expected one of auto, fused, composed, got 'fast'"):
        with use_attention_method("fast"):
            pass


def test_the_composed_limit_is_that_of_its_kernels():
    rows = pytest.importorskip("cdm_fast.kernels.attention_rows")
    assert rows.MAX_COLUMNS == _backend._COMPOSED_TOKENS


def test_the_table_is_measured_by_its_benchmark(tmp_path):
    pytest.importorskip("triton")
    table = tmp_path / "methods.json"
    command = [sys.executable, "-m", "benchmarks.support.attention_methods", "--small", "--out", table]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    for entry in json.loads(table.read_text())["methods"]:
        assert entry["method"] in ("fused", "composed")
        assert entry["ms"].keys() == {"fused", "composed", "plain"}
