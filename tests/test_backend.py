"""Backends: the automatic choice, selection by name, and that selections end with their block."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from building.kernels import STABLE_ABI
from cdm_fast import CDM, NoiseSchedule
from cdm_fast.ops import backend as _backend
from cdm_fast.ops import set_backend, use_backend

CPU_FLOAT = torch.empty(1)
CPU_HALF = torch.empty(1, dtype=torch.float16)


@pytest.fixture(autouse=True)
def _restore():
    before = _backend.selected_backend()
    yield
    set_backend(before)


@pytest.fixture
def no_extension(monkeypatch):
    """As if cdm_fast._C had not been built."""
    monkeypatch.setattr(_backend, "_loaded", ImportError("No module named 'cdm_fast._C'"))


def test_auto_takes_cpp_on_the_cpu():
    if _backend.missing("cpp"):
        pytest.skip("the extension is not built")
    assert _backend.selected_backend() == "auto"
    assert _backend.resolve("group_norm_silu", CPU_FLOAT) == "cpp"


def test_the_extension_names_the_torch_that_it_was_built_for():
    if _backend.missing("cpp"):
        pytest.skip("the extension is not built")
    version = int(STABLE_ABI, 16)
    expected = f"{version >> 56}.{version >> 48 & 0xFF}"
    assert _backend.build_info()["torch_target_version"] == expected


def test_auto_takes_the_reference_where_no_kernel_fits():
    assert _backend.resolve("group_norm_silu", CPU_HALF) == "reference"


def test_auto_takes_the_reference_without_the_extension(no_extension):
    assert _backend.resolve("group_norm_silu", CPU_FLOAT) == "reference"
    assert _backend.cpu_capability() is None
    assert _backend.build_info() is None


def test_a_named_backend_that_is_missing_raises_and_says_how_to_get_it(no_extension):
    with pytest.raises(RuntimeError, match="cannot run here: .*_C does not load.*pip install"):
        set_backend("cpp")
    assert _backend.selected_backend() == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_raises():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here"):
        set_backend("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_triton_without_a_device_needs_its_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in _backend.missing("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backend.missing("triton") is None
    with use_backend("triton"):
        assert _backend.resolve("group_norm_silu", CPU_FLOAT) == "triton"


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(_backend, "find_spec", lambda name: None)
    assert "pip install" in _backend.missing("triton")


def test_a_named_backend_refuses_a_dtype_it_has_no_kernel_for():
    if _backend.missing("cpp"):
        pytest.skip("the extension is not built")
    with use_backend("cpp"), pytest.raises(RuntimeError, match="group_norm_silu: .*'cpp'.*got torch.float16"):
        _backend.resolve("group_norm_silu", CPU_HALF)


def test_an_op_without_such_a_kernel_takes_what_auto_would(monkeypatch):
    monkeypatch.setitem(_backend._coverage, "imagined", {})
    monkeypatch.setattr(_backend, "missing", lambda backend: None)
    with use_backend("cuda"):
        assert _backend.resolve("imagined", CPU_FLOAT) == "reference"


@pytest.mark.parametrize("name", ["", "cpu", "Reference", "numpy"])
def test_an_unknown_name_raises(name):
    with pytest.raises(ValueError, match="expected one of auto, reference, cpp, cuda, triton, got"):
        set_backend(name)


def test_use_backend_is_undone_also_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        assert _backend.resolve("group_norm_silu", CPU_FLOAT) == "reference"
        raise KeyError
    assert _backend.selected_backend() == "auto"


def test_use_backend_nests():
    with use_backend("reference"):
        with use_backend("auto"):
            assert _backend.selected_backend() == "auto"
        assert _backend.selected_backend() == "reference"


def test_describe_has_a_row_per_op_and_says_why(no_extension):
    rows = [row for row in _backend.describe() if row.device == "cpu"]
    assert {row.op for row in rows} >= {"group_norm_silu", "noising", "noise_level_ce", "denoise"}
    assert all(row.backend == "reference" and row.reason for row in rows)
    row = next(row for row in rows if row.op == "group_norm_silu")
    assert "does not load" in row.reason


def test_describe_names_the_instruction_set():
    if _backend.missing("cpp"):
        pytest.skip("the extension is not built")
    row = next(row for row in _backend.describe() if (row.op, row.device) == ("group_norm_silu", "cpu"))
    assert row.backend == "cpp" and _backend.cpu_capability() in row.reason


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_the_instruction_set_can_be_limited(name):
    if _backend.missing("cpp"):
        pytest.skip("the extension is not built")
    from cdm_fast import _C

    order = ["baseline", "avx2", "avx512"]
    best = _C.cpu_capability()
    try:
        _C.limit_cpu_capability(name)
        assert order.index(_C.cpu_capability()) == min(order.index(name), order.index(best))
        with pytest.raises(ValueError, match="baseline, avx2 or avx512, got 'sse'"):
            _C.limit_cpu_capability("sse")
    finally:
        _C.limit_cpu_capability(best)


def test_a_compiled_function_follows_the_selected_backend(monkeypatch):
    from cdm_fast.ops import group_norm_silu

    if _backend.missing("cpp"):
        pytest.skip("the extension is not built")
    graphs = []

    def collect(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(
        lambda x: group_norm_silu(x, torch.ones(4), torch.zeros(4), 2)[0], fullgraph=True, backend=collect
    )
    x = torch.randn(1, 4, 2, 2)
    results = []
    for name in ("cpp", "reference", "cpp"):
        with use_backend(name):
            results.append(compiled(x))
    assert len(graphs) == 2
    assert "cdm_fast.group_norm_silu" in graphs[0] and "cdm_fast.group_norm_silu" not in graphs[1]
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_other_threads_do_not_see_a_block():
    """A thread that trains while another evaluates under the reference keeps its kernels."""
    inside, seen = threading.Barrier(2, timeout=60), []

    def look():
        inside.wait()
        seen.append(_backend.selected_backend())
        inside.wait()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(look)
        with use_backend("reference"):
            inside.wait()
            inside.wait()
        other.result()
    assert seen == ["auto"]


def test_evaluations_of_a_foreign_network_leave_other_threads_alone():
    """`denoise` of a network without an adjoint runs under the reference, in its own thread only."""
    seen = []

    class Looks(torch.nn.Module):
        def forward(self, x):
            own = _backend.selected_backend()
            with ThreadPoolExecutor(1) as pool:
                seen.append((own, pool.submit(_backend.selected_backend).result()))
            return x.sum(1, keepdim=True) * torch.arange(6.0)

    CDM(Looks(), NoiseSchedule.uniform(T=4), input_shape=(3,)).denoise(torch.ones(2, 3), 1)
    assert seen == [("reference", "auto")]


def test_set_backend_holds_in_all_threads():
    set_backend("reference")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_backend.selected_backend).result() == "reference"


def test_work_handed_to_another_thread_can_keep_the_selection():
    """As a GPU's backward pass does with what it computes again."""
    with use_backend("reference"):
        function = _backend.under_this_selection(_backend.selected_backend)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(function).result() == "reference"
        assert pool.submit(_backend.selected_backend).result() == "auto"


