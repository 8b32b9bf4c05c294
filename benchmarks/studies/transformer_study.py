"""Transformers of several sizes beside encoder and U-Net on Fashion-MNIST: docs/measurements/transformer.md.

    python -m benchmarks.studies.transformer_study grid --data DIR --runs RUNS [NAME ...]  # all, or these
    python -m benchmarks.studies.transformer_study equal-time --data DIR --runs RUNS [encoder|transformer]
    python -m benchmarks.studies.transformer_study steps [digits|fashion-mnist]  # times of a step, in turns
    python -m benchmarks.studies.transformer_study show      # the tables, and the arithmetic of a GPU-day
    python -m benchmarks.studies.transformer_study plot      # docs/pictures/transformer_scaling.png

The grid trains every size for the same number of images, and counts the FLOPs of the convolutions and matrix
products of a training step; `show` tells where the encoders' line of best bounds reaches that of the
transformers.
`equal-time` trains the presets of encoder and transformer, whose steps take about as long (`steps`). A run
that is missing is trained into RUNS; a row that stands in the file is not measured again.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.rows import add_row, read_rows, trained
from benchmarks.support.pairs import flops
from benchmarks.support.train_steps import one_step, step_seconds
from cdm_fast import CDM, load
from cdm_fast.config import RunConfig, preset
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.likelihood import evaluate, evaluate_elbo
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.data import run_data

RESULTS = Path(__file__).parents[1] / "results" / "transformer_study.jsonl"
PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "transformer_scaling.png"
WIDTHS, DEPTHS = (32, 64, 128), (2, 4, 8)
ENCODERS = (8, 16, 32)  # base channels; 16 are the preset's
GRID_STEPS = 1000
GRID_RATE = 2e-3  # for every network; the encoder's preset had it when the first rows were made
BOUND_IMAGES, BOUND_EVERY = 1000, 10
BOUND_GROUPS = 1  # one variance a level, as in the first rows
CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "unet": {"architecture": "unet"},
    **{f"encoder {channels}": {"base_channels": channels} for channels in ENCODERS},
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    f"transformer {width}x{depth}": {"architecture": "transformer", "width": width, "depth": depth}
    for width in WIDTHS
    for depth in DEPTHS
}
NETWORKS = CONVOLUTIONAL | TRANSFORMERS
# A GPU-day in FLOPs: a day, the measured bf16 product of an H200 (790 TFLOP/s), and the share of it that
# trainings of transformers reach.
GPU_DAY = 86_400 * 790e12 * 0.4


def configured(name: str, data: str, steps: int = GRID_STEPS) -> RunConfig:
    """The transformer's or the encoder's preset with the network called `name`, for so many steps."""
    own = trunk_alone("fashion-mnist", "transformer" if name.startswith("transformer") else "encoder")
    return replace(
        own,
        data=replace(own.data, source=data),
        network=replace(own.network, **NETWORKS[name]),
        train=replace(own.train, steps=steps, lr=GRID_RATE),
    )


def trunk_alone(data: str, kind: str) -> RunConfig:
    """The preset of an encoder or a transformer without a base, which would hide what the trunks learn."""
    own = preset(f"{data}-{kind}")
    return replace(own, network=replace(own.network, base_components=0))


def step_flops(config: RunConfig) -> float:
    """FLOPs of the products of one training step."""
    train = replace(config.train, precision="fp32")
    return flops(one_step(replace(config, train=train), batch_size=2)) / 2 * config.train.batch_size


def measured(run: Path) -> dict[str, Any]:
    """Size, training cost, likelihood and accuracy of a run, on test images."""
    model, config = load(run), read_config(run)
    assert isinstance(model, CDM)
    test = run_data(config, "test")
    bound = evaluate_elbo(model, test, BOUND_IMAGES, every=BOUND_EVERY, groups=BOUND_GROUPS)
    single = evaluate(model, test, draws=1)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": config.train.steps,
        "flops": step_flops(config) * config.train.steps,
        "bound": [bound.bits_per_dim, bound.bits_per_dim_stderr],
        "single": [single.bits_per_dim, single.bits_per_dim_stderr],
        "accuracy": evaluate_classes(model, test, "joint").accuracy,
    }


def run_grid(data: str, runs: Path, names: list[str]) -> None:
    """Trains and measures what has no row yet."""
    done = {row["name"] for row in read_rows(RESULTS) if row["part"] == "grid"}
    for name in names or NETWORKS:
        if name not in done:
            run = trained(configured(name, data), runs / name.replace(" ", "-"))
            row = add_row(RESULTS, {"part": "grid", "name": name, **measured(run)})
            print(name, row["bound"], flush=True)


def pair_of(data: str) -> dict[str, RunConfig]:
    """The encoder's and the transformer's preset for `digits`, `fashion-mnist` or `cifar10`."""
    return {name: trunk_alone(data, name) for name in ("encoder", "transformer")}


def run_equal_time(data: str, runs: Path, names: list[str]) -> None:
    """Trains and measures both presets, whose steps take about the same time."""
    done = {row["name"] for row in read_rows(RESULTS) if row["part"] == "equal-time"}
    for name, config in pair_of("fashion-mnist").items():
        if name in done or (names and name not in names):
            continue
        config = replace(config, data=replace(config.data, source=data))
        run = trained(config, runs / f"equal-time-{name}")
        seconds = load_checkpoint(run, ()).state["seconds"]
        row = {"part": "equal-time", "name": name, "train_seconds": seconds, **measured(run)}
        print(name, add_row(RESULTS, row)["bound"], flush=True)


def line_of_best_bounds(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """(intercept, slope) of the bound against log10(FLOPs), through rows that no cheaper one beats.

    The slope is in bits/dim for ten times the FLOPs.
    """
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: row["flops"]):
        if not front or row["bound"][0] < front[-1]["bound"][0]:
            front.append(row)
    points = [(math.log10(row["flops"]), row["bound"][0]) for row in front]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return mean_y - slope * mean_x, slope


def of_family(family: str) -> list[dict[str, Any]]:
    """The grid's rows of the networks whose names begin so."""
    return [row for row in read_rows(RESULTS) if row["part"] == "grid" and row["name"].startswith(family)]


