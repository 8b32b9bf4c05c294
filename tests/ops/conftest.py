"""What the tests of the ops share: the backends that run on CPU tensors, one test each."""

from collections.abc import Callable, Iterator

import pytest

from cdm_fast.ops import _backend


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs on CPU tensors, selected for the test; skipped where it is missing."""
    reason = _backend.missing(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with _backend.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["cpp", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Each backend other than the reference; not selected, so that a test can run both sides."""
    reason = _backend.missing(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def limit_isa() -> Iterator[Callable[[str], None]]:
    """limit_isa("baseline" | "avx2" | "avx512"): the most that the C++ kernels may use in the test."""
    extension = pytest.importorskip("cdm_fast._C", reason="the extension is not built", exc_type=ImportError)
    yield extension.limit_cpu_capability
    extension.limit_cpu_capability("avx512")
