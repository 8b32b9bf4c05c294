"""The two-sample test of `DensityRatio`: how often it rejects equal sets, and how often it sees a difference.

    python -m benchmarks.studies.two_sample_tests run
    python -m benchmarks.studies.two_sample_tests show

Each draw is two sets of `--rows` rows of a normal distribution in two dimensions, the second one changed
(`CHANGES`). Beside it stand two classifier two-sample tests (Lopez-Paz, Oquab, 2017), with half of the rows
to train on and a binomial test of the accuracy on the others: the nearest neighbours of that paper, and
logistic regression with squares. `run` appends one JSON line a change to `--out`, `show` prints the table.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures

from benchmarks.studies.rows import add_row, read_rows
from cdm_fast.tables import DensityRatio

NOMINAL = 0.05
# Smaller than the defaults, which take seconds a fit: the level does not depend on how good a network is.
SETTINGS = {"max_iter": 60, "hidden": 32, "depth": 1, "num_levels": 10, "cv": 2}


def ring(x: np.ndarray) -> np.ndarray:
    """Rows whose lengths are squeezed towards their mean: no moment up to the second tells them apart."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    squeezed = np.sqrt(2 + 0.4 * (length**2 - 2))
    return x / length * np.maximum(squeezed, 1e-3)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "shift of 0.3": lambda x: x + [0.3, 0],
    "scale of 1.3": lambda x: x * [1.3, 1],
    "correlation of 0.4": lambda x: np.stack([x[:, 0], 0.4 * x[:, 0] + np.sqrt(1 - 0.16) * x[:, 1]], axis=1),
    "towards a ring": ring,
}


def classifier_test(classifier: Any, x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """The p-value of a classifier two-sample test."""
    train, test, train_y, test_y = train_test_split(x, y, test_size=0.5, stratify=y, random_state=seed)
    right = int((classifier.fit(train, train_y).predict(test) == test_y).sum())
    return float(binomtest(right, len(test), 0.5, alternative="greater").pvalue)


def p_values(change: str, rows: int, seed: int) -> dict[str, float]:
    """The three tests on one draw."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=(rows, 2)), CHANGES[change](rng.normal(size=(rows, 2)))])
    y = np.repeat([0, 1], rows)
    squares = make_pipeline(PolynomialFeatures(2), LogisticRegression())
    ratio = DensityRatio(**SETTINGS, random_state=seed).fit(x, y)
    return {
        "density ratio": ratio.two_sample_test(199, random_state=seed).p_value,
        "neighbours": classifier_test(KNeighborsClassifier(int(np.sqrt(rows))), x, y, seed),
        "logistic regression": classifier_test(squares, x, y, seed),
    }


def show(results: list[dict[str, Any]]) -> str:
    """Shares of draws that each test rejects, as Markdown."""
    tests = ("density ratio", "neighbours", "logistic regression")
    lines = [f"| change | rows of a set | draws | {' | '.join(tests)} |", "|" + "---|" * 6]
    for row in results:
        shares = " | ".join(f"{100 * row[test]:.1f} %" for test in tests)
        lines.append(f"| {row['change']} | {row['rows']} | {row['draws']} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/two_sample.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for change in args.changes if args.what == "run" else ():
        what = {"change": change, "rows": args.rows, "draws": args.draws}
        if any(what.items() <= row.items() for row in read_rows(args.out)):
            continue
        began = time.process_time()
        found = [p_values(change, args.rows, seed) for seed in range(args.draws)]
        rejected = {test: float(np.mean([one[test] <= NOMINAL for one in found])) for test in found[0]}
        add_row(args.out, {**what, **rejected, "cpu_seconds": time.process_time() - began})
    print(show(read_rows(args.out)))


if __name__ == "__main__":
    main()
