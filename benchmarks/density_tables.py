"""How near the estimators of `cdm_fast.density_ratio` come to closed forms: one command per table.

    python -m benchmarks.density_tables mixtures
    python -m benchmarks.density_tables mutual-information
    python -m benchmarks.density_tables show            # the tables of what has been run so far, as Markdown

Every run appends one JSON line to `--out`; runs that are there already are not repeated. `--dims`, `--seeds`
and `--references` choose some of them. Seconds are those of `fit` with `--threads` threads.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn.datasets
import sklearn.mixture
import torch

from cdm_fast.density_ratio import CDMDensity, MutualInformation
from tests.analytic import random_mixture

MIXTURE_ROWS, TEST_ROWS = 200_000, 5_000
MIXTURES = {
    2: {"max_steps": 8000, "batch_size": 1024, "hidden": 128, "depth": 3, "num_levels": 32},
    16: {"max_steps": 9000, "batch_size": 512, "hidden": 256, "depth": 2, "num_levels": 52},
    64: {"max_steps": 8000, "batch_size": 256, "hidden": 256, "depth": 2, "num_levels": 102},
}
PAIRED_ROWS = 100_000
NATS = {20: 5, 40: 10, 80: 20, 160: 40, 320: 80}  # the literature's table, dimensions -> mutual information
INFORMATION = {
    20: {"max_steps": 3000, "hidden": 256},
    40: {"max_steps": 3000, "hidden": 256},
    80: {"max_steps": 3000, "hidden": 256},
    160: {"max_steps": 4000, "hidden": 256},
    320: {"max_steps": 4000, "hidden": 512},
}
MAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda x: x,
    "cubed": lambda x: x**3,
    "half-cubed": lambda x: x * np.sqrt(np.abs(x)),
}


def mixture(dim: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows to fit, rows to test, their exact log density): 8 components, or at 64-D ten fitted to digits."""
    if dim == 64:
        rng = np.random.default_rng(0)
        digits = sklearn.datasets.load_digits().data
        x = 2 * (digits + rng.random(digits.shape)) / 17 - 1
        model = sklearn.mixture.GaussianMixture(10, reg_covar=1e-3, random_state=0).fit(x)
        model.random_state = seed
        rows = rng.permutation(model.sample(MIXTURE_ROWS + TEST_ROWS)[0])
        test = rows[MIXTURE_ROWS:]
        return rows[:MIXTURE_ROWS], test, model.score_samples(test)
    density = random_mixture(dim, 8, seed=0)
    generator = torch.Generator().manual_seed(seed)
    rows = density.sample(MIXTURE_ROWS + TEST_ROWS, generator)
    test = rows[MIXTURE_ROWS:]
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    return rows[:MIXTURE_ROWS].numpy(), test.numpy(), density.log_prob(test, one, zero)[:, 0].numpy()


def run_mixture(dim: int, seed: int) -> dict:
    """Error of the single pass in bits/dim, mean and mean of its size."""
    rows, test, exact = mixture(dim, seed)
    began = time.perf_counter()
    density = CDMDensity(**MIXTURES[dim], smallest_noise=0.02, random_state=seed).fit(rows)
    seconds = time.perf_counter() - began
    error = (density.score_samples(test) - exact) / (dim * math.log(2))
    return {"mean_error": error.mean(), "mean_abs_error": np.abs(error).mean(), "seconds": seconds}


def run_information(dim: int, seed: int, reference: str, mapped: str) -> dict:
    """Mutual information of pairs of normals with `rho = sqrt(1 - exp(-4 I/d))`, in nats."""
    rng, pairs = np.random.default_rng(seed), dim // 2
    rho = math.sqrt(1 - math.exp(-4 * NATS[dim] / dim))
    x = rng.normal(size=(PAIRED_ROWS, pairs))
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=(PAIRED_ROWS, pairs))
    began = time.perf_counter()
    found = MutualInformation(reference=reference, **INFORMATION[dim], random_state=seed)
    found.fit(MAPS[mapped](x), MAPS[mapped](y))
    low, high = found.confidence_interval_
    seconds = time.perf_counter() - began
    return {"nats": found.mutual_information_, "half_width": (high - low) / 2, "seconds": seconds}


def show(results: list[dict]) -> str:
    """The tables in Markdown."""
    lines = ["| d | error, bits/dim | its mean size | seeds | s per fit |", "|---|---|---|---|---|"]
    for dim in MIXTURES:
        rows = [r for r in results if r["table"] == "mixtures" and r["dim"] == dim]
        if rows:
            mean, size, seconds = (
                [r[key] for r in rows] for key in ("mean_error", "mean_abs_error", "seconds")
            )
            lines.append(
                f"| {dim} | {np.mean(mean):+.4f} | {np.mean(size):.4f} | {len(rows)} | {max(seconds):.0f} |"
            )
    lines += ["", "| d | nats | columns | reference | found | off | seeds | s per fit |", "|" + "---|" * 8]
    for dim, exact in NATS.items():
        for mapped in MAPS:
            for reference in ("normal", "shuffled"):
                wanted = {"table": "mutual-information", "dim": dim, "reference": reference, "mapped": mapped}
                rows = [r for r in results if wanted.items() <= r.items()]
                if rows:
                    nats = [r["nats"] for r in rows]
                    spread = f" +- {np.std(nats, ddof=1):.2f}" if len(nats) > 1 else ""
                    lines.append(
                        f"| {dim} | {exact} | {mapped} | {reference} | {np.mean(nats):.2f}{spread} |"
                        f" {100 * (np.mean(nats) / exact - 1):+.1f} % | {len(rows)} |"
                        f" {max(r['seconds'] for r in rows):.0f} |"
                    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=("mixtures", "mutual-information", "show"))
    parser.add_argument("--dims", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--references", nargs="+", default=["normal", "shuffled"])
    parser.add_argument("--columns", nargs="+", choices=MAPS, default=list(MAPS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/density.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    done = (
        [json.loads(line) for line in arguments.out.read_text().splitlines()]
        if arguments.out.exists()
        else []
    )
    if arguments.table == "show":
        print(show(done))
        return
    for seed in arguments.seeds:
        for dim in arguments.dims or (MIXTURES if arguments.table == "mixtures" else NATS):
            keys = (
                [{}]
                if arguments.table == "mixtures"
                else [
                    {"reference": reference, "mapped": mapped}
                    for mapped in arguments.columns
                    for reference in arguments.references
                ]
            )
            for key in keys:
                what = {"table": arguments.table, "dim": dim, "seed": seed, **key}
                if any(what.items() <= result.items() for result in done):
                    continue
                run = run_mixture if arguments.table == "mixtures" else run_information
                result = {**what, "threads": arguments.threads, "torch": torch.__version__}
                result |= {name: float(value) for name, value in run(dim, seed, **key).items()}
                done.append(result)
                with arguments.out.open("a") as file:
                    print(json.dumps(result), file=file)
                print(result, flush=True)


if __name__ == "__main__":
    main()
