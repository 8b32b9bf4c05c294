"""`MutualInformation` with its defaults on the tasks of the package benchmark-mi, whose values are known.

    python -m benchmarks.studies.information_tasks --samples DIR --rows 1000

benchmark-mi 0.1.3 needs an old jax (0.4.20), so its samples are made in an environment of their own:

    from bmi.benchmark import BENCHMARK_TASKS
    for name, task in BENCHMARK_TASKS.items():
        x, y = task.sample(1000, seed=0)
        numpy.savez(f"DIR/{name}--1000--0.npz", x=x, y=y, mi=task.mutual_information)

Prints a row for each task as Markdown: the truth, the estimate, its interval, warnings, processor seconds.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from cdm_fast import MutualInformation


def row(file: Path) -> tuple[str, float, bool]:
    """(a line of the table, |error| in nats, whether the interval holds the truth) of one sample."""
    with np.load(file) as sample:
        x, y, truth = sample["x"].astype(float), sample["y"].astype(float), float(sample["mi"])
    began = time.process_time()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = MutualInformation(random_state=0).fit(x, y)
    low, high = found.confidence_interval_
    held = low <= truth <= high
    line = (
        f"| {file.stem.split('--')[0]} | {truth:.2f} | {found.estimate_:.2f} | {low:.2f} .. {high:.2f}"
        f"{'' if held else ' (misses)'} | {'yes' if told else ''} | {time.process_time() - began:.0f} |"
    )
    return line, abs(found.mutual_information_ - truth), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | nats | estimate | interval | warned | CPU s |\n|---|---|---|---|---|---|")
    errors, holds = [], []
    for file in sorted(args.samples.glob(f"*--{args.rows}--{args.seed}.npz")):
        line, error, held = row(file)
        print(line, flush=True)
        errors.append(error)
        holds.append(held)
    print(
        f"\nMean absolute error {np.mean(errors):.3f} nats, worst {max(errors):.2f};"
        f" the interval holds the truth on {sum(holds)} of {len(holds)}."
    )


if __name__ == "__main__":
    main()
