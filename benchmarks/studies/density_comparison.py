"""Density estimators on 8x8 digits, same split, dequantisation and test images: bits/dim in one table.

    python -m benchmarks.studies.density_comparison run                 # mixture, kernels, spline flow
    python -m benchmarks.studies.density_comparison run --run RUN       # and the CDM of a run directory
    python -m benchmarks.studies.density_comparison show

Sizes (components, bandwidth, when to stop) are chosen on the validation images. The spline flow needs the
extra `flows` (zuko). Each result is a JSON line of `--out`; those that are there already are not repeated.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.rows import add_row, read_rows
from cdm_fast import load
from cdm_fast.data import dequantize, load_data
from cdm_fast.data.draws import draw_generator
from cdm_fast.host.optional import need
from cdm_fast.likelihood import evaluate, evaluate_elbo
from cdm_fast.likelihood.units import bits_per_dim
from cdm_fast.runs.checkpoint import load_checkpoint
from cdm_fast.statistics import standard_error

DRAWS = 3  # of dequantisation noise at the test images
COPIES = 10  # dequantised copies of the training images, for estimators that take a fixed set
COMPONENTS = (10, 20, 40)
RIDGES = (1e-3, 3e-3, 1e-2)  # added to the variances of the mixture
BANDWIDTHS = (0.1, 0.15, 0.2, 0.3)
FLOW_STEPS, FLOW_BATCH, FLOW_RATE = 1500, 128, 1e-3
FLOW_SCALE = 3.0  # of the pixels: the splines bend inside [-5, 5] only

Score = Callable[[Tensor], Tensor]  # dequantised rows (n, d) -> log p, nats (n,)


def rows(split: str, seed: int) -> Tensor:
    """(n, 64) dequantised images of a split, float32 in [-1, 1]."""
    data = load_data("digits", split)
    return dequantize(data.images, data.num_grey_levels, draw_generator(seed, 0)).flatten(1)


def scored(score: Score) -> dict[str, float]:
    """bits/dim of the test images, mean over draws, with its standard error over images."""
    data = load_data("digits", "test")
    each = torch.stack([bits_per_dim(score(rows("test", draw)).double(), data) for draw in range(DRAWS)])
    return {"bits_per_dim": float(each.mean()), "bits_per_dim_stderr": standard_error(each.mean(0))}


def best(fits: Iterable[tuple[str, Any]]) -> tuple[str, Any]:
    """The scikit-learn estimator that scores the validation images highest, and its name."""
    validation = rows("validation", 1).numpy()
    return max(fits, key=lambda fit: fit[1].score(validation))


def gaussian_mixture() -> tuple[str, Score]:
    """Full covariances."""
    fit = need("sklearn.mixture", "a Gaussian mixture").GaussianMixture
    x = np.concatenate([rows("train", copy).numpy() for copy in range(COPIES)])
    name, model = best(
        (
            f"{k} components, ridge {ridge:g}",
            fit(k, reg_covar=ridge, random_state=0).fit(x),
        )
        for k in COMPONENTS
        for ridge in RIDGES
    )
    return name, lambda x: torch.from_numpy(model.score_samples(x.double().numpy()))


def kernel_density() -> tuple[str, Score]:
    """Gaussian kernels at the training images."""
    neighbours = need("sklearn.neighbors", "a kernel density")
    x = np.concatenate([rows("train", copy).numpy() for copy in range(COPIES)])
    name, model = best(
        (f"bandwidth {width:g}", neighbours.KernelDensity(bandwidth=width).fit(x)) for width in BANDWIDTHS
    )
    return name, lambda x: torch.from_numpy(model.score_samples(x.double().numpy()))


def spline_flow() -> tuple[str, Score]:
    """Autoregressive rational-quadratic splines (arXiv 1906.04032)."""
    import zuko

    torch.manual_seed(0)
    flow = zuko.flows.NSF(features=64, bins=16, transforms=3, hidden_features=(128, 128))
    optimizer = torch.optim.AdamW(flow.parameters(), FLOW_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FLOW_STEPS)
    data, validation = load_data("digits", "train"), rows("validation", 1)
    generator = torch.Generator().manual_seed(0)

    def log_prob(x: Tensor) -> Tensor:
        return flow().log_prob(FLOW_SCALE * x) + x.shape[1] * math.log(FLOW_SCALE)

    lowest, kept, kept_step = math.inf, flow.state_dict(), 0
    for step in range(1, FLOW_STEPS + 1):
        index = torch.randint(len(data.images), (FLOW_BATCH,), generator=generator)
        x = dequantize(data.images[index], data.num_grey_levels, generator).flatten(1)
        optimizer.zero_grad()
        (-log_prob(x).mean() / 64).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            with torch.no_grad():
                loss = -float(log_prob(validation).mean())
            if loss < lowest:
                lowest, kept, kept_step = loss, copy.deepcopy(flow.state_dict()), step
    flow.load_state_dict(kept)

    @torch.no_grad()
    def score(x: Tensor) -> Tensor:
        return log_prob(x)

    return f"3 transforms, best at step {kept_step} of {FLOW_STEPS}", score


def cdm(run: Path) -> list[dict[str, Any]]:
    """The single pass and the bound of a run, on all test images."""
    model, data = load(run), load_data("digits", "test")
    seconds = load_checkpoint(run, ()).state["seconds"]
    single, bound = evaluate(model, data, check_levels=0), evaluate_elbo(model, data, len(data.images))  # type: ignore[arg-type]
    return [
        {
            "method": f"CDM, {name}",
            "chosen": "digits preset",
            "bits_per_dim": report.bits_per_dim,
            "bits_per_dim_stderr": report.bits_per_dim_stderr,
            "seconds": seconds,
        }
        for name, report in (("single pass", single), ("variational bound", bound))
    ]


METHODS: dict[str, Callable[[], tuple[str, Score]]] = {
    "Gaussian mixture": gaussian_mixture,
    "kernel density": kernel_density,
    "neural spline flow": spline_flow,
}


def measured(method: str) -> dict[str, Any]:
    """One row; `seconds` are those of fitting, the choice of sizes included."""
    began = time.perf_counter()
    chosen, score = METHODS[method]()
    seconds = time.perf_counter() - began
    return {"method": method, "chosen": chosen, **scored(score), "seconds": seconds}


def show(results: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = ["| estimator | bits/dim, 359 test images | chosen | s |", "|---|---|---|---|"]
    for row in sorted(results, key=lambda row: row["bits_per_dim"]):
        figure = f"{row['bits_per_dim']:.3f} +- {row['bits_per_dim_stderr']:.3f}"
        lines.append(f"| {row['method']} | {figure} | {row['chosen']} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--run", type=Path, help="also score the CDM of this run directory")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/density_comparison.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = read_rows(arguments.out)

    def add(row: dict[str, Any]) -> None:
        results.append(add_row(arguments.out, row))

    if arguments.what == "run":
        for method in arguments.methods:
            if not any(row["method"] == method for row in results):
                add(measured(method))
        if arguments.run is not None:
            for row in cdm(arguments.run):
                add(row)
    print(show(results))


if __name__ == "__main__":
    main()