_HALF, _LEVEL, _TABLE = (
    torch.zeros(2, 4, 3, 3, dtype=torch.float16),
    torch.zeros(2, dtype=torch.int64),
    torch.ones(2),
)
_OF_HALF = {
    "noising": lambda ops: ops.cdm_fast.noising(
        _HALF, _LEVEL, _TABLE, _TABLE, None, _HALF.float(), 0, False, torch.float32
    ),
    "noising-result": lambda ops: ops.cdm_fast.noising(
        _HALF.float(), _LEVEL, _TABLE, _TABLE, None, _HALF.float(), 0, False, torch.float16
    ),
    "noise_level_ce": lambda ops: ops.cdm_fast.noise_level_ce(_HALF[:, 0, 0], _LEVEL, None, 3, 1),
    "level_logits": lambda ops: ops.cdm_fast.level_logits(_HALF[:, 0, 0], 3, 1),
    "denoise": lambda ops: ops.cdm_fast.denoise_epilogue(_HALF, _HALF.float(), _TABLE),
    "group_norm_silu": lambda ops: ops.cdm_fast.group_norm_silu(
        _HALF, None, torch.ones(4), torch.ones(4), None, 2, True, 0.0, 1e-5
    ),
    "rms_norm": lambda ops: ops.cdm_fast.rms_norm(_HALF[0], torch.ones(3), 1e-5),
    "swiglu": lambda ops: ops.cdm_fast.swiglu(_HALF[0], None, 0.0),
    "from_noise_down": lambda ops: ops.cdm_fast.from_noise_down(_HALF[0, 0], 1, 1, False),
    "attention": lambda ops: ops.cdm_fast_cpp.attention_softmax(_HALF[0], torch.zeros(4, 3), 1.0),
}


@pytest.mark.cpu
@pytest.mark.skipif(_backend.missing("cpp") is not None, reason="no C++ kernels")
@pytest.mark.parametrize("call", _OF_HALF.values(), ids=_OF_HALF.keys())
def test_cpp_kernels_refuse_a_dtype_that_they_do_not_have(call):
    """They would read and write it as float32, which has twice the bytes."""
    with pytest.raises(RuntimeError, match=r": the CPU kernels take float64, float32 and bfloat16"):
        call(torch.ops)
