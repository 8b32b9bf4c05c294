"""Accuracy under each attack, and the price and gain of adversarial training: docs/measurements/attacks.md.

    python -m benchmarks.studies.attack_table digits-encoder --runs RUNS [--kinds joint linf] [--steps N]
    python -m benchmarks.studies.attack_table fashion-mnist-encoder --source DIR --runs RUNS
    python -m benchmarks.studies.attack_table show  # results/attacks.jsonl as tables

- joint: the preset, a CDM's class logits;
- linf: the same with `--adversarial linf`, at the middle one of the budgets;
- discriminative: an ordinary classifier on the same trunk, with the preset's steps.

Missing runs are trained into RUNS; rows that the file holds already are not measured again.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.studies.rows import add_row, has_row, read_rows, trained
from cdm_fast import load
from cdm_fast.config import RunConfig, preset
from cdm_fast.evaluation.attacks import evaluate_attack
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.host.progress import to_stderr
from cdm_fast.likelihood import evaluate_elbo
from cdm_fast.model import CDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.runs.checkpoint import load_checkpoint
from cdm_fast.runs.data import run_data

RESULTS = Path(__file__).parents[1] / "results" / "attacks.jsonl"
KINDS = ("joint", "linf", "discriminative")
BUDGETS = {  # by norm
    "digits-encoder": {"linf": (0.05, 0.1, 0.2), "l2": (0.5, 1.0, 2.0)},
    "fashion-mnist-encoder": {"linf": (2 / 255, 4 / 255, 8 / 255), "l2": (0.25, 0.5, 1.0)},
}
ATTACKED, BOUNDED = 100, 359  # images
# what -> attack, norm, dequantisation draws
ATTACKS: dict[str, tuple[str, str, int]] = {
    "pgd": ("pgd", "linf", 0),
    "apgd-ce": ("apgd-ce", "linf", 0),
    "apgd-t": ("apgd-t", "linf", 0),
    "square": ("square", "linf", 0),
    "auto": ("auto", "linf", 0),
    "apgd-ce over 8 draws": ("apgd-ce", "linf", 8),
    "apgd-undetected": ("apgd-undetected", "linf", 0),
    "auto in l2": ("auto", "l2", 0),
}


def configured(kind: str, options: argparse.Namespace) -> RunConfig:
    """The preset with what the kind and the options change."""
    base = preset(options.data)
    network = base.network
    if kind == "discriminative":
        network = replace(network, conditioning="none")
    attacked = kind == "linf"
    train = replace(
        base.train,
        objective="classifier" if kind == "discriminative" else "cdm",
        adversarial="linf" if attacked else "none",
        budget=BUDGETS[options.data]["linf"][1] if attacked else 0.0,
        adversarial_weight=options.weight if attacked else None,
        steps=options.steps or base.train.steps,
    )
    source = options.source or base.data.source
    return replace(base, data=replace(base.data, source=source), network=network, train=train)


def measurements(
    run: Path, config: RunConfig, data: str
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(what, how to measure it) of one run."""
    model, test = load(run), run_data(config, "test")
    assert isinstance(model, CDM | Classifier)
    yield "accuracy", lambda: evaluate_classes(model, test).to_json()
    if isinstance(model, CDM):
        yield "bound", lambda: _bound(model, test)
    for what, (attack, norm, draws) in ATTACKS.items():
        if attack == "apgd-undetected" and isinstance(model, Classifier):
            continue
        options: Any = {"draws": draws, "num_images": ATTACKED, "progress": to_stderr}
        found = partial(evaluate_attack, model, test, attack, norm, BUDGETS[data][norm], **options)  # type: ignore[arg-type]
        yield what, lambda found=found: found().to_json()


def _bound(model: CDM, test: Any) -> dict[str, float]:
    """The variational bound of the marginal on test images, bits/dim."""
    found = evaluate_elbo(model, test, min(BOUNDED, len(test)), batch_size=500, progress=to_stderr)
    return {"bits_per_dim": found.bits_per_dim, "bits_per_dim_stderr": found.bits_per_dim_stderr}


def add_rows(options: argparse.Namespace) -> None:
    """Measures what the results file lacks, row by row."""
    for kind in options.kinds:
        config = configured(kind, options)
        name = f"{options.data}-{kind}" + (f"-{options.weight:g}" if kind == "linf" else "")
        name += f"-{options.steps}" if options.steps else ""
        key = {
            "data": options.data,
            "kind": kind,
            "steps": config.train.steps,
            "weight": options.weight if kind == "linf" else None,
        }
        run = trained(config, options.runs / name)
        seconds = load_checkpoint(run, ()).state["seconds"]
        for what, figures in measurements(run, config, options.data):
            if not has_row(RESULTS, {**key, "what": what}) and (not options.only or what in options.only):
                row = {**key, "what": what, "train_seconds": seconds, "figures": figures()}
                add_row(RESULTS, row)
                print(kind, what, row["figures"])


def show() -> str:
    """The rows as tables in Markdown."""
    lines = ["| data | classifier | steps | attack | budgets | accuracy, % | wrong and undetected, % | s |"]
    lines.append("|---" * 8 + "|")
    for row in read_rows(RESULTS):
        values = row["figures"]
        if "budgets" not in values:
            continue
        cells = [
            ", ".join(f"{budget:.3g}" for budget in values["budgets"]),
            ", ".join(f"{100 * value:.0f}" for value in values["accuracy"]),
            ", ".join(f"{100 * value:.0f}" for value in values["undetected"] or []) or "-",
            f"{values['seconds']:.0f}",
        ]
        lines.append(
            f"| {row['data']} | {_name(row)} | {row['steps']} | {row['what']} | {' | '.join(cells)} |"
        )
    lines += [
        "",
        "| data | classifier | steps | accuracy, % | bits/dim | bound | training, s |",
        "|---" * 7 + "|",
    ]
    for row in read_rows(RESULTS):
        values = row["figures"]
        if row["what"] in ("accuracy", "bound"):
            accuracy = f"{100 * values['accuracy']:.2f}" if "accuracy" in values else "-"
            bits = "-" if values["bits_per_dim"] is None else f"{values['bits_per_dim']:.3f}"
            both = f"{bits} | -" if row["what"] == "accuracy" else f"- | {bits}"
            cells = f"{row['steps']} | {accuracy} | {both} | {row['train_seconds']:.0f}"
            lines.append(f"| {row['data']} | {_name(row)} | {cells} |")
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    return row["kind"] + ("" if row["weight"] is None else f", weight {row['weight']:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", choices=(*BUDGETS, "show"))
    parser.add_argument("--runs", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--source", help="data source in place of the preset's")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, help="training steps in place of the preset's")
    parser.add_argument("--weight", type=float, default=0.01, help="--adversarial-weight of the kind linf")
    parser.add_argument("--only", nargs="+", default=(), help="such as accuracy, bound, pgd, auto")
    options = parser.parse_args()
    if options.data == "show":
        print(show())
        return
    add_rows(options)


if __name__ == "__main__":
    main()
