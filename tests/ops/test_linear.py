"""linear: oneDNN against fp64, derivatives, and who keeps PyTorch's own functions."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_fast.ops import linear, use_backend
from tests.accuracy import assert_kernel_accurate

module = import_module("cdm_fast.ops.linear")
LARGE = (300, 128, 160)  # rows, features in, features out: enough for oneDNN
NAMES = ("y", "grad_x", "grad_weight", "grad_bias", "grad_grad_x", "grad_grad_weight")


@pytest.fixture(autouse=True)
def other_vendor(monkeypatch):
    """Pretends a processor on which PyTorch's own fp32 products are slow."""
    monkeypatch.setattr(module, "_mkl_is_slow", lambda: True)


class Calls(TorchDispatchMode):
    """The names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _used_onednn(function, *tensors):
    with Calls() as calls:
        function(*tensors)
    return "mkldnn::_linear_pointwise" in calls.names


def _rows(dtype=torch.float32):
    rows, features_in, features_out = LARGE
    return torch.randn(rows, features_in, dtype=dtype), torch.randn(features_out, features_in, dtype=dtype)


def _with_derivatives(function, x, weight, bias, u, u_x, u_weight):
    """y, the gradients of <u, y^2>, and those of <u_x, grad_x> + <u_weight, grad_weight>."""
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in (x, weight, bias))
    y = function(x, weight, bias)
    gradients = torch.autograd.grad(y.square(), (x, weight, bias), u, create_graph=True)
    second = torch.autograd.grad(gradients[:2], (x, weight), (u_x, u_weight))
    return y, *gradients, *second


def test_two_orders_of_derivatives_against_fp64():
    x, weight = _rows(torch.float64)
    bias, y = torch.randn(160, dtype=torch.float64), F.linear(x, weight)
    tensors = [x, weight, bias, torch.randn_like(y), torch.randn_like(x), torch.randn_like(weight)]
    truth = _with_derivatives(F.linear, *tensors)
    single = [tensor.float() for tensor in tensors]
    assert _used_onednn(linear, *single[:2]) == (single[0].device.type == "cpu")
    ours, plain = (_with_derivatives(function, *single) for function in (linear, F.linear))
    for name, got, expected, exact in zip(NAMES, ours, plain, truth, strict=True):
        assert_kernel_accurate(got, expected, exact, name)


def test_expanded_gradients_and_strided_operands():
    x, weight = torch.randn(300, 256)[:, ::2], torch.randn(128, 160).t()  # neither is contiguous
    x.requires_grad_(), weight.requires_grad_()
    linear(x, weight).sum().backward()  # its gradient is one number, expanded
    exact = torch.ones(300, 160, dtype=torch.float64)
    assert_kernel_accurate(x.grad, exact.float() @ weight, exact @ weight.double(), "grad_x")
    assert_kernel_accurate(weight.grad, exact.float().t() @ x, exact.t() @ x.double(), "grad_weight")


@pytest.mark.cpu
def test_onednn_never_sees_a_matrix_that_only_its_plain_loop_can_read(monkeypatch):
    dense = []

    def spy(x, weight, *arguments):
        dense.extend(matrix.is_contiguous() or matrix.t().is_contiguous() for matrix in (x, weight))
        return F.linear(x, weight)

    monkeypatch.setattr(module, "_ONEDNN_LINEAR", spy)
    x, weight = (
        torch.randn(300, 256)[:, :128].requires_grad_(),
        torch.randn(160, 256)[:, 128:].requires_grad_(),
    )
    linear(x, weight).sum().backward()
    assert dense == [True] * 6


def test_leading_dimensions_stay():
    x, weight = torch.randn(3, 100, 128), torch.randn(160, 128)
    assert linear(x, weight).shape == (3, 100, 160)


@pytest.mark.cpu
def test_everything_else_is_pytorchs_own():
    x, weight = _rows()
    assert _used_onednn(linear, x, weight)
    assert not _used_onednn(linear, x.double(), weight.double())
    assert not _used_onednn(linear, x[:2], weight)
    with use_backend("reference"):
        assert not _used_onednn(linear, x, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_mkl_is_slow", lambda: False)
        assert not _used_onednn(linear, x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_reference_works_under_torch_func():
    x, weight = _rows()
    with use_backend("reference"):
        gradient = torch.func.grad(lambda x: linear(x, weight).sum())(x)
    torch.testing.assert_close(gradient, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-4)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("capability", "vendor", "slow"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
        ("DEFAULT", "AuthenticAMD", False),
    ],
)
def test_mkl_is_slow_with_avx512_of_other_vendors(monkeypatch, tmp_path, capability, vendor, slow):
    monkeypatch.undo()
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(module, "Path", lambda _: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert module._mkl_is_slow.__wrapped__() == slow
