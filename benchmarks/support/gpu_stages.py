"""What `run_gpu.sh` measures, one stage a process.

    python -m benchmarks.support.gpu_stages STAGE RECORDS [--seconds S] [--scratch FOLDER] [--dry-run]

A record is a JSON object on a line of RECORDS, written as soon as it is there. One measurement has the keys

    benchmark, case     what: the name of an op or of a file bench_*.py, and which case of it
    shape, dtype        of the tensors
    candidate_ms        median of one call; ms_lower_quartile, ms_upper_quartile
    baseline, baseline_ms, ratio, ratio_lower_quartile, ratio_upper_quartile
                        of a baseline timed in turns, if there is one: its name, and baseline over candidate
    bytes, gb_per_s, copy_gb_per_s, share_of_copy
                        of a memory-bound kernel: what it cannot avoid moving, against a copy's rate
    error               instead of figures: why there are none

and what else a case knows. Device, versions and commit stand once, beside all records.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_attention, bench_bandwidth
from benchmarks.support import gpu_profile
from benchmarks.support.environment import ROOT
from benchmarks.support.networks import Models, without_gradients
from benchmarks.support.timing import in_turns, synchronise, timed
from benchmarks.support.train_steps import BATCH_SIZE, Steps, WholeStep, autocast
from cdm_fast.config import PRESETS
from cdm_fast.data import ImageData
from cdm_fast.likelihood import evaluate
from cdm_fast.ops import attention, attention_vjp
from cdm_fast.ops import backend as _backend
from cdm_fast.sampling import sample
from cdm_fast.training.train import train

BF16 = torch.bfloat16
# Batch, tokens, channels: the 33.4 M network's at batch 128, then longer sequences with narrower heads.
ATTENTION = {"256-tokens": (128, 256, 256), "1024-tokens": (32, 1024, 128), "4096-tokens": (8, 4096, 64)}
TRAINING_SECONDS, SCORING_SECONDS = 180.0, 45.0
GRADIENT_ERROR = 0.1  # of a bf16 step against fp32, relative, of the whole gradient


class Bench:
    """Where a stage runs and where its records go.

    Args:
        path: the file of records.
        dry_run: tiny sizes on the CPU.
        seconds: how long the stage may take.
        scratch: a folder for what it needs to write.
    """

    def __init__(self, path: Path, dry_run: bool, seconds: float, scratch: Path) -> None:
        self.path, self.small, self.seconds, self.scratch = path, dry_run, seconds, scratch
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.failed = False

    def add(self, **record: Any) -> None:
        """Appends a record, and prints it."""
        line = json.dumps(record)
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def case(self, benchmark: str, case: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Adds the record of one measurement, or the error that it ends in; later cases run all the same."""
        names = {"benchmark": benchmark, "case": case}
        try:
            found = measure()
        except Exception as error:  # of any kind: a compiler's, the device's, an assertion's
            traceback.print_exc()
            self.failed = True
            self.add(**names, error=f"{type(error).__name__}: {error}"[:600])
        else:
            self.add(**names, **found)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rounds(self, most: int) -> int:
        """How many rounds a comparison has."""
        return 2 if self.small else most


def build(bench: Bench) -> None:
    """Installs the package as this machine can: with CUDA kernels, with C++ ones, or in plain Python.

    A dry run installs the plain package into a folder of its own and leaves the environment alone.
    """
    ways = {
        "cuda": {"CDM_FAST_REQUIRE_EXT": "1"},
        "cpp": {"CDM_FAST_REQUIRE_EXT": "1", "CDM_FAST_FORCE_CPU": "1"},
        "python": {"CDM_FAST_NO_EXT": "1"},
    }
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    target = ["--target", str(bench.scratch / "site"), "."] if bench.small else ["--editable", "."]
    own = {name: value for name, value in os.environ.items() if name != "CDM_FAST_REQUIRE_EXT"}
    for way in ["python"] if bench.small else ways:
        began = time.perf_counter()
        done = subprocess.run([*install, "-v", *target], cwd=ROOT, env={**own, **ways[way]})
        record = {"install": way, "exit_status": done.returncode}
        bench.add(**record, install_seconds=round(time.perf_counter() - began, 1))
        if done.returncode == 0:
            break
    else:
        bench.failed = True
        return
    program = "import json; from cdm_fast.cli import doctor; print(json.dumps(doctor.report()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    extension = found.get("extension")
    built = "none" if extension is None else "cuda" if extension.get("cuda") else "cpp"
    bench.add(built=built, doctor=found)
    if not bench.small and built != "cuda":
        print("no CUDA kernels were built: the ops run on Triton's", flush=True)
        bench.failed = True