def flops_to_reach(bound: float, line: tuple[float, float]) -> float:
    """FLOPs at which a line of `line_of_best_bounds` reaches a bound; inf if it does not fall."""
    start, slope = line
    return 10.0 ** ((bound - start) / slope) if slope < 0 else math.inf


def gpu_day() -> str:
    """What a GPU-day trains of the CIFAR-10 preset, and how far that is from the grid."""
    config = preset("cifar10-transformer")
    each = step_flops(config)
    steps = GPU_DAY / each
    grid = of_family("transformer")
    lines = [
        f"A step of cifar10-transformer, {config.train.batch_size} images: {each / 1e12:.2f} TFLOP.",
        f"A GPU-day of {GPU_DAY:.2e} FLOP: {steps:,.0f} steps, {steps * config.train.batch_size / 5e4:,.0f}"
        " passes over CIFAR-10.",
    ]
    encoders = of_family("encoder")
    if grid and len(encoders) > 1:
        least, most = (pick(grid, key=lambda row: row["flops"])["flops"] for pick in (min, max))
        best, worst = (pick(grid, key=lambda row: row["bound"][0])["bound"][0] for pick in (min, max))
        line = line_of_best_bounds(encoders)
        lines += [
            f"On Fashion-MNIST transformers of {least / 1e12:.0f} to {most / 1e12:.0f} TFLOP have bounds of"
            f" {best:.3f} to {worst:.3f};"
            f" the GPU-day is {math.log10(GPU_DAY / most):.1f} powers of ten beyond.",
            f"Ten times the FLOPs change the encoders' best bound by {line[1]:+.3f} bits/dim; it reaches"
            f" {best:.3f} at {flops_to_reach(best, line):.1e} FLOP.",
        ]
    return "\n".join(lines)


def show() -> str:
    """The rows in Markdown, and the arithmetic."""
    titles = (
        "part",
        "network",
        "parameters",
        "steps",
        "training TFLOP",
        "bound",
        "single pass",
        "accuracy, %",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in read_rows(RESULTS):
        cells = [
            row["part"],
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            str(row["steps"]),
            f"{row['flops'] / 1e12:.0f}",
            "{:.3f} +- {:.3f}".format(*row["bound"]),
            "{:.3f} +- {:.3f}".format(*row["single"]),
            f"{100 * row['accuracy']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", gpu_day()])


def plot() -> None:
    """The bound against training FLOPs: a line for each family of networks."""
    from matplotlib.figure import Figure

    rows = {row["name"]: row for row in read_rows(RESULTS) if row["part"] == "grid"}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    families = {
        f"transformer, width {width}": [f"transformer {width}x{depth}" for depth in DEPTHS]
        for width in WIDTHS
    }
    families["encoder"] = [f"encoder {channels}" for channels in ENCODERS]
    families["U-Net"] = ["unet"]
    for label, names in families.items():
        points = [(rows[name]["flops"], rows[name]["bound"][0]) for name in names if name in rows]
        axes.plot(*zip(*points, strict=True), marker="s" if label[0] != "t" else "o", label=label)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="bound, bits/dim")
    axes.legend()
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("grid", "equal-time", "steps", "show", "plot"))
    parser.add_argument("names", nargs="*", help=f"among {', '.join(NETWORKS)}")
    parser.add_argument("--data", help="folder with the IDX files of Fashion-MNIST")
    parser.add_argument("--runs", type=Path, default=Path("runs/transformer-study"))
    parser.add_argument("--threads", type=int, help="of the CPU; by default torch's own choice")
    arguments = parser.parse_intermixed_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    of_part = {"steps": ("digits", "fashion-mnist"), "equal-time": ("encoder", "transformer")}
    known = of_part.get(arguments.what, tuple(NETWORKS))
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose among {', '.join(known)}")
    if arguments.what in ("grid", "equal-time") and arguments.data is None:
        parser.error("give --data, the folder of Fashion-MNIST")
    if arguments.what == "grid":
        run_grid(arguments.data, arguments.runs, arguments.names)
    elif arguments.what == "equal-time":
        run_equal_time(arguments.data, arguments.runs, arguments.names)
    elif arguments.what == "steps":
        for name in arguments.names or known:
            seconds = step_seconds(pair_of(name))
            print(name, seconds, f"ratio {seconds['transformer'] / seconds['encoder']:.2f}", flush=True)
    elif arguments.what == "plot":
        plot()
    else:
        print(show())


if __name__ == "__main__":
    main()
