"""Shared by the tests of the ops: one test per backend that runs on the tensors' device."""

import re
from collections.abc import Callable, Iterator

import pytest

from cdm_fast.ops import backend as _backend
from tests.cuda_on_cpu import stand_in

# With --test-device cuda every tensor of a test is on the GPU, and these are its kernels. With cuda-on-cpu
# the CUDA kernels run on the CPU, and nothing else is there (tests/cuda_on_cpu).
KERNELS = {
    "cpu": ["cpp", "triton"],
    "cuda": ["cuda", "triton"],
    "cuda-on-cpu": ["cuda"],
    "pretend-cuda": ["cuda", "triton"],
}
NOT_COVERED = re.compile(r"backend '\w+' (was asked for, but it (runs on|takes)|cannot run here)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kernels = KERNELS[metafunc.config.getoption("--test-device")]
    if "backend" in metafunc.fixturenames and not _has_own(metafunc, "backend"):
        metafunc.parametrize("backend", ["reference", *kernels], indirect=True)
    if "kernels" in metafunc.fixturenames and not _has_own(metafunc, "kernels"):
        metafunc.parametrize("kernels", kernels, indirect=True)


def _has_own(metafunc: pytest.Metafunc, name: str) -> bool:
    """Whether the test lists the backends itself."""
    marks = metafunc.definition.iter_markers("parametrize")
    return any(name in re.split(r",\s*", mark.args[0]) for mark in marks if isinstance(mark.args[0], str))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """On a GPU, a test that asks for a kernel of the CPU, or for fp64 where there is none, does not count."""
    before = stand_in.num_launches()
    try:
        yield
        if item.config.getoption("--test-device") == "cuda-on-cpu" and stand_in.num_launches() == before:
            pytest.skip("it launches no CUDA kernel")
    except RuntimeError as error:
        if item.config.getoption("--test-device") != "cpu" and NOT_COVERED.search(str(error)):
            pytest.skip(str(error))
        raise


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs on the tensors' device, selected for the test; skipped where it is missing."""
    with _backend.use_backend(_present(request.param)):
        yield request.param


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> str:
    """Each backend other than the reference; not selected, so that a test can run both sides."""
    return _present(request.param)


@pytest.fixture
def native(request: pytest.FixtureRequest) -> str:
    """The backend in C++: "cpp", or "cuda" with --test-device cuda or cuda-on-cpu."""
    return _present(KERNELS[request.config.getoption("--test-device")][0])


def _present(backend: str) -> str:
    reason = _backend.missing(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return backend


@pytest.fixture
def limit_isa() -> Iterator[Callable[[str], None]]:
    """limit_isa("baseline" | "avx2" | "avx512"): the most that the C++ kernels may use in the test."""
    extension = pytest.importorskip("cdm_fast._C", reason="the extension is not built", exc_type=ImportError)
    yield extension.limit_cpu_capability
    extension.limit_cpu_capability("avx512")