def bandwidth(bench: Bench) -> None:
    """Bytes per second of every memory-bound kernel, against those of a copy."""
    for backend in (*bench_bandwidth.BACKENDS[bench.device.type], *(["reference"] if bench.small else [])):
        reason = _backend.missing(backend)
        if reason is not None:
            bench.add(backend=backend, left_out=reason)
            continue
        for name, make in bench_bandwidth.CASES.items():
            if backend == "cuda" and name in bench_bandwidth.TRITON_ONLY:
                continue
            op, _, rest = name.partition("-")
            bench.case(op, f"{rest} {backend}", partial(_rate, bench, make, backend))


def _rate(bench: Bench, make: Callable[..., bench_bandwidth.Case], backend: str) -> dict[str, Any]:
    torch.manual_seed(0)
    case = make(bench.small, bench.device)
    with _backend.use_backend(backend):
        bench_bandwidth.check(case)(case.op(), case.reference())
        figures = timed(case.op, bench.device, bench.rounds(9))
    rate = case.moved / (1e-3 * figures["candidate_ms"])
    copy = bench_bandwidth.copy_bytes_per_second(case.moved, bench.device)
    return {
        "shape": list(case.shape),
        "dtype": case.dtype,
        **figures,
        "bytes": case.moved,
        "gb_per_s": 1e-9 * rate,
        "copy_gb_per_s": 1e-9 * copy,
        "share_of_copy": rate / copy,
    }


class Way(NamedTuple):
    """One way to compute attention, each a function of the same seven tensors, or None if it has none."""

    forward: Callable[..., Any]
    gradient: Callable[..., Any]  # outputs and gradients with respect to q, k, v
    second: Callable[..., Any] | None  # these, and the gradients of the gradients


def _op_forward(*tensors: Tensor) -> Tensor:
    *_, q, k, v = tensors
    return attention(q, k, v, q.shape[-1] ** -0.5)[0]


def _op_gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
    *_, g, q, k, v = tensors
    scale = q.shape[-1] ** -0.5
    out, lse = attention(q, k, v, scale)
    return out, *attention_vjp(g, q, k, v, out, lse, scale)


def _products(*tensors: Tensor) -> Tensor:
    *_, q, k, v = tensors
    return (q.shape[-1] ** -0.5 * (q @ k.mT)).softmax(-1) @ v


def _sdpa(*tensors: Tensor) -> Tensor:
    q, k, v = (x[:, None] for x in tensors[-3:])  # one head
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


