"""Runs all that needs a GPU, stage by stage, within a time limit: `benchmarks/run_gpu.sh`.

Each stage is a process of its own. What it measured is in OUT/results.json as soon as it is measured, what it
printed in OUT/log.txt. A stage that fails or runs out of time leaves its record, and the next one starts; one
that does not fit into what is left of the time is left out, and the record says so.

    results.json: {"environment": {...}, "limit_seconds", "seconds", "finished", "stages": [STAGE, ...]}
    STAGE: {"name", "status", "reason", "exit_status", "seconds", "planned_seconds", "limit_seconds",
            "command", "records", "tail"}
    status: "running", "passed", "failed", "timed out" or "left out"; records: see
    `benchmarks.support.gpu_stages`

Exit status: 0 if every stage passed or was left out, 1 if one failed or timed out, 2 if nothing could start.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
LIMIT = 360.0  # seconds of the whole, unless another limit is given
DRY_RUN_LIMIT, DRY_RUN_PATIENCE = 1200.0, 3  # on a CPU that others use too
START_SECONDS = 120.0  # until the device answers
TAIL = 3000  # characters of a stage's output kept in its record, if it did not pass
POLL_SECONDS = 1.0


class Stage(NamedTuple):
    """One line of the plan."""

    name: str
    planned: float  # seconds that it should take on an H200
    least: float  # not started with less time left
    limit: float  # killed after so many
    command: Callable[["Context"], list[str]]  # raises LeftOut


class LeftOut(Exception):
    """Why a stage cannot run here."""


class Context(NamedTuple):
    """What the commands of the stages are made from."""

    dry_run: bool
    records: Path  # where the stage writes its records, a JSON object a line
    limit: float  # seconds that it has
    scratch: Path  # a folder that is removed at the end
    built: str | None  # what the stage build made: "cuda", "cpp" or "none"; None without that stage

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return "cpu" if self.dry_run else "cuda"


def measured(name: str) -> Callable[[Context], list[str]]:
    """The command of a stage that `benchmarks.support.gpu_stages` holds."""

    def command(context: Context) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.support.gpu_stages", name, str(context.records)]
        words += ["--seconds", f"{context.limit:.0f}", "--scratch", str(context.scratch)]
        return [*words, "--dry-run"] if context.dry_run else words

    return command


def tests(context: Context) -> list[str]:
    """The tests of the ops on the device and `test_gpu`; a few of them on a pretended device in a dry run."""
    tests = ["tests/ops", "tests/test_gpu.py", "--test-device", "cuda"]
    if context.dry_run:
        names = ("linear", "low_rank_noise_level_ce", "head_noise_level_ce")
        few = [f"tests/ops/test_{name}.py" for name in names]
        tests = [*few, "tests/test_gpu.py", "--test-device", "pretend-cuda"]
        tests += ["-k", "linear or low_rank or bad_input or gpu"]  # what launches no kernel
    workers = min(12, os.cpu_count() or 1)
    parallel = ["-n", str(workers), "--dist", "worksteal"] if find_spec("xdist") and workers > 1 else []
    options = ["-p", "no:cacheprovider", "-p", "benchmarks.support.gpu_test_records"]
    options += ["--records", str(context.records)]
    return [sys.executable, "-m", "pytest", *tests, *parallel, *options]


def memcheck(context: Context) -> list[str]:
    """Every CUDA kernel once under memcheck.

    Only this project's kernels are instrumented (their names hold its namespace, cdm), or all where Triton's
    have to do. Without PyTorch's cache each tensor is an allocation of its own, and an access past its end is
    seen. A dry run launches the kernels of the CPU, under nothing.
    """
    kernels = [sys.executable, "-m", "benchmarks.support.sanitize_kernels", "fastest", context.device]
    if context.dry_run:
        return kernels
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise LeftOut("no compute-sanitizer on the PATH")
    options = ["--tool", "memcheck", "--error-exitcode", "1"]
    if context.built in ("cuda", None):
        options += ["--kernel-regex", "kns=cdm"]
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, *options, *kernels]


# The plan, most important first: planned seconds are 360 in all but the last, which takes what is left.
STAGES = (
    Stage("build", 60, 20, 120, measured("build")),
    Stage("tests", 80, 30, 120, tests),
    Stage("memcheck", 25, 10, 40, memcheck),
    Stage("bandwidth", 20, 10, 40, measured("bandwidth")),
    Stage("attention", 35, 10, 70, measured("attention")),
    Stage("step", 45, 20, 75, measured("step")),
    Stage("compiled", 75, 40, 110, measured("compiled")),
    Stage("sampling", 20, 15, 50, measured("sampling")),
    Stage("training", 225, 75, 225, measured("training")),
)


class Run:
    """One call of the script: its record, and the folder that it is kept in.

    Args:
        out: the folder for results.json and log.txt, made if it is not there.
        limit: seconds for the whole.
        dry_run: tiny sizes on the CPU.
        environment: device, versions and commit, for the record.
    """

    def __init__(self, out: Path, limit: float, dry_run: bool, environment: dict[str, Any]) -> None:
        self.out, self.limit, self.dry_run = out, limit, dry_run
        self.began = time.monotonic()
        self.log = out / "log.txt"
        self.log.write_text("")
        self.record: dict[str, Any] = {
            "environment": {**environment, "small": dry_run, "command": "benchmarks/run_gpu.sh"},
            "limit_seconds": limit,
            "seconds": 0.0,
            "finished": False,
            "stages": [],
        }
        self.flush()

    def run(self, stages: tuple[Stage, ...]) -> int:
        """Runs the stages in order; the exit status of the script."""
        with tempfile.TemporaryDirectory() as scratch:
            for stage in stages:
                self._run_stage(stage, Path(scratch))
        self.record["finished"] = True
        self.flush()
        failed = [one["name"] for one in self.record["stages"] if one["status"] in ("failed", "timed out")]
        print(f"== done in {self.record['seconds']:.0f} s; {self.out / 'results.json'}", flush=True)
        if failed:
            print(f"failed: {', '.join(failed)} (see {self.log})", flush=True)
        return int(bool(failed))

    def flush(self) -> None:
        """Writes results.json, whole at every moment."""
        self.record["seconds"] = round(time.monotonic() - self.began, 1)
        part = self.out / "results.json.part"
        part.write_text(json.dumps(self.record, indent=1) + "\n")
        part.replace(self.out / "results.json")

    def _built(self) -> str | None:
        """What the stage build made."""
        records = [record for one in self.record["stages"] for record in one["records"] if "built" in record]
        return records[0]["built"] if records else None

    def _run_stage(self, stage: Stage, scratch: Path) -> None:
        left = self.limit - (time.monotonic() - self.began)
        limit = min(stage.limit * (DRY_RUN_PATIENCE if self.dry_run else 1), left)
        records = scratch / f"{stage.name}.jsonl"
        one: dict[str, Any] = {"name": stage.name, "planned_seconds": stage.planned, "records": []}
        self.record["stages"].append(one)
        try:
            if left < stage.least:
                raise LeftOut(f"{max(left, 0):.0f} s left, and it needs {stage.least:.0f}")
            command = stage.command(Context(self.dry_run, records, limit, scratch, self._built()))
        except LeftOut as reason:
            one.update(status="left out", reason=str(reason))
            print(f"== {stage.name}: left out, {reason}", flush=True)
            self.flush()
            return
        print(f"== {stage.name} (at {self.limit - left:.0f} s, limit {limit:.0f} s)", flush=True)
        one.update(status="running", limit_seconds=round(limit, 1), command=shlex.join(command))
        self.flush()
        self._watch(one, command, limit, records)

    def _watch(self, one: dict[str, Any], command: list[str], limit: float, records: Path) -> None:
        """Runs the command, killing it and all that it started past the limit, and keeps its record."""
        began, start = time.monotonic(), self.log.stat().st_size
        with self.log.open("a") as log:
            log.write(f"== {one['name']}: {one['command']}\n")
            log.flush()
            status = self._wait(command, limit, log, one, records)
        one["seconds"] = round(time.monotonic() - began, 1)
        one["exit_status"] = status
        one["status"] = "timed out" if status is None else "failed" if status else "passed"
        one["records"] = read_records(records)
        if status != 0:
            with self.log.open(errors="replace") as log:
                log.seek(start)
                one["tail"] = log.read()[-TAIL:]
            print(one["tail"], flush=True)
        print(f"   {one['status']} in {one['seconds']:.0f} s", flush=True)
        self.flush()

    def _wait(
        self, command: list[str], limit: float, log: Any, one: dict[str, Any], records: Path
    ) -> int | None:
        """The exit status, 127 if it cannot start, None past the limit."""
        deadline = time.monotonic() + limit
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
        except OSError as error:
            log.write(f"{error}\n")
            return 127
        try:
            while (left := deadline - time.monotonic()) > 0:
                try:
                    return process.wait(min(POLL_SECONDS, left))
                except subprocess.TimeoutExpired:
                    found = read_records(records)
                    if len(found) != len(one["records"]):
                        one["records"] = found
                        self.flush()
            return None
        finally:
            end_all(process)


def end_all(process: subprocess.Popen) -> None:
    """Kills a process that leads a session, and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records that a stage has written so far; half a line at the end is not one yet."""
    try:
        lines = path.read_text().splitlines(keepends=True)
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def environment_of(dry_run: bool) -> dict[str, Any]:
    """Device, versions and commit, found by a process of its own: this one never holds the GPU."""
    program = (
        "import json, sys, torch; from benchmarks.support.environment import facts\n"
        "device = sys.argv[1]\n"
        "if device == 'cuda' and not torch.cuda.is_available(): raise SystemExit(3)\n"
        "found = facts(device)\n"
        "if device == 'cuda': found['capability'] = '%d.%d' % torch.cuda.get_device_capability()\n"
        "print('\\n' + json.dumps(found))"
    )
    device = "cpu" if dry_run else "cuda"
    command = [sys.executable, "-c", program, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=START_SECONDS)
    except subprocess.TimeoutExpired:
        stop(f"{sys.executable} has not found a device within {START_SECONDS:.0f} s; set PYTHON")
    if done.returncode == 3:
        stop(f"the torch of {sys.executable} sees no CUDA device; run this where there is one, or --dry-run")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        stop(f"{sys.executable} cannot use torch ({reason}); set PYTHON to an interpreter that can")
    return json.loads(done.stdout.splitlines()[-1])


def toolkit(cuda_version: str | None) -> Path | None:
    """The CUDA toolkit's folder: $CUDA_HOME, that of torch's version, /usr/local/cuda, or nvcc's own."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), f"/usr/local/cuda-{cuda_version}", "/usr/local/cuda"]
    candidates = [Path(name) for name in named if name] + ([Path(nvcc).resolve().parents[1]] if nvcc else [])
    whole = (path for path in candidates if (path / "bin/nvcc").exists() and (path / "lib64").exists())
    return next(whole, None)


