"""`MutualInformation` with its defaults on the tasks of the package benchmark-mi, whose values are known.

    python -m benchmarks.studies.information_tasks run --samples DIR --rows 1000
    python -m benchmarks.studies.information_tasks independent --columns 1 --rows 1000 --seeds 6
    python -m benchmarks.studies.information_tasks show

benchmark-mi 0.1.3 needs an old jax (0.4.20), so its samples are made in an environment of their own:

    from bmi.benchmark import BENCHMARK_TASKS
    for name, task in BENCHMARK_TASKS.items():
        x, y = task.sample(1000, seed=0)
        numpy.savez(f"DIR/{name}--1000--0.npz", x=x, y=y, mi=task.mutual_information)

Each task appends one JSON line to `--out`; those that are there already are not repeated, nor are tasks whose
samples have the very ranks of another's: increasing maps change nothing (`ranks`). Beside it stands
the estimate of Kraskov, Stögbauer and Grassberger (2004, eq. 8) with 5 neighbours on the same normal scores.
`independent` fits normal columns of X and as many of Y that have nothing to do with them, once for each seed.
`show` prints a row for each task as Markdown, and a summary.
"""

import argparse
import hashlib
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.studies.rows import add_row, has_row, read_rows
from cdm_fast import MutualInformation
from cdm_fast.tables.columns import normal_scores
from cdm_fast.tables.experts import Neighbours


def read(file: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """(x, y, their mutual information in nats) of a sample."""
    with np.load(file) as sample:
        return sample["x"].astype(float), sample["y"].astype(float), float(sample["mi"])


def ranks(x: np.ndarray, y: np.ndarray) -> str:
    """A digest of the ranks of every column."""
    order = np.argsort(np.concatenate([x, y], axis=1), axis=0, kind="stable")
    return hashlib.sha256(order.astype(np.int32).tobytes()).hexdigest()[:16]


def measured(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The estimate, its interval, warnings, processor seconds and KSG's estimate of one sample."""
    began = time.process_time()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = MutualInformation(random_state=0).fit(x, y)
    seconds = time.process_time() - began
    low, high = found.confidence_interval_
    return {
        "estimate": found.estimate_,
        "low": low,
        "high": high,
        "held_out": found.held_out_,
        "trained": found.trained_,
        "missed": found.missed_,
        "warnings": [str(one.message) for one in told],
        "ksg": neighbours_alone(x, y),
        "cpu_seconds": seconds,
    }


def neighbours_alone(x: np.ndarray, y: np.ndarray) -> float:
    """KSG's estimate in nats."""
    table = np.concatenate([x, y], axis=1)
    scores = normal_scores(table, np.random.default_rng(0)).numpy()
    return float(Neighbours(scores, x.shape[1])(scores, own=True).mean())


def independent(columns: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal columns of X and of Y without any dependence."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, columns)), rng.normal(size=(rows, columns))


def show(results: list[dict[str, Any]]) -> str:
    """A table for each number of rows, and one of independent columns, in Markdown."""
    lines = []
    tasks = [row for row in results if row["truth"]]
    for rows in sorted({row["rows"] for row in tasks}):
        some = sorted((row for row in tasks if row["rows"] == rows), key=lambda row: row["task"])
        lines += [
            f"{rows} rows, {len(some)} tasks:",
            "",
            "| task | nats | estimate | interval | warned | KSG | CPU s |",
        ]
        lines += ["|" + "---|" * 7, *(_line(row) for row in some), "", _summary(some), ""]
    alone = [row for row in results if not row["truth"]]
    if alone:
        lines += ["| columns | rows | seed | estimate | interval | warned | CPU s |", "|" + "---|" * 7]
        lines += [_line_of_independent(row) for row in alone]
    return "\n".join(lines)


def holds(row: dict[str, Any]) -> bool:
    """Whether the interval holds the truth."""
    return row["low"] <= row["truth"] <= row["high"]


def _figures(row: dict[str, Any], digits: int) -> str:
    """The estimate, its interval and whether a warning came with it."""
    estimate, low, high = (f"{row[name]:.{digits}f}" for name in ("estimate", "low", "high"))
    interval = f"{low} .. {high}{'' if holds(row) else ' (misses)'}"
    return f"{estimate} | {interval} | {'yes' if row['warnings'] else ''}"


def _line(row: dict[str, Any]) -> str:
    figures = f"{row['truth']:.2f} | {_figures(row, 2)} | {row['ksg']:.2f}"
    return f"| {row['task']} | {figures} | {row['cpu_seconds']:.0f} |"


def _line_of_independent(row: dict[str, Any]) -> str:
    columns = row["task"].removeprefix("independent-").replace("-", " x ")
    return f"| {columns} | {row['rows']} | {row['seed']} | {_figures(row, 4)} | {row['cpu_seconds']:.0f} |"


def _summary(some: list[dict[str, Any]]) -> str:
    error = [abs(max(row["estimate"], 0) - row["truth"]) for row in some]
    told = sum(holds(row) or bool(row["warnings"]) for row in some)
    ksg = [abs(row["ksg"] - row["truth"]) for row in some]
    seconds = [row["cpu_seconds"] for row in some]
    return (
        f"Mean absolute error {np.mean(error):.3f} nats, worst {max(error):.2f}; the interval holds the truth"
        f" on {sum(map(holds, some))} of {len(some)}, and {told} hold it or carry a warning. KSG errs"
        f" by {np.mean(ksg):.3f}, and is farther from the truth on"
        f" {sum(e < k for e, k in zip(error, ksg, strict=True))}. CPU seconds of a fit:"
        f" {np.median(seconds):.0f} (median), {max(seconds):.0f} (longest)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "independent", "show"))
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--tasks", nargs="+", help="names of some of the tasks; all by default")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=1, help="of X, and of Y, for `independent`")
    parser.add_argument("--seeds", type=int, default=1, help="number of draws for `independent`")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/information.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "run":
        files = sorted(args.samples.glob(f"*--{args.rows}--{args.seed}.npz"))
        names = args.tasks or [file.stem.split("--")[0] for file in files]
        for name in names:
            task = {"task": name, "rows": args.rows, "seed": args.seed}
            done = read_rows(args.out)
            if any(task.items() <= row.items() for row in done):
                continue
            x, y, truth = read(args.samples / f"{name}--{args.rows}--{args.seed}.npz")
            same = {"rows": args.rows, "seed": args.seed, "ranks": ranks(x, y)}
            found = next((row for row in done if same.items() <= row.items()), None) or measured(x, y)
            add_row(args.out, {**found, **task, **same, "truth": truth})
    if args.what == "independent":
        for seed in range(args.seeds):
            task = {"task": f"independent-{args.columns}-{args.columns}", "rows": args.rows, "seed": seed}
            if not has_row(args.out, task):
                x, y = independent(args.columns, args.rows, seed)
                add_row(args.out, {**measured(x, y), **task, "truth": 0.0})
    print(show(read_rows(args.out)))


if __name__ == "__main__":
    main()