def _with_gradient(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = forward(*tensors)
        return out, *torch.autograd.grad(out, tensors[-3:], tensors[3])

    return both


Forced = Callable[[], AbstractContextManager[None]]  # chooses the op's method
OP = Way(_op_forward, _op_gradient, bench_attention.candidate)
PRODUCTS = Way(_products, _with_gradient(_products), bench_attention.baseline)
SDPA = Way(_sdpa, _with_gradient(_sdpa), None)  # its kernels have no second derivative


def attentions(bench: Bench) -> None:
    """The op by each of its methods, and PyTorch's fused function, against batched products with autograd."""
    shapes = {"small": (1, 64, 16)} if bench.small else ATTENTION
    candidates: dict[str, tuple[Way, Forced]] = {"auto": (OP, nullcontext)}
    if not bench.small:
        candidates = {
            method: (OP, partial(_backend.use_attention_method, method)) for method in ("fused", "composed")
        }
    candidates["sdpa"] = SDPA, nullcontext
    for name, shape in shapes.items():
        for dtype in ("bf16", "fp32") if name in ("small", "256-tokens") else ("bf16",):
            tensors = bench_attention.inputs(shape, bench_attention.DTYPES[dtype], bench.device)
            for kind, (way, (functions, forced)) in product(Way._fields, candidates.items()):
                function = getattr(functions, kind)
                if function is not None:
                    measure = partial(_against_products, bench, tensors, kind, function, forced)
                    bench.case("attention", f"{kind} {name} {dtype} {way}", measure)


def _against_products(
    bench: Bench,
    tensors: list[Tensor],
    kind: str,
    function: Callable[..., Any],
    forced: Forced,
) -> dict[str, Any]:
    products = getattr(PRODUCTS, kind)

    def run() -> Any:
        with forced():
            return function(*tensors)

    pair = (run(), products(*tensors))
    bench_attention.check(*(found if isinstance(found, tuple) else (found,) for found in pair))
    del pair
    figures = in_turns(run, lambda: products(*tensors), bench.device, bench.rounds(7))
    *_, q, _, _ = tensors
    return {"shape": list(q.shape), "dtype": _name(q.dtype), "baseline": "products", **figures}


def step(bench: Bench) -> None:
    """The training step in bf16: against double backward, against our DDM, whole, and its kernels."""
    steps = Steps(bench.small, bench.device)
    bench.case("train_step", "bf16 against double backward in fp32", lambda: _against_plain(bench, steps))
    bench.case("train_step", "bf16 against ddm", lambda: _against_ddm(bench, steps))
    whole = WholeStep(bench.small, bench.device, "bf16", compile="off")
    bench.case("end_to_end", "whole step bf16", lambda: _whole(bench, whole))
    calls = 2 if bench.small else 5
    launches = gpu_profile.launches_of(whole.step, calls, bench.device)
    for row in gpu_profile.table(launches, calls):
        bench.add(**row, of="whole step bf16")


def _against_plain(bench: Bench, steps: Steps) -> dict[str, Any]:
    ours, plain = steps.adjoint(BF16), steps.plain()
    error = _relative_error(ours(), plain())
    assert error < GRADIENT_ERROR, f"the gradient's relative error is {error}"
    figures = in_turns(ours, plain, bench.device, bench.rounds(5))
    shape = list(steps.batch.x0.shape)
    return {
        "shape": shape,
        "dtype": "bf16",
        "baseline": "double backward, fp32",
        **figures,
        "gradient_relative_error": error,
    }


def _against_ddm(bench: Bench, steps: Steps) -> dict[str, Any]:
    figures = in_turns(steps.adjoint(BF16), steps.ddm(BF16), bench.device, bench.rounds(7))
    return {"shape": list(steps.batch.x0.shape), "dtype": "bf16", "baseline": "ddm", **figures}


def _whole(bench: Bench, whole: WholeStep) -> dict[str, Any]:
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loss = whole.step()
    assert bool(torch.isfinite(loss)), f"the loss is {float(loss)}"
    figures = timed(whole.step, bench.device, bench.rounds(9))
    if bench.device.type == "cuda":
        figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    rate = 1e3 * whole.shape[0] / figures["candidate_ms"]
    return {"shape": list(whole.shape), "dtype": "bf16", **figures, "images_per_second": rate}


def compiled(bench: Bench) -> None:
    """The compiled step against the eager one, as it is and recorded as CUDA graphs.

    In a dry run the compiler hands back the function that it is given.
    """
    steps = Steps(bench.small, bench.device)
    for mode in ("default", "reduce-overhead"):
        bench.case("train_step", f"compiled {mode} bf16", partial(_compiled, bench, steps, mode))


def _compiled(bench: Bench, steps: Steps, mode: Any) -> dict[str, Any]:
    candidate, eager = steps.adjoint(BF16, compile=mode), steps.adjoint(BF16)
    began = time.perf_counter()
    candidate()
    synchronise(bench.device)
    seconds = time.perf_counter() - began
    error = _relative_error(candidate(), eager())
    assert error < GRADIENT_ERROR / 2, f"the gradient's relative error is {error}"
    figures = in_turns(candidate, eager, bench.device, bench.rounds(5))
    shape = list(steps.batch.x0.shape)
    return {"shape": shape, "dtype": "bf16", "baseline": "eager", **figures, "compile_seconds": seconds}


def sampling(bench: Bench) -> None:
    """Whole runs of two samplers against our DDM's, and the likelihood of 1,024 images, in bf16."""
    models = Models(bench.small, bench.device)
    ours, ddm = models.cdm(), models.ddm()
    batch, steps = (2, 3) if bench.small else (BATCH_SIZE["cuda"], 50)

    def images(model: Any, sampler: Any) -> Tensor:
        with autocast(bench.device, BF16):
            return sample(model, batch, sampler, steps)

    def against_ddm(sampler: str) -> dict[str, Any]:
        found = images(ours, sampler)
        assert bool(torch.isfinite(found).all()), "images that are not finite"
        figures = in_turns(
            lambda: images(ours, sampler), lambda: images(ddm, sampler), bench.device, bench.rounds(3)
        )
        rate = 1e3 * batch / figures["candidate_ms"]
        shape = list(found.shape)
        return {"shape": shape, "dtype": "bf16", "baseline": "ddm", **figures, "images_per_second": rate}

    for sampler in ("ddim", "ddpm"):
        bench.case("sampling", f"{sampler} {steps} steps bf16", partial(against_ddm, sampler))
    bench.case("nll", "protocol bf16", lambda: _likelihood(bench, models, ours))


def _likelihood(bench: Bench, models: Models, model: Any) -> dict[str, Any]:
    count, batch = (8, 4) if bench.small else (1024, BATCH_SIZE["cuda"])
    size, channels = models.sizes[:2]
    pixels = torch.randint(256, (count, channels, size, size), dtype=torch.uint8)
    data = ImageData(pixels, None, 256, None, "random", "test")
    x = models.images(batch)

    def protocol() -> float:
        report = evaluate(model, data, draws=1, batch_size=batch, check_levels=0, precision="bf16")
        return report.bits_per_dim

    def forward() -> None:
        with autocast(bench.device, BF16):
            for _ in range(count // batch):
                model.network(x)

    bits_per_dim = protocol()
    assert bits_per_dim == bits_per_dim, "bits/dim is NaN"
    figures = in_turns(protocol, without_gradients(forward), bench.device, bench.rounds(5))
    rate = 1e3 * count / figures["candidate_ms"]
    shape = list(pixels.shape)
    return {"shape": shape, "dtype": "bf16", "baseline": "forward", **figures, "images_per_second": rate}


def training(bench: Bench) -> None:
    """Trains the preset fashion-mnist-encoder for the time that is left; bits/dim and accuracy.

    Without the folder $CDM_FAST_FASHION_MNIST it is digits-encoder, on scikit-learn's digits. The number of
    steps is what the time allows, so that the learning rate comes down as it should.
    """
    folder = os.environ.get("CDM_FAST_FASHION_MNIST")
    name = "fashion-mnist-encoder" if folder else "digits-encoder"
    config = PRESETS[name]
    # Eager: how long compiling takes on this device is not known yet, and the time is short.
    config = replace(
        config,
        data=replace(config.data, source=folder or config.data.source),
        train=replace(config.train, compile="off"),
        output=replace(config.output, sample_every=0, evaluate_every=0, save_every=10**9, draws=1),
    )
    if bench.small:
        config = replace(
            config,
            schedule=replace(config.schedule, T=20),
            output=replace(config.output, num_samples=10, sampling_steps=2),
        )
    trial = WholeStep(bench.small, bench.device, compile="off", config=config)
    trial.step()
    seconds = timed(trial.step, bench.device, bench.rounds(9))["candidate_ms"] / 1e3
    budget = min(TRAINING_SECONDS, bench.seconds - SCORING_SECONDS)
    steps = 5 if bench.small else max(100, min(4 * config.train.steps, int(budget / seconds)))
    bench.add(benchmark="training", case=f"{name} trial", candidate_ms=1e3 * seconds, steps=steps)
    config = replace(config, train=replace(config.train, steps=steps))
    score = train(config, bench.scratch / "run", device=bench.device.type)
    keys = ("bits_per_dim", "accuracy", "ece", "step", "seconds", "images_per_second", "skipped_steps")
    bench.add(benchmark="training", case=name, **{key: score.get(key) for key in keys})


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in bench_attention.DTYPES.items() if value == dtype)


STAGES: dict[str, Callable[[Bench], None]] = {
    "build": build,
    "bandwidth": bandwidth,
    "attention": attentions,
    "step": step,
    "compiled": compiled,
    "sampling": sampling,
    "training": training,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one stage. Exit status: 1 if a part of it failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.support.gpu_stages")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("records", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long it may take")
    parser.add_argument("--scratch", type=Path, default=Path(), help="a folder for what it writes")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    bench = Bench(options.records, options.dry_run, options.seconds, options.scratch)
    torch.manual_seed(0)
    STAGES[options.stage](bench)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
