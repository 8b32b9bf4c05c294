"""A failed build is named: by the doctor, by a demanded backend, and once where a GPU runs something slow."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from cdm_fast.cli import doctor
from cdm_fast.ops import backend, build_record

REASON = "building failed (csrc/denoise.cu(7): error: expected a declaration)"


@pytest.fixture
def record(monkeypatch, tmp_path):
    """A function that puts a record in place of the one of this installation."""

    def put(**values):
        values = {"built": [], "left_out": {}, "torch": "2.13.0", "log": "_build.log", **values}
        (tmp_path / "_build.json").write_text(json.dumps(values))
        clear()

    def clear():
        for cached in (build_record.read, build_record.why_left_out, backend._warn_of_slow_path):
            cached.cache_clear()

    monkeypatch.setattr(build_record, "FOLDER", tmp_path)
    monkeypatch.setattr(backend, "_warned", False)
    clear()
    yield put
    clear()


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, and an extension that was built without CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    extension = SimpleNamespace(build_info=lambda: {"cuda": False}, cpu_capability=lambda: "avx2")
    monkeypatch.setattr(backend, "_loaded", extension)


def resolve_on_gpu(op="denoise", dtype=torch.float32):
    return backend._resolve(op, "auto", "cuda", dtype)


def test_no_record_is_no_failure(record):
    assert build_record.read() is None
    assert build_record.why_left_out("cpp") is None and build_record.log() is None


@pytest.mark.parametrize("content", ["", "[]", '{"built"'])
def test_a_damaged_record_is_none(record, content):
    (build_record.FOLDER / "_build.json").write_text(content)
    assert build_record.read() is None


def test_the_doctor_names_reason_and_log_of_a_failed_cuda_build(record):
    record(built=["cpp"], left_out={"cuda": REASON})
    log = str(build_record.FOLDER / "_build.log")
    report = doctor.report()
    assert report["build"]["log"] == log
    text = doctor.render(report)
    assert REASON in text and f"log: {log}" in text
    if backend.build_info() and not backend.build_info()["cuda"]:
        missing = next(row["remedy"] for row in report["missing"] if row["what"] == "CUDA kernels")
        assert REASON in missing and log in missing


def test_without_any_kernel_the_builds_reason_is_told(record, monkeypatch):
    monkeypatch.setattr(backend, "_loaded", ImportError("No module named 'cdm_fast._C'"))
    record(left_out={"cpp": "there is no C++ compiler (c++): install one, or set CXX"}, log=None)
    assert "there is no C++ compiler (c++): install one" in backend.missing("cpp")
    assert "log" not in backend.missing("cpp")


def test_an_extension_of_another_torch_says_so(record, monkeypatch):
    monkeypatch.setattr(backend, "_loaded", ImportError("libcudart.so.13: cannot open shared object file"))
    record(built=["cpp", "cuda"], torch="2.11.0+cu130")
    assert f"built beside torch 2.11.0+cu130, this is {torch.__version__}" in backend.missing("cpp")


def test_a_gpu_that_runs_the_reference_warns_once_and_says_why(record, gpu, monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    record(built=["cpp"], left_out={"cuda": REASON})
    with pytest.warns(UserWarning, match="denoise .*reference backend on the GPU") as caught:
        assert resolve_on_gpu() == "reference"
    assert REASON in str(caught[0].message) and "\n" not in str(caught[0].message)
    with warnings.catch_warnings(action="error"):
        assert resolve_on_gpu() == "reference"
        assert resolve_on_gpu("noising") == "reference"


def test_triton_after_a_failed_cuda_build_warns(record, gpu):
    pytest.importorskip("triton")
    record(built=["cpp"], left_out={"cuda": REASON})
    with pytest.warns(UserWarning, match="triton backend on the GPU"):
        assert resolve_on_gpu() == "triton"


@pytest.mark.parametrize("left_out", [{}, {"cuda": "there is no nvcc: install the CUDA toolkit"}], ids=str)
def test_triton_where_no_cuda_build_was_tried_does_not_warn(record, gpu, left_out):
    pytest.importorskip("triton")
    record(built=["cpp"], left_out=left_out)
    with warnings.catch_warnings(action="error"):
        assert resolve_on_gpu() == "triton"


def test_a_dtype_without_kernels_does_not_warn(record, gpu):
    record(built=["cpp"], left_out={"cuda": REASON})
    with warnings.catch_warnings(action="error"):
        assert resolve_on_gpu(dtype=torch.complex64) == "reference"


def test_fake_tensors_on_a_machine_without_a_gpu_do_not_warn(record, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record(built=["cpp"], left_out={"cuda": REASON})
    with warnings.catch_warnings(action="error"):
        resolve_on_gpu()


@pytest.mark.parametrize(
    ("torch_", "triton", "numpy", "expected"),
    [
        ("2.11.0+cu130", "3.6.0", "2.3.5", None),
        ("2.13.0+cpu", "3.8.0", "2.4.6", None),
        ("2.13.0", None, "2.4.6", None),
        ("2.11.0", "3.6.0", "2.4.0", "does not interpret"),
        ("2.13.0", "3.7.1", "2.4.6", "triton 3.7.1 was not tested with torch 2.13.0: triton 3.8 was"),
        ("2.15.0", "3.9.0", "2.4.6", "torch 2.15.0 was not tested: 2.10, 2.11, 2.13, 2.14 were"),
        ("2.12.1", "3.7.0", "2.4.6", "torch 2.12.1 was not tested: 2.10, 2.11, 2.13, 2.14 were"),
    ],
    ids=str,
)
def test_combinations_of_versions(torch_, triton, numpy, expected):
    lines = doctor.combination_warnings(torch_, triton, numpy)
    assert len(lines) == (expected is not None)
    assert expected is None or expected in lines[0]
    assert all(line in doctor.render({**doctor.report(), "warnings": lines}) for line in lines)
