"""The table of benchmarks/README.md is what the results give, those of run_gpu.sh among them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.support import report

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


def _rows(environment, case="float images", **measured):
    return [{"environment": environment}, {"benchmark": "noising", "case": case, **measured}]


def _lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """A benchmarks folder without results."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


def _table(folder, *runs):
    """The page with result files, and with a results.json of `run_gpu.sh` for each dict."""
    for number, run in enumerate(runs):
        if isinstance(run, list):
            (folder / "results" / f"cpu-{number}.jsonl").write_text(_lines(run))
        else:
            (folder / "results.json").write_text(json.dumps(run))
            assert report.main(["--keep", str(folder / "results.json"), f"gpu-{number}"], folder) == 0
    assert report.main([], folder) == 0
    return (folder / "README.md").read_text()


def test_the_table_of_the_readme_is_what_the_results_give():
    assert report.main(["--check"]) == 0


def test_without_a_gpu_run_the_table_says_so(folder):
    page = _table(folder)
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| all | on a GPU | not measured yet |" in page


def test_a_figure_has_its_row_and_its_run_a_line(folder):
    page = _table(folder, _rows(CPU, "float images a b", shape=[8, 3], **FIGURE, **QUARTILES))
    row = "| noising | float images a b | 8x3 | 1.23 | 1234 | 3.00 (2.90-3.25) | — | — | [1] |"
    assert row in page.splitlines()
    assert (
        "- [1] `cpu-0.jsonl`: Some CPU (AVX2), 2 threads; python 3.12.1, torch 2.13.0; "
        "commit abc1234567+; `pytest benchmarks`" in page.splitlines()
    )
    assert "| noising | on a GPU | not measured yet |" in page


def _stages(*records, **stage):
    return {"environment": GPU, "stages": [{"name": "step", "status": "passed", "records": records, **stage}]}


def test_the_records_of_the_gpu_script_are_rows(folder):
    record = {"benchmark": "noising", "case": "uint8 cuda", "shape": [8, 3], "share_of_copy": 0.876}
    page = _table(folder, _stages({**record, "candidate_ms": 1.23456, "gb_per_s": 3800.0}))
    assert "| noising | uint8 cuda | 8x3 | 1.23 | — | — | 88% | — | [1] |" in page.splitlines()
    assert "Some GPU, driver 580.1; python 3.12.1, torch 2.13.0, cuda 13.0" in page
    assert "not measured yet" not in page


WHOLE = {
    "profile": "whole",
    "of": "a step",
    "launches": 1418.0,
    "busy_ms": 30.0,
    "span_ms": 40.0,
    "gap_share": 0.25,
}
KERNEL = {
    "profile": "kernel",
    "of": "a step",
    "name": "some_kernel",
    "launches": 12.0,
    "ms": 3.456,
    "share": 0.1,
}
TRAINED = {"benchmark": "training", "case": "digits-encoder", "bits_per_dim": 1.9321, "accuracy": 0.98}
REMARKS = {
    "profile": (
        _stages(WHOLE, KERNEL),
        "a step: 1418 launches, 30.0 ms busy of 40.0, 25% gaps; most ms a step: `some_kernel` 12x 3.46",
    ),
    "training": (
        _stages(TRAINED | {"step": 2500, "seconds": 80.4}),
        "digits-encoder, 2500 steps in 80 s: 1.932 bits/dim (single pass, unaudited), accuracy 98.0%",
    ),
    "failed": (_stages(status="timed out"), "stage step: timed out"),
    "left-out": (_stages(status="left out", reason="5 s left"), "stage step: left out (5 s left)"),
    "error": (
        _stages({"benchmark": "noising", "case": "bf16", "error": "AssertionError: 0.5"}),
        "noising, bf16: no figure, AssertionError: 0.5",
    ),
}


@pytest.mark.parametrize(("document", "says"), REMARKS.values(), ids=REMARKS.keys())
def test_what_is_no_row_of_the_table_stands_below_it(folder, document, says):
    lines = _table(folder, document).splitlines()
    assert lines[lines.index(f"  - {says}") - 1].startswith("- [1] `gpu-0.jsonl`")


def test_check_fails_on_a_stale_table_and_writes_nothing(folder, capsys):
    before = _table(folder)
    assert report.main(["--check"], folder) == 0
    (folder / "results" / "cpu-new.jsonl").write_text(_lines(_rows(CPU, **FIGURE)))
    assert report.main(["--check"], folder) == 1
    assert "stale: run `python -m benchmarks.support.report`" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == before


BAD = {
    "half": ("{", "not JSON"),
    "empty": ("", "holds no figures of a benchmark"),
    "list": ("[1]\n[2]", "holds no figures of a benchmark"),
    "half-a-run": (_lines(_rows(CPU)[:1]), "holds no figures of a benchmark"),
    "other-rows": (_lines([{"environment": CPU}, {"epoch": 1}]), "holds no figures of a benchmark"),
    "no-environment": (_lines(_rows(CPU)[1:]), "holds no figures of a benchmark"),
    "smoke-run": (_lines(_rows(CPU | {"small": True})), "a smoke run"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD.keys())
def test_a_bad_result_is_named(folder, capsys, text, says):
    (folder / "results" / "cpu-odd.jsonl").write_text(text)
    assert report.main([], folder) == 2
    message = capsys.readouterr().err
    assert f"cpu-odd.jsonl: {says}" in message and message.count("\n") == 1


KEPT = {
    "name": (json.dumps(_stages()), "h200", "a name begins with cpu- or gpu-"),
    "half": ("{", "gpu-h200", "cannot be read"),
    "half-a-run": (json.dumps({"stages": [{}]}), "gpu-h200", "not a results.json of run_gpu.sh"),
    "dry-run": (json.dumps({"environment": {"small": True}, "stages": []}), "gpu-h200", "of a dry run"),
}


@pytest.mark.parametrize(("text", "name", "says"), KEPT.values(), ids=KEPT.keys())
def test_what_cannot_be_kept_is_refused_in_one_line(folder, capsys, text, name, says):
    (folder / "results.json").write_text(text)
    assert report.main(["--keep", str(folder / "results.json"), name], folder) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1
    assert not list((folder / "results").iterdir())


def test_a_benchmark_writes_a_row_a_measurement(tmp_path):
    """Each figure is a line as soon as its benchmark has passed; the command is kept without the file."""
    out = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/bench_denoise.py",
        "-k",
        "fp32",
        "--benchmark-only",
    ]
    done = subprocess.run(
        [*command, "--small", "--results", str(out), "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[1],
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert first["environment"]["small"] and str(out) not in first["environment"]["command"]
    assert rows and all(row["benchmark"] == "denoise" and row["ratio"] > 0 for row in rows)
    assert len({row["case"] for row in rows}) == len(rows)


def test_a_readme_without_the_markers_is_named(folder, capsys):
    (folder / "README.md").write_text("nothing here")
    assert report.main([], folder) == 2
    assert "put them back" in capsys.readouterr().err
