"""The required accuracy of computations: the one table of tolerances, and the rule for kernels."""

import torch
from torch import Tensor

# Relative error that two computations of the same quantity may show, per dtype of the computation: the one
# table. An op's test asks `assert_kernel_accurate` first; this is for whole networks and end-to-end numbers.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

# A kernel may lose twice what plain PyTorch loses in the same dtype, and this many ulps of the largest value.
ERROR_FACTOR = 2.0
FLOOR_ULPS = 4.0
_factor = ERROR_FACTOR


def allow_error_factor(factor: float) -> None:
    """Changes how much more than plain PyTorch a kernel may lose, for all tests of this process."""
    global _factor
    _factor = factor


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| in fp64; the plain norm of got where expected is 0."""
    difference = (got.detach().double() - expected.detach().double()).norm()
    size = expected.detach().double().norm()
    return float(difference / size) if size > 0 else float(difference)


def assert_kernel_accurate(got: Tensor, plain: Tensor, truth: Tensor, what: str = "output") -> None:
    """Asserts max|got - truth| <= factor max|plain - truth| + 4 ulps of max|truth|.

    The factor is `ERROR_FACTOR`, or what `allow_error_factor` has set.

    got: the kernel's result; plain: PyTorch's in the same dtype and on the same device; truth: in fp64.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == plain.dtype, f"{what}: dtype {got.dtype}, expected {plain.dtype}"
    assert bool(torch.isfinite(got).all()), f"{what}: NaN or infinity in the kernel's result"
    if got.numel() == 0:
        return
    exact = truth.detach().double().cpu()
    error = float((got.detach().double().cpu() - exact).abs().max())
    plain_error = float((plain.detach().double().cpu() - exact).abs().max())
    ulp = torch.finfo(got.dtype).eps * float(exact.abs().max())
    allowed = _factor * plain_error + FLOOR_ULPS * ulp
    message = f"{what}: error {error:.3e}, plain PyTorch's {plain_error:.3e}, allowed {allowed:.3e}"
    assert error <= allowed, message
