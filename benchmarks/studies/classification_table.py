"""Five ways to classify one data set, and what each withstands: docs/measurements/classification.md.

    python -m benchmarks.studies.classification_table digits --runs RUNS [--kinds joint] [--seeds 0 1]
        [--only pgd]
    python -m benchmarks.studies.classification_table fashion-mnist --source DIR --kinds ddm --steps 1500
    python -m benchmarks.studies.classification_table svm  # RBF SVM on the same splits of digits
    python -m benchmarks.studies.classification_table show  # results/classification.jsonl as tables

A run that is missing or unfinished is trained into RUNS/DATA-KIND-SEED by the preset, with `--architecture`,
`--source` and `--steps` in place of its own; a row that stands in the file is not measured again. Each row
carries its command, the run's network and steps, device, versions and commit.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.rows import add_row, read_rows, trained
from cdm_fast import load
from cdm_fast.config import RunConfig, preset
from cdm_fast.data import ImageData, load_data
from cdm_fast.evaluation.attacks import evaluate_attack
from cdm_fast.evaluation.classification import ClassReport, evaluate_classes
from cdm_fast.evaluation.robustness import evaluate_corruptions
from cdm_fast.host.optional import need
from cdm_fast.host.progress import to_stderr
from cdm_fast.likelihood import evaluate_elbo
from cdm_fast.model import CDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.runs.build import class_prior
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.data import run_data

Figures = Callable[[], dict[str, Any]]
RESULTS = Path(__file__).parents[1] / "results" / "classification.jsonl"
KINDS = ("joint", "unconditional", "embedding", "ddm", "discriminative")
# Methods that a run is scored by, its own first.
METHODS: dict[str, tuple[str, ...]] = {
    "joint": ("joint", "denoising", "ode"),
    "embedding": ("embedding",),
    "ddm": ("denoising", "ode"),
    "discriminative": ("discriminative",),
    "unconditional": (),
}
# Test images, drawn for what is slow; all for the rest.
IMAGES = {
    "digits": {"denoising": 100, "ode": 32, "elbo": 359, "corruptions": 359},
    "fashion-mnist": {"embedding": 2000, "denoising": 50, "ode": 16, "elbo": 128, "corruptions": 500},
}
BUDGETS = {"digits": (0.05, 0.1, 0.2), "fashion-mnist": (2 / 255, 4 / 255, 8 / 255)}
ATTACKED = 100
ODE_TOLERANCE = 1e-3


def configured(data: str, kind: str, seed: int, options: argparse.Namespace) -> RunConfig:
    """The preset with what the kind and the options change."""
    base = preset(data)
    conditioning = {"joint": "joint", "embedding": "embedding", "ddm": "embedding"}.get(kind, "none")
    objective = kind if kind == "ddm" else "classifier" if kind == "discriminative" else "cdm"
    return replace(
        base,
        data=replace(base.data, split_seed=seed, source=options.source or base.data.source),
        network=replace(base.network, conditioning=conditioning, architecture=options.architecture),
        train=replace(
            base.train,
            objective=objective,
            steps=options.steps or base.train.steps,
            # The rows of class embeddings are of trainings that compare no classes.
            class_weight=0.0 if kind == "embedding" else base.train.class_weight,
        ),
    )


def measurements(data: str, kind: str, run: Path) -> Iterator[tuple[str, Figures]]:
    """(what, how to measure it) of one run."""
    model, config = load(run), read_config(run)
    test, prior = run_data(config, "test"), class_prior(config)

    def classified(images: ImageData, method: str, num_images: int | None) -> ClassReport:
        return evaluate_classes(
            model,
            images,
            method,
            num_images=num_images,
            trials=10,
            tolerance=ODE_TOLERANCE,
            class_prior=prior,
        )

    for method in METHODS[kind]:
        found = partial(classified, test, method, IMAGES[data].get(method))
        yield method, lambda found=found: found().to_json()
    if isinstance(model, CDM):
        yield "elbo", lambda: bound(model, test, IMAGES[data]["elbo"])
    if config.data.split_seed or kind in ("ddm", "unconditional"):
        return
    own = METHODS[kind][0]
    few = IMAGES[data]["corruptions"]
    found = partial(evaluate_corruptions, lambda images: classified(images, own, few), test, to_stderr)
    yield "corruptions", lambda found=found: found().to_json()
    assert isinstance(model, CDM | Classifier)
    yield from attacks(data, kind, run, model, test)


def attacks(
    data: str, kind: str, run: Path, model: CDM | Classifier, test: ImageData
) -> Iterator[tuple[str, Figures]]:
    """(what, how to measure it) of attacks on the run's own gradients, then on those of other runs."""
    attacked = partial(evaluate_attack, model, test, num_images=ATTACKED)
    for attack, norm in (("pgd", "linf"), ("square", "linf"), ("deepfool", "l2"), ("cw", "l2")):
        budgets = BUDGETS[data] if norm == "linf" else ()
        found = partial(attacked, attack, norm, budgets)  # type: ignore[arg-type]
        yield attack, lambda found=found: found().to_json()
    for other in ("joint", "discriminative"):
        path = run.parent / f"{data}-{other}-0"
        if other != kind and path.exists():
            surrogate = load(path)
            assert isinstance(surrogate, CDM | Classifier)
            found = partial(attacked, "pgd", "linf", BUDGETS[data], surrogate=surrogate)
            yield f"pgd from {other}", lambda found=found: found().to_json()


