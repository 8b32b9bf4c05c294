"""Outliers in eight tables of mlbench: `CDMDensity` beside the detectors of scikit-learn, by AUROC.

    python -m benchmarks.studies.outlier_tables run --mlbench DIR
    python -m benchmarks.studies.outlier_tables show

A detector sees half of the inliers, at most `--most` rows, and ranks the other half, of at most as many, and
all outliers, of at most as many too. All have their defaults; the three of scikit-learn get columns of unit
variance. `run` appends one JSON line for each detector and table to `--out`.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from benchmarks.studies.rows import add_row, read_rows
from benchmarks.studies.table_sets import OUTLIERS, mlbench
from cdm_fast.statistics import auroc
from cdm_fast.tables import CDMDensity

DETECTORS: dict[str, Any] = {
    "CDMDensity": lambda: CDMDensity(score_noise=0.5, random_state=0),
    "isolation forest": lambda: make_pipeline(StandardScaler(), IsolationForest(random_state=0)),
    "local outlier factor": lambda: make_pipeline(StandardScaler(), LocalOutlierFactor(novelty=True)),
    "one-class SVM": lambda: make_pipeline(StandardScaler(), OneClassSVM()),
}


def split(x: np.ndarray, outlier: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows to fit, inliers to rank, outliers to rank)."""
    rng = np.random.default_rng(0)
    inliers, outliers = rng.permutation(x[~outlier]), rng.permutation(x[outlier])
    half = len(inliers) // 2
    return inliers[:half][:most], inliers[half:][:most], outliers[:most]


def varies(fit: np.ndarray) -> np.ndarray:
    """(d,) columns with more than one value among the rows to fit: any detector needs that."""
    return np.ptp(fit, axis=0) > 0


def measured(name: str, detector: str, folder: Path, most: int) -> dict[str, Any]:
    """AUROC of one detector on one table, or the error that it raised."""
    fit, inliers, outliers = split(*mlbench(folder, name), most)
    columns = varies(fit)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = DETECTORS[detector]().fit(fit[:, columns])
            normal, unusual = (model.decision_function(part[:, columns]) for part in (inliers, outliers))
        except ValueError as error:
            return {"auroc": None, "error": str(error), "shape": [len(fit), int(columns.sum())]}
    found = auroc(torch.from_numpy(-unusual), torch.from_numpy(-normal))
    return {
        "auroc": float(found),
        "shape": [len(fit), int(columns.sum())],
        "cpu_seconds": time.process_time() - began,
    }


def show(results: list[dict[str, Any]]) -> str:
    """A row for each table and the mean ranks, as Markdown."""
    lines = [f"| table | rows, columns | {' | '.join(DETECTORS)} |", "|" + "---|" * (2 + len(DETECTORS))]
    ranks = []
    for name in OUTLIERS:
        rows = {row["detector"]: row for row in results if row["table"] == name}
        if len(rows) < len(DETECTORS):
            continue
        found = np.array([rows[d]["auroc"] or 0.0 for d in DETECTORS])
        ranks.append([1 + (found > one).sum() + ((found == one).sum() - 1) / 2 for one in found])
        cells = [f"{100 * rows[d]['auroc']:.1f} %" if rows[d]["auroc"] else "refused" for d in DETECTORS]
        shape = "x".join(map(str, rows["CDMDensity"]["shape"]))
        lines.append(f"| {name} | {shape} | {' | '.join(cells)} |")
    if ranks:
        lines.append(f"| mean rank | | {' | '.join(f'{rank:.2f}' for rank in np.mean(ranks, axis=0))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--mlbench", type=Path)
    parser.add_argument("--tables", nargs="+", choices=OUTLIERS, default=list(OUTLIERS))
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/outlier_tables.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for table in args.tables if args.what == "run" else ():
        for detector in DETECTORS:
            what = {"table": table, "detector": detector, "most": args.most}
            if not any(what.items() <= row.items() for row in read_rows(args.out)):
                add_row(args.out, {**what, **measured(table, detector, args.mlbench, args.most)})
    print(show(read_rows(args.out)))


if __name__ == "__main__":
    main()
