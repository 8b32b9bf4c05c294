"""The table of benchmarks/README.md is what the results give; parts of run_gpu.sh are recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import part, report

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = {
    "device": "cpu",
    "cpu": "Some CPU",
    "cpu_capability": "AVX2",
    "threads": 2,
    "python": "3.12.1",
    "torch": "2.13.0",
    "triton": None,
    "commit": "abc1234567+",
    "command": "pytest benchmarks",
    "small": False,
}
GPU = CPU | {"device": "cuda", "gpu": "Some GPU", "driver": "580.1", "cuda": "13.0"}
FIGURE = {"candidate_ms": 1.23456, "baseline_ms": 1234.5, "ratio": 3.0}
QUARTILES = {"ratio_lower_quartile": 2.9, "ratio_upper_quartile": 3.25}


def _document(environment, test="test_float_images", **extra_info):
    entry = {"fullname": f"benchmarks/bench_noising.py::{test}", "extra_info": extra_info}
    return {"machine_info": {"cdm_fast": environment}, "benchmarks": [entry]}


@pytest.fixture
def folder(tmp_path):
    """A benchmarks folder without results."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


def _table(folder, *documents):
    for number, document in enumerate(documents):
        (folder / "results" / f"run{number}.json").write_text(json.dumps(document))
    assert report.main([], folder) == 0
    return (folder / "README.md").read_text()


def test_the_table_of_the_readme_is_what_the_results_give():
    assert report.main(["--check"]) == 0


def test_without_a_gpu_run_the_table_says_so(folder):
    page = _table(folder)
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| all | on a GPU | not measured yet |" in page


def test_a_figure_has_its_row_and_its_run_a_line(folder):
    page = _table(folder, _document(CPU, "test_float_images[a-b]", shape=[8, 3], **FIGURE, **QUARTILES))
    row = "| noising | float images a b | 8x3 | 1.23 | 1234 | 3.00 (2.90-3.25) | — | — | [1] |"
    assert row in page.splitlines()
    assert (
        "- [1] `run0.json`: Some CPU (AVX2), 2 threads; python 3.12.1, torch 2.13.0; "
        "commit abc1234567+; `pytest benchmarks`" in page.splitlines()
    )
    assert "| noising | on a GPU | not measured yet |" in page


def test_a_gpu_run_may_be_a_part_of_the_script(folder):
    peaks = {"candidate_peak_mib": 10.2, "baseline_peak_mib": 99.9, "share_of_copy": 0.876}
    page = _table(folder, {"exit_status": 0, "result": _document(GPU, **FIGURE, **peaks)})
    assert "| noising | float images | — | 1.23 | 1234 | 3.00 | 88% | 10 : 100 | [1] |" in page.splitlines()
    assert "Some GPU, driver 580.1; python 3.12.1, torch 2.13.0, cuda 13.0" in page
    assert "not measured yet" not in page


def test_check_fails_on_a_stale_table_and_writes_nothing(folder, capsys):
    before = _table(folder)
    assert report.main(["--check"], folder) == 0
    (folder / "results" / "new.json").write_text(json.dumps(_document(CPU, **FIGURE)))
    assert report.main(["--check"], folder) == 1
    assert "stale: run `python -m benchmarks.report`" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == before


BAD = {
    "half": ("{", "not JSON"),
    "list": ("[1]", "holds no figures of a benchmark"),
    "empty-part": (json.dumps({"exit_status": 1, "result": None}), "holds no figures of a benchmark"),
    "smoke-run": (json.dumps(_document(CPU | {"small": True})), "a smoke run"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD.keys())
def test_a_bad_result_is_named(folder, capsys, text, says):
    (folder / "results" / "odd.json").write_text(text)
    assert report.main([], folder) == 2
    message = capsys.readouterr().err
    assert f"odd.json: {says}" in message and message.count("\n") == 1


def test_a_readme_without_the_markers_is_named(folder, capsys):
    (folder / "README.md").write_text("nothing here")
    assert report.main([], folder) == 2
    assert "put them back" in capsys.readouterr().err


def test_a_part_records_its_result_and_its_environment(tmp_path):
    program = "import sys, json; json.dump([1], open(sys.argv[1], 'w')); print('said')"
    assert part.run(tmp_path, "one", 20, [sys.executable, "-c", program, "{json}"], "cpu") == 0
    record = json.loads((tmp_path / "one.json").read_text())
    assert (record["exit_status"], record["result"], record["output_tail"]) == (0, [1], "said\n")
    assert record["environment"]["torch"] == torch.__version__
    assert "said" in (tmp_path / "log.txt").read_text()


FAILING = {
    "status": (["-c", "raise SystemExit(3)"], 20, 3),
    "too-long": (["-c", "import time; print('begun', flush=True); time.sleep(60)"], 0.5, part.TIMED_OUT),
}


@pytest.mark.parametrize(("arguments", "limit", "status"), FAILING.values(), ids=FAILING.keys())
def test_a_failing_part_is_recorded(tmp_path, arguments, limit, status):
    assert part.run(tmp_path, "bad", limit, [sys.executable, *arguments], "cpu") == status
    record = json.loads((tmp_path / "bad.json").read_text())
    assert record["exit_status"] == status and record["result"] is None
    assert record["seconds"] < 20


def test_a_program_that_is_not_there_is_recorded(tmp_path):
    assert part.run(tmp_path, "absent", 5, ["/no/such/program"], "cpu") == 127
    assert "/no/such/program" in (tmp_path / "absent.json").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_gpu_script_says_in_one_line_that_there_is_no_gpu(tmp_path):
    done = subprocess.run(
        ["bash", BENCHMARKS / "run_gpu.sh", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("run_gpu.sh: error: ") and done.stderr.count("\n") == 1
    assert "CUDA device" in done.stderr
