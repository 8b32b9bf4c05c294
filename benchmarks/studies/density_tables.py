"""How near the estimators of `cdm_fast.tables` come to closed forms: one command per table.

    python -m benchmarks.studies.density_tables mixtures
    python -m benchmarks.studies.density_tables mutual-information
    python -m benchmarks.studies.density_tables show  # the tables of what has been run so far, as Markdown

Every run appends one JSON line to `--out`; runs that are there already are not repeated. `--dims`, `--seeds`,
`--references` and `--columns` choose some of them. Seconds are those of `fit` with `--threads` threads,
CPU seconds the sum over threads, which other jobs on the machine change less.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.studies.rows import add_row, read_rows
from benchmarks.support.analytic import GaussianMixture, random_mixture
from cdm_fast.host.optional import need
from cdm_fast.likelihood import flow_log_prob
from cdm_fast.tables import CDMDensity, MutualInformation

MIXTURE_ROWS, TEST_ROWS = 200_000, 5_000
ODE_POINTS = {2: 200, 16: 100, 64: 40}
ODE_TOLERANCE = {2: 1e-5, 16: 1e-5, 64: 1e-4}
MIXTURES = {
    2: {"max_iter": 16000, "batch_size": 1024, "hidden": 128, "depth": 3, "num_levels": 32},
    16: {"max_iter": 2000, "batch_size": 512, "hidden": 256, "depth": 2, "num_levels": 52},
    64: {"max_iter": 30000, "batch_size": 256, "hidden": 256, "depth": 2, "num_levels": 102},
}
PAIRED_ROWS = 200_000
NATS = {20: 5, 40: 10, 80: 20, 160: 40, 320: 80}  # the literature's table, dimensions -> mutual information
MAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda x: x,
    "cubed": lambda x: x**3,
    "half-cubed": lambda x: x * np.sqrt(np.abs(x)),
}


def mixture(dim: int) -> GaussianMixture:
    """8 components with full covariances, or at 64-D ten fitted to dequantised digits."""
    if dim != 64:
        return random_mixture(dim, 8, seed=0)
    digits = need("sklearn.datasets", "the mixture of digits").load_digits().data
    x = 2 * (digits + np.random.default_rng(0).random(digits.shape)) / 17 - 1
    mixture = need("sklearn.mixture", "the mixture of digits")
    fitted = mixture.GaussianMixture(10, reg_covar=1e-3, random_state=0).fit(x)
    return GaussianMixture(*map(torch.from_numpy, (fitted.weights_, fitted.means_, fitted.covariances_)))


def run_mixture(dim: int, seed: int) -> dict:
    """Errors against the closed form in bits/dim: of the single pass, and on some points of the ODE."""
    density, generator = mixture(dim), torch.Generator().manual_seed(seed)
    rows = torch.cat([density.sample(5000, generator) for _ in range((MIXTURE_ROWS + TEST_ROWS) // 5000)])
    rows, test = rows.split([MIXTURE_ROWS, TEST_ROWS])
    began = time.perf_counter(), time.process_time()
    fitted = CDMDensity(**MIXTURES[dim], smallest_noise=0.02, random_state=seed).fit(rows.numpy())
    seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    exact = density.log_prob(test, one, zero)[:, 0].numpy()
    error = (fitted.score_samples(test.numpy()) - exact) / (dim * math.log(2))
    return {
        "mean_error": error.mean(),
        "mean_abs_error": np.abs(error).mean(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        **ode_errors(fitted, density, test[: ODE_POINTS[dim]], generator),
    }


def ode_errors(
    fitted: CDMDensity, density: GaussianMixture, x: torch.Tensor, generator: torch.Generator
) -> dict:
    """Mean error of the ODE likelihood at level 1 and its standard error, and the single pass's there."""
    model, columns = fitted.model_, fitted.columns_
    whiten = torch.from_numpy(columns.whiten / columns.unit[:, None])
    white = GaussianMixture(
        density.weights,
        columns.standardise(density.means.numpy()),
        whiten.T @ density.covariances @ whiten,
    )
    z = columns.standardise(x.numpy())
    a, s = model.schedule.a[1:2], model.schedule.s[1:2]
    z = model.schedule.noise(z, 1, generator=generator)
    exact, bits = white.log_prob(z, a, s)[:, 0], x.shape[1] * math.log(2)
    flow = flow_log_prob(model, z, 1, tolerance=ODE_TOLERANCE[x.shape[1]])
    error = (flow.log_prob - exact) / bits
    with torch.no_grad():
        single = (model.log_prob(z, 1) - exact) / bits
    return {
        "ode_error": error.mean(),
        "ode_stderr": error.std() / math.sqrt(len(z)),
        "single_at_ode": single.mean(),
        "ode_points": len(z),
    }


def run_information(dim: int, seed: int, reference: str, mapped: str) -> dict:
    """Mutual information in nats, default settings: pairs of normals, `rho = sqrt(1 - exp(-4 I/d))`."""
    rng, pairs = np.random.default_rng(seed), dim // 2
    rho = math.sqrt(1 - math.exp(-4 * NATS[dim] / dim))
    x = rng.normal(size=(PAIRED_ROWS, pairs))
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=(PAIRED_ROWS, pairs))
    x, y = MAPS[mapped](x), MAPS[mapped](y)
    began = time.perf_counter(), time.process_time()
    found = MutualInformation(reference=reference, random_state=seed).fit(x, y)
    seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    low, high = found.confidence_interval_
    return {
        "nats": found.mutual_information_,
        "half_width": (high - low) / 2,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def show(results: list[dict]) -> str:
    """The tables in Markdown."""
    lines = [
        "| d | error, bits/dim | its mean size | ODE's error | single pass there | seeds | CPU s per fit |",
        "|" + "---|" * 7,
    ]
    for dim in MIXTURES:
        rows = [r for r in results if r["table"] == "mixtures" and r["dim"] == dim]
        if rows:
            mean = {key: np.mean([r[key] for r in rows]) for key in rows[0] if key.endswith(("error", "ode"))}
            stderr = np.sqrt(np.sum([r["ode_stderr"] ** 2 for r in rows])) / len(rows)
            lines.append(
                f"| {dim} | {mean['mean_error']:+.4f} | {mean['mean_abs_error']:.4f} |"
                f" {mean['ode_error']:+.4f} +- {stderr:.4f} | {mean['single_at_ode']:+.4f} | {len(rows)} |"
                f" {max(r['cpu_seconds'] for r in rows):.0f} |"
            )
    lines += [
        "",
        "| d | nats | columns | reference | found | off | squared error | seeds | CPU s per fit |",
        "|" + "---|" * 9,
    ]
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
                        f" {100 * (np.mean(nats) / exact - 1):+.2f} % |"
                        f" {np.mean((np.array(nats) - exact) ** 2):.2g} | {len(rows)} |"
                        f" {max(r['cpu_seconds'] for r in rows):.0f} |"
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
    done = read_rows(arguments.out)
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
                found = {name: float(value) for name, value in run(dim, seed, **key).items()}
                done.append(add_row(arguments.out, {**what, **found}))
                print({**what, **found}, flush=True)


if __name__ == "__main__":
    main()