def prepare_environment(found: dict[str, Any], dry_run: bool) -> None:
    """Sets what builds and kernels of all stages go by: PATH, CUDA_HOME and TORCH_CUDA_ARCH_LIST.

    A dry run takes one thread, and compiles nothing: either would take minutes of a busy machine.
    """
    os.environ["PYTHONUNBUFFERED"] = "1"
    if dry_run:
        os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    home = toolkit(found.get("cuda"))
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)
        os.environ["PATH"] = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    if "capability" in found:
        os.environ["TORCH_CUDA_ARCH_LIST"] = found["capability"]
    found["cuda_home"] = None if home is None else str(home)


def stop(message: str) -> NoReturn:
    """Ends the script, which could not start, with a line that says why."""
    print(f"run_gpu.sh: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def chosen(names: str | None) -> tuple[Stage, ...]:
    """The stages of a comma-separated list, in the order of the plan; all without one."""
    if names is None:
        return STAGES
    wanted, known = names.split(","), [stage.name for stage in STAGES]
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        stop(f"--only {', '.join(unknown)}: the stages are {', '.join(known)}")
    return tuple(stage for stage in STAGES if stage.name in wanted)


def parser() -> argparse.ArgumentParser:
    """The command line of `run_gpu.sh`."""
    plan = ", ".join(f"{stage.name} {stage.planned:.0f} s" for stage in STAGES)
    made = argparse.ArgumentParser(
        prog="benchmarks/run_gpu.sh",
        description="Builds, tests and measures on a CUDA device; fetches nothing.",
        epilog=f"Stages, with the seconds planned for each: {plan}. Environment: PYTHON, the interpreter; "
        "CUDA_HOME, the toolkit; CDM_FAST_COMMIT, the commit's name where there is no repository; "
        "CDM_FAST_FASHION_MNIST, a folder of Fashion-MNIST's IDX files to train on, instead of digits.",
    )
    made.add_argument(
        "out", nargs="?", default="build/gpu", help="folder for the results (default: build/gpu)"
    )
    made.add_argument(
        "--limit", type=float, default=None, help=f"seconds for the whole (default: {LIMIT:.0f})"
    )
    made.add_argument("--only", metavar="STAGES", help="some stages only, separated by commas")
    made.add_argument(
        "--dry-run", action="store_true", help="all stages on the CPU in tiny sizes; no figures"
    )
    made.add_argument("--relative-to", type=Path, default=Path(), help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The script; its exit status."""
    options = parser().parse_args(arguments)
    stages = chosen(options.only)
    out = (options.relative_to / options.out).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"the folder {out} cannot be made ({error.strerror}); choose another")
    found = environment_of(options.dry_run)
    prepare_environment(found, options.dry_run)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage ends too
    limit = options.limit if options.limit is not None else DRY_RUN_LIMIT if options.dry_run else LIMIT
    return Run(out, limit, options.dry_run, found).run(stages)


if __name__ == "__main__":
    sys.exit(main())
