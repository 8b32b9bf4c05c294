"""What all tests share: the one tolerance table, the kernel accuracy rule, NaN poisoning, and seeding.

Everything is a session-scoped fixture, so that it can be used inside hypothesis tests as well.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import pretend_cuda

# Where there is no GPU, Triton kernels run under the interpreter. Triton decides at its import, which
# torch.compile and others cause long before the first kernel is wanted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests that read data leave nothing in the user's cache folder.
os.environ.setdefault("CDM_FAST_CACHE", "off")

# Programs that tests start as processes of their own; collecting doctests would import them.
collect_ignore_glob = ["ops/compile_*.py"]

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


def _relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| in fp64; the plain norm of got where expected is 0."""
    difference = (got.detach().double() - expected.detach().double()).norm()
    size = expected.detach().double().norm()
    return float(difference / size) if size > 0 else float(difference)


def _assert_kernel_accurate(
    got: Tensor, plain: Tensor, truth: Tensor, what: str = "output", factor: float = ERROR_FACTOR
) -> None:
    """Asserts max|got - truth| <= factor max|plain - truth| + 4 ulps of max|truth|.

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
    allowed = factor * plain_error + FLOOR_ULPS * ulp
    message = f"{what}: error {error:.3e}, plain PyTorch's {plain_error:.3e}, allowed {allowed:.3e}"
    assert error <= allowed, message


def _poisoned(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A tensor full of NaN, for a kernel to fill: an element it forgets is then seen."""
    return torch.empty(shape, dtype=dtype, memory_format=memory_format).fill_(float("nan"))


@pytest.fixture(scope="session")
def tolerance() -> dict[torch.dtype, float]:
    """Allowed relative error by dtype."""
    return TOLERANCE


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """relative_error(got, expected): norm of the difference over the norm of the expected tensor."""
    return _relative_error


@pytest.fixture(scope="session")
def assert_kernel_accurate(request: pytest.FixtureRequest) -> Callable[..., None]:
    """assert_kernel_accurate(got, plain, truth, what="output"): the accuracy rule that every kernel obeys."""
    return partial(_assert_kernel_accurate, factor=request.config.getoption("--error-factor"))


@pytest.fixture(scope="session")
def poisoned() -> Callable[..., Tensor]:
    """poisoned(*shape, dtype=, memory_format=): a NaN-filled tensor."""
    return _poisoned


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """While active, every uninitialised tensor (torch.empty and kin, in C++ too) is full of NaN."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests draw from torch's global generator; each starts from the same state."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    # The sanitizer job gives more: what it compiles is not vectorised, and one long sum rounds worse than 16.
    parser.addoption(
        "--error-factor", type=float, default=ERROR_FACTOR, help="kernel error over PyTorch's own"
    )
    parser.addoption(
        "--test-device",
        default="cpu",
        choices=("cpu", "cuda", "cuda-on-cpu", "pretend-cuda"),
        help="where tests/ops makes its tensors; cuda-on-cpu: on the CPU, for the CUDA kernels of "
        "--stand-in; pretend-cuda: on a CPU that refuses what a GPU would",
    )
    parser.addoption("--stand-in", type=Path, help="the library that tests/cuda_on_cpu/stand_in.py builds")
    parser.addoption("--thread-order", default="natural", help="of its threads: natural, reversed or random")
    parser.addoption("--wheel", type=Path, help="check this wheel instead of building a pure Python one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "cpu: not for tensors on a GPU; skipped with --test-device cuda")
    if config.getoption("--test-device") == "cuda-on-cpu":
        from tests.cuda_on_cpu import stand_in

        if config.getoption("--stand-in") is None:
            raise pytest.UsageError("--test-device cuda-on-cpu: name the library with --stand-in")
        stand_in.install(config.getoption("--stand-in"), config.getoption("--thread-order"))
    if config.getoption("--test-device") == "pretend-cuda":
        os.environ["CDM_FAST_CHECKED"] = "1"
        pretend_cuda.install()
    if config.getoption("--test-device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError(
                "--test-device cuda: this torch sees no CUDA device; leave the option out"
            )
        os.environ["CDM_FAST_CHECKED"] = "1"  # values are checked as on the CPU, where that costs no wait
        torch.set_default_device("cuda")  # before collection: constants of the test modules go there too


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = config.getoption("--test-device") in ("cuda", "pretend-cuda")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("cpu") and on_gpu:
            item.add_marker(pytest.mark.skip(reason="not for tensors on a GPU"))