def described(run: Path) -> dict[str, Any]:
    """Network and budget of a run."""
    config, state = read_config(run), load_checkpoint(run, ()).state
    return {
        "architecture": config.network.architecture,
        "train_steps": config.train.steps,
        "train_seconds": state["seconds"],
    }


def bound(model: CDM, test: ImageData, num_images: int) -> dict[str, float]:
    """The variational bound of the marginal on test images, bits/dim."""
    found = evaluate_elbo(model, test, num_images, batch_size=500, progress=to_stderr)
    return {"bits_per_dim": found.bits_per_dim, "bits_per_dim_stderr": found.bits_per_dim_stderr}


def support_vectors(seed: int) -> dict[str, Any]:
    """An RBF SVM of digits' pixels: C and gamma by 5 folds of training and validation images together."""
    parts = [load_data("digits", split, split_seed=seed) for split in ("train", "validation", "test")]
    x = [part.images.flatten(1).numpy() / 16 for part in parts]
    y = [part.labels.numpy() for part in parts if part.labels is not None]
    grid = {"C": [1, 3, 10, 30], "gamma": [0.02, 0.05, 0.1, 0.2, "scale"]}
    selection, svm = need("sklearn.model_selection", "the SVM"), need("sklearn.svm", "the SVM")
    search = selection.GridSearchCV(svm.SVC(), grid, cv=5).fit(np.concatenate(x[:2]), np.concatenate(y[:2]))
    accuracy = float(search.score(x[2], y[2]))
    return {"accuracy": accuracy, "num_images": len(y[2]), **search.best_params_}


def add_rows(
    key: tuple[str, str, int],
    measured: Iterable[tuple[str, Figures]],
    details: dict[str, Any],
    only: Sequence[str] = (),
) -> None:
    """Measures what the results file lacks of a run, or of `only`, and appends it row by row."""
    present = {(r["data"], r["kind"], r["seed"], r["what"]) for r in read_rows(RESULTS)}
    data, kind, seed = key
    for what, figures in measured:
        if (*key, what) not in present and (not only or what in only):
            row = {**figures(), "data": data, "kind": kind, "seed": seed, "what": what}
            add_row(RESULTS, {**row, **details})


def show() -> str:
    """The results as markdown."""
    rows = {(r["data"], r["kind"], r["seed"], r["what"]): r for r in read_rows(RESULTS)}
    lines = ["| data | run | method | accuracy, % | bits/dim | bound, bits/dim | images/s | corrupted, % |"]
    lines[0] += " PGD at three budgets, % |"
    lines.append("|---" * 9 + "|")
    for (data, kind, seed, what), row in rows.items():
        if "accuracy" not in row or "attack" in row:
            continue
        first = (METHODS.get(kind) or (what,))[0] == what
        bound = rows.get((data, kind, seed, "elbo")) if first else None
        hurt = rows.get((data, kind, seed, "corruptions")) if first else None
        pgd = rows.get((data, kind, seed, "pgd")) if first else None
        cells = [
            data,
            f"{kind}, split {seed}",
            what,
            with_error(100 * row["accuracy"], 100 * row.get("accuracy_stderr", math.nan), 2),
            with_error(row.get("bits_per_dim"), row.get("bits_per_dim_stderr"), 3),
            "-" if bound is None else with_error(bound["bits_per_dim"], bound["bits_per_dim_stderr"], 3),
            "-" if "images_per_second" not in row else f"{row['images_per_second']:.3g}",
            "-" if hurt is None else f"{100 * hurt['corrupted_accuracy']:.1f}",
            "-" if pgd is None else ", ".join(f"{100 * value:.0f}" for value in pgd["accuracy"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| data | run | attack | steps | budgets | accuracy, % |", "|---" * 6 + "|"]
    for (data, kind, _, what), row in rows.items():
        if "attack" in row:
            budgets = ", ".join(f"{budget:.3g}" for budget in row["budgets"])
            left = ", ".join(f"{100 * value:.0f}" for value in row["accuracy"])
            cells = [data, kind, f"{what}, {row['norm']}", str(row["steps"]), budgets, left]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """`value +- error`, or "-"."""
    if value is None:
        return "-"
    known = error is not None and math.isfinite(error)
    return f"{value:.{digits}f}" + (f" +- {error:.{digits}f}" if known else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("digits", "fashion-mnist", "svm", "show"))
    parser.add_argument("--runs", type=Path, default=Path("runs/classification"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--only", nargs="+", default=(), help="such as joint, elbo, corruptions, pgd, square")
    parser.add_argument("--source", help="where the images are, by default where the preset says")
    parser.add_argument("--architecture", choices=("unet", "encoder"), default="unet")
    parser.add_argument("--steps", type=int, help="of training, by default the preset's")
    options = parser.parse_args(arguments)
    if options.what == "show":
        print(show())
        return
    program = f"python -m benchmarks.studies.classification_table {options.what}"
    for seed in options.seeds:
        if options.what == "svm":
            rows: list[tuple[str, Figures]] = [("svm", partial(support_vectors, seed))]
            add_rows(("digits", "svm", seed), rows, {"command": f"{program} --seeds {seed}"})
            continue
        for kind in options.kinds:
            folder = options.runs / f"{options.what}-{kind}-{seed}"
            run = trained(configured(options.what, kind, seed, options), folder)
            flags = f"--kinds {kind} --seeds {seed} --architecture {options.architecture}"
            if options.steps:
                flags += f" --steps {options.steps}"
            details = {"command": f"{program} {flags}", **described(run)}
            add_rows((options.what, kind, seed), measurements(options.what, kind, run), details, options.only)


if __name__ == "__main__":
    main()
