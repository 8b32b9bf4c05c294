"""Encoder-only networks beside the U-Net on 8x8 digits: the table of docs/measurements/encoder.md.

    python -m benchmarks.studies.encoder_study run --runs RUNS [--seed 1] [encoder unet ...]   # all, or these
    python -m benchmarks.studies.encoder_study show  # the rows so far

A run that is missing is trained into RUNS; a row that stands in the file is not measured again. The Frechet
distance is of features of a classifier that is trained on the same digits (`--objective classifier`): it is
no FID, and orders the networks of this table alone.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.rows import add_row, read_rows, trained
from cdm_fast import CDM, load, sample
from cdm_fast.config import RunConfig, preset
from cdm_fast.data import ImageData
from cdm_fast.data.draws import draw_images
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.evaluation.quality import frechet_distance
from cdm_fast.likelihood import evaluate, evaluate_elbo, mse_per_level
from cdm_fast.model.classifier import Classifier
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.data import run_data

RESULTS = Path(__file__).parents[1] / "results" / "encoder_study.jsonl"
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {},
    "encoder": {"architecture": "encoder"},
    "encoder, 3 blocks": {"architecture": "encoder", "blocks_per_level": 3},
    "encoder, 1 block, wider": {"architecture": "encoder", "blocks_per_level": 1, "base_channels": 40},
    "encoder, no attention at 4x4": {"architecture": "encoder", "attention_resolutions": ()},
}
# Levels over which the denoising error is averaged: s from 0.005 to 0.1, to 0.5, to 1.
BANDS = {"low": (0.0, 0.1), "middle": (0.1, 0.5), "high": (0.5, 1.0)}
SAMPLING_STEPS = 50


def configured(network: dict[str, Any], seed: int) -> RunConfig:
    """The digits preset with another network, trained from a seed; the split stays."""
    base = preset("digits")
    return replace(base, network=replace(base.network, **network), train=replace(base.train, seed=seed))


def extractor(runs: Path) -> Classifier:
    """The classifier whose features the Frechet distance compares."""
    base = preset("digits")
    config = replace(
        base,
        network=replace(base.network, conditioning="none"),
        train=replace(base.train, objective="classifier", steps=300),
    )
    found = load(trained(config, runs / "classifier"))
    assert isinstance(found, Classifier)
    return found


def measured(run: Path, classifier: Classifier) -> dict[str, Any]:
    """Likelihood, accuracy, denoising error and sample quality of a run, on the test images."""
    model, config = load(run), read_config(run)
    assert isinstance(model, CDM)
    test = run_data(config, "test")
    single, bound = evaluate(model, test), evaluate_elbo(model, test, len(test))
    levels, errors = mse_per_level(model, test, num_images=len(test))
    check = single.ratio_check
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "single": [single.bits_per_dim, single.bits_per_dim_stderr],
        "ratio_check": None if check is None else [check.sum_bits_per_dim, check.sum_bits_per_dim_stderr],
        "bound": [bound.bits_per_dim, bound.bits_per_dim_stderr],
        "accuracy": evaluate_classes(model, test, "joint").accuracy,
        "mse": {name: banded(model, levels, errors, *ends) for name, ends in BANDS.items()},
        "frechet": sample_distance(model, test, classifier),
    }


def banded(model: CDM, levels: list[int], errors: list[float], low: float, high: float) -> float:
    """Mean of the errors at levels with low < s <= high."""
    inside = [error for t, error in zip(levels, errors, strict=True) if low < model.schedule.s[t] <= high]
    return sum(inside) / len(inside)


@torch.no_grad()
def sample_distance(model: CDM, test: ImageData, classifier: Classifier) -> float:
    """Frechet distance of as many samples as there are test images to these, in the classifier's features."""

    def features(x: Tensor) -> Tensor:
        return classifier.features(x).double()

    real = draw_images(test, len(test), torch.Generator().manual_seed(0))
    return frechet_distance(features(sample(model, len(test), "ddpm", SAMPLING_STEPS)), features(real))


def show() -> str:
    """The rows in Markdown."""
    lines = [
        "| network | seed | parameters | bound | single pass | ratio check | accuracy, % |"
        " MSE low, middle, high | Frechet |"
    ]
    lines.append("|---" * 9 + "|")
    for row in read_rows(RESULTS):
        check = "-" if row["ratio_check"] is None else "{:+.3f} +- {:.3f}".format(*row["ratio_check"])
        cells = [
            row["name"],
            str(row["seed"]),
            f"{row['parameters'] / 1e6:.2f} M",
            "{:.3f} +- {:.3f}".format(*row["bound"]),
            "{:.3f} +- {:.3f}".format(*row["single"]),
            check,
            f"{100 * row['accuracy']:.2f}",
            ", ".join(f"{row['mse'][name]:.4f}" for name in BANDS),
            f"{row['frechet']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("names", nargs="*", help=f"among {', '.join(NETWORKS)}")
    parser.add_argument("--runs", type=Path, default=Path("runs/encoder-study"))
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    arguments = parser.parse_intermixed_args()
    if arguments.what == "show":
        print(show())
        return
    unknown = sorted(set(arguments.names) - NETWORKS.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose among {', '.join(NETWORKS)}")
    seed, done = arguments.seed, {(row["name"], row["seed"]) for row in read_rows(RESULTS)}
    for name in arguments.names or NETWORKS:
        if (name, seed) in done:
            continue
        folder = name.replace(",", "").replace(" ", "-") + (f"-{seed}" if seed else "")
        run = trained(configured(NETWORKS[name], seed), arguments.runs / folder)
        row = add_row(RESULTS, {"name": name, "seed": seed, **measured(run, extractor(arguments.runs))})
        print(name, row["bound"], flush=True)


if __name__ == "__main__":
    main()
