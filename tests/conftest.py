"""What all tests share: options, NaN poisoning, and seeding. Tolerances stand in `tests/accuracy.py`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import accuracy, pretend_cuda

# Where there is no GPU, Triton kernels run under the interpreter. Triton decides at its import, which
# torch.compile and others cause long before the first kernel is wanted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests that read data leave nothing in the user's cache folder.
os.environ.setdefault("CDM_FAST_CACHE", "off")

# Programs that tests start as processes of their own; collecting doctests would import them.
collect_ignore_glob = ["ops/compile_*.py"]


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
def _same_precisions() -> Iterator[None]:
    """fp32 precisions are process globals: a test leaves them as it found them."""
    kinds = [("generic", "all"), *(("cuda", kind) for kind in ("all", "conv", "rnn", "matmul"))]
    before = [torch._C._get_fp32_precision_getter(*kind) for kind in kinds]
    yield
    for kind, precision in zip(kinds, before, strict=True):
        if torch._C._get_fp32_precision_getter(*kind) != precision:
            torch._C._set_fp32_precision_setter(*kind, precision)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests draw from torch's global generator; each starts from the same state."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    # The sanitizer job gives more: what it compiles is not vectorised, and one long sum rounds worse than 16.
    parser.addoption(
        "--error-factor", type=float, default=accuracy.ERROR_FACTOR, help="kernel error over PyTorch's own"
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
    accuracy.allow_error_factor(config.getoption("--error-factor"))
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
