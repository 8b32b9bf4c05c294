"""benchmarks/run_gpu.sh: every stage runs in a dry run, and a failing stage loses no other's records."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.support import gpu_profile, gpu_run, gpu_stages
from benchmarks.support.gpu_profile import Launch
from benchmarks.support.gpu_run import Context, LeftOut, Run, Stage

SCRIPT = Path(__file__).parents[1] / "benchmarks/run_gpu.sh"


def program(source):
    """The command of a stage: a Python program, which finds the file for its records in sys.argv[1]."""
    return lambda context: [sys.executable, "-c", source, str(context.records)]


def stage(name, source, limit=30.0, least=0.0):
    return Stage(name, 1.0, least, limit, program(source))


WRITES = (
    "import sys; open(sys.argv[1], 'a').write('{\"a\": 1}\\n{\"b\": 2}\\n{\"half'); print('said', flush=True)"
)
GOOD = stage("good", WRITES)


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def run(tmp_path):
    """run(*stages, limit=100): the exit status, and the record of each stage by name."""

    def call(*stages, limit=100.0):
        status = Run(tmp_path, limit, True, {"device": "cpu"}).run(stages)
        found = results(tmp_path)
        assert found["finished"]
        return status, {one["name"]: one for one in found["stages"]}

    return call


def test_a_stage_leaves_its_records_and_its_output(run, tmp_path):
    status, stages = run(GOOD)
    assert status == 0
    good = stages["good"]
    assert (good["status"], good["exit_status"], good["records"]) == ("passed", 0, [{"a": 1}, {"b": 2}])
    assert "tail" not in good and "said" in (tmp_path / "log.txt").read_text()


def _left_out(context):
    raise LeftOut("no such tool")


BAD = {
    "status": (stage("bad", f"{WRITES}; raise SystemExit(3)"), "failed", 3),
    "too-long": (stage("bad", f"{WRITES}; import time; time.sleep(60)", limit=3.0), "timed out", None),
}


@pytest.mark.parametrize(("bad", "status", "exit_status"), BAD.values(), ids=BAD.keys())
def test_a_stage_that_fails_or_times_out_is_told_and_the_rest_runs(run, bad, status, exit_status):
    code, stages = run(bad, GOOD)
    assert code == 1
    assert (stages["bad"]["status"], stages["bad"]["exit_status"]) == (status, exit_status)
    assert stages["bad"]["records"] == [{"a": 1}, {"b": 2}] and stages["bad"]["tail"].endswith("said\n")
    assert stages["bad"]["seconds"] < 30 and stages["good"]["status"] == "passed"


def test_a_program_that_is_not_there_is_told_and_the_rest_runs(run):
    code, stages = run(Stage("absent", 1, 0, 9, lambda context: ["/no/such/program"]), GOOD)
    assert code == 1 and stages["good"]["status"] == "passed"
    assert stages["absent"]["status"] == "failed" and "/no/such/program" in stages["absent"]["tail"]


def test_what_cannot_run_or_does_not_fit_is_left_out_and_no_failure(run):
    long = stage("long", WRITES, least=1000.0)
    code, stages = run(Stage("odd", 1, 0, 9, _left_out), long, GOOD)
    assert code == 0 and stages["good"]["status"] == "passed"
    assert (stages["odd"]["status"], stages["odd"]["reason"]) == ("left out", "no such tool")
    assert stages["long"]["status"] == "left out" and "it needs 1000" in stages["long"]["reason"]


def test_nothing_that_a_stage_starts_outlives_it(run, tmp_path):
    child = f"import time; time.sleep(6); open({str(tmp_path / 'late')!r}, 'w')"
    source = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    _, stages = run(stage("parent", source, limit=2.0))
    assert stages["parent"]["status"] == "timed out"
    time.sleep(6)
    assert not (tmp_path / "late").exists()


def test_records_are_in_the_results_while_a_stage_runs(tmp_path):
    seen = f"{WRITES}\nimport json, time\nfor _ in range(100):\n time.sleep(0.2)\n"
    seen += f" stage = json.load(open({str(tmp_path / 'results.json')!r}))['stages'][0]\n"
    seen += " if len(stage['records']) == 2 and stage['status'] == 'running': raise SystemExit(0)\n"
    assert Run(tmp_path, 60.0, True, {}).run((stage("slow", seen + "raise SystemExit(1)"),)) == 0


def test_the_plan_fits_its_limit():
    *plan, training = gpu_run.STAGES
    assert sum(stage.planned for stage in plan) <= gpu_run.LIMIT
    assert training.name == "training"
    assert all(stage.least <= stage.planned <= stage.limit for stage in gpu_run.STAGES)
    readme = SCRIPT.with_name("README.md").read_text()
    assert all(f"| {stage.name} | {stage.planned:.0f} |" in readme for stage in plan)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """(A wrapper of nvcc, which is on the PATH; a whole toolkit with compute-sanitizer, which is not)."""
    wrapper, whole = tmp_path / "wrapper", tmp_path / "cuda"
    for program in (wrapper / "bin/nvcc", whole / "bin/nvcc", whole / "bin/compute-sanitizer"):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(0o755)
    (whole / "lib64").mkdir()
    monkeypatch.setenv("PATH", str(wrapper / "bin"))
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, "")
    return wrapper, whole


def test_the_toolkit_is_a_whole_one_and_the_architecture_the_devices(machine, monkeypatch):
    wrapper, whole = machine
    monkeypatch.setenv("CUDA_HOME", str(wrapper))
    assert gpu_run.toolkit("0.0") not in (wrapper, whole)
    monkeypatch.setenv("CUDA_HOME", str(whole))
    found = {"cuda": "0.0", "capability": "9.0"}
    gpu_run.prepare_environment(found, dry_run=False)
    assert found["cuda_home"] == os.environ["CUDA_HOME"] == str(whole)
    assert os.environ["PATH"].startswith(f"{whole / 'bin'}:") and os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"


@pytest.mark.parametrize(("built", "filtered"), [("cuda", True), (None, True), ("none", False)], ids=str)
def test_memcheck_looks_at_this_projects_kernels_where_they_are_built(machine, monkeypatch, built, filtered):
    context = Context(False, Path("records"), 9.0, Path("scratch"), built)
    with pytest.raises(LeftOut, match="no compute-sanitizer"):
        gpu_run.memcheck(context)
    monkeypatch.setenv("PATH", str(machine[1] / "bin"))
    assert ("kns=cdm" in gpu_run.memcheck(context)) == filtered


BUILDS = {
    "cuda": ([0], {"cuda": True}, 0),
    "cpp": ([1, 0], {"cuda": False}, 1),
    "python": ([1, 1, 0], None, 1),
}


@pytest.mark.parametrize(("statuses", "extension", "code"), BUILDS.values(), ids=BUILDS.keys())
def test_a_build_that_fails_leaves_the_next_best(tmp_path, monkeypatch, statuses, extension, code):
    installs = iter(statuses)

    def run(command, **options):
        if "pip" in command:
            return subprocess.CompletedProcess(command, next(installs))
        report = json.dumps({"extension": extension, "backends": [], "missing": []})
        return subprocess.CompletedProcess(command, 0, stdout=report)

    monkeypatch.setattr(gpu_stages.subprocess, "run", run)
    bench = gpu_stages.Bench(tmp_path / "records", False, 9.0, tmp_path)
    gpu_stages.build(bench)
    *tried, last = gpu_run.read_records(tmp_path / "records")
    assert [record["install"] for record in tried] == ["cuda", "cpp", "python"][: len(statuses)]
    assert last["built"] == ("none" if extension is None else "cuda" if extension["cuda"] else "cpp")
    assert int(bench.failed) == code


def test_a_case_that_fails_is_a_record_and_the_next_one_runs(tmp_path):
    bench = gpu_stages.Bench(tmp_path / "records", True, 9.0, tmp_path)
    bench.case("noising", "odd", lambda: 1 / 0)
    bench.case("noising", "even", lambda: {"candidate_ms": 1.0})
    odd, even = gpu_run.read_records(tmp_path / "records")
    assert odd["error"] == "ZeroDivisionError: division by zero" and bench.failed
    assert even == {"benchmark": "noising", "case": "even", "candidate_ms": 1.0}


def call(*arguments, **environment):
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_script_says_in_one_line_that_there_is_no_gpu(tmp_path):
    done = call(tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("run_gpu.sh: error: ") and done.stderr.count("\n") == 1
    assert "CUDA device" in done.stderr


def test_an_interpreter_without_torch_is_one_line(tmp_path):
    broken = tmp_path / "torch.py"
    broken.write_text("raise ImportError('no torch here')")
    done = call(tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot use torch (ImportError: no torch here); set PYTHON" in done.stderr


def test_an_unknown_stage_is_named(tmp_path):
    done = call(tmp_path, "--only", "bandwith", "--dry-run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "bandwith: the stages are build, tests" in done.stderr


NUMBERS = {"candidate_ms", "shape", "dtype"}


def test_a_dry_run_goes_through_every_stage(tmp_path):
    """On one thread of the CPU, with tiny sizes, and without a repository to ask for the commit."""
    done = call(tmp_path, "--dry-run", GIT_DIR="/nowhere", CDM_FAST_COMMIT="abc1234")
    assert done.returncode == 0, done.stdout
    found = results(tmp_path)
    assert found["finished"] and found["environment"]["commit"] == "abc1234" and found["environment"]["small"]
    stages = {one["name"]: one for one in found["stages"]}
    assert list(stages) == [stage.name for stage in gpu_run.STAGES]
    assert {one["status"] for one in stages.values()} == {"passed"}
    records = {name: one["records"] for name, one in stages.items()}
    assert records["tests"][-1]["tests"]["failed"] == 0 < records["tests"][-1]["tests"]["passed"]
    assert "built" in records["build"][-1]
    for name in ("bandwidth", "attention", "step", "compiled", "sampling"):
        measured = [record for record in records[name] if "benchmark" in record]
        assert measured and all(record.keys() >= NUMBERS for record in measured), name
    assert all("share_of_copy" in record for record in records["bandwidth"] if "benchmark" in record)
    assert {record["case"].split()[-1] for record in records["attention"]} == {"auto", "sdpa"}
    assert [row["profile"] for row in records["step"] if "profile" in row][:2] == ["whole", "kernel"]
    assert records["training"][-1].keys() >= {"bits_per_dim", "accuracy"}


def test_the_profile_counts_launches_and_gaps():
    # Two calls; in each, a and b overlap, then nothing runs for 4 of 10 microseconds.
    launches = [
        Launch(name, start + shift, end + shift)
        for shift in (0, 10)
        for name, start, end in (("a", 0, 3), ("b", 2, 5), ("a", 9, 10))
    ]
    whole, a, b = gpu_profile.table(launches, calls=2)
    assert whole == {
        "profile": "whole",
        "launches": 3.0,
        "kernels": 2,
        "busy_ms": pytest.approx(0.006),
        "span_ms": pytest.approx(0.010),
        "gap_share": pytest.approx(0.4),
    }
    assert (a["name"], a["launches"], a["ms"], a["share"]) == ("a", 2.0, pytest.approx(0.004), 4 / 7)
    assert (b["name"], b["launches"], b["ms"]) == ("b", 1.0, pytest.approx(0.003))
