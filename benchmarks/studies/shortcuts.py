"""Do generative classifiers take shortcuts? Data sets with a planted cue: docs/measurements/shortcuts.md.

    python -m benchmarks.studies.shortcuts digits --runs RUNS [--cues colour] [--kinds joint] [--seeds 0]
    python -m benchmarks.studies.shortcuts fashion-mnist --source DIR --runs RUNS
    python -m benchmarks.studies.shortcuts times fashion-mnist  # seconds of a step of each kind, in turns
    python -m benchmarks.studies.shortcuts show  # results/shortcuts.jsonl as a table

The images are real, the cue is added. It names the class in 95 % of the training and validation images and in
10 % of the test images, as often as chance; in the others it names one of the other classes.

- colour: the image in one of ten hues;
- mark: four corner blocks, white or black, that spell the class in binary;
- texture: stripes on the background, whose direction depends on the class;
- imbalance: no cue, but classes 5 to 9 keep a tenth of their training images.

Groups are the test images whose cue is right (aligned) and wrong (conflicting), or the common and the rare
classes. The classifiers have one trunk and about the same training time:

- joint: a CDM's class logits, one pass;
- embedding: a CDM that takes the label, its constants refitted, a pass for each class;
- discriminative: an ordinary classifier.

Missing runs are trained into RUNS; rows that the file holds already are not measured again.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.rows import add_row, has_row, read_rows, trained
from benchmarks.support.train_steps import step_seconds
from cdm_fast import load
from cdm_fast.config import RunConfig, preset
from cdm_fast.data import ImageData, load_data
from cdm_fast.evaluation.class_scores import fitting_method
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.runs.checkpoint import load_checkpoint, read_config

RESULTS = Path(__file__).parents[1] / "results" / "shortcuts.jsonl"
SETS, KINDS = ("digits", "fashion-mnist"), ("joint", "embedding", "discriminative")
ALIGNED = {"train": 0.95, "validation": 0.95, "test": 0.10}
RARE_SHARE, FIRST_RARE = 0.1, 5
CONSTANTS_ROWS = 50_000  # of the embedding
# Steps of each kind that take about the same time, by `times`.
STEPS = {
    "digits": {"joint": 300, "embedding": 330, "discriminative": 760},
    "fashion-mnist": {"joint": 2000, "embedding": 2200, "discriminative": 4700},
}

# (images (n, 1, H, W) float, 0..1, the class that the cue names (n,), K, generator) -> (n, 1 or 3, H, W)
Cue = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]


def colour(images: Tensor, named: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """The images in K hues, evenly spaced on the colour circle."""
    hue = torch.arange(num_classes) / num_classes
    offsets = torch.tensor([0.0, 1 / 3, 2 / 3])
    distance = (hue[:, None] - offsets + 0.5).remainder(1) - 0.5  # from red, green and blue
    rgb = (2 - 6 * distance.abs()).clamp(0, 1)  # (K, 3)
    return images * rgb[named][:, :, None, None]


def mark(images: Tensor, named: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """The class plus one in binary: corner blocks of an eighth of the height, white for 1, black for 0."""
    side = max(1, images.shape[2] // 8)
    marked = images.clone()
    ends = slice(None, side), slice(-side, None)
    for bit in range(4):
        white = ((named + 1) >> bit & 1).to(images)
        marked[:, :, ends[bit // 2], ends[bit % 2]] = white[:, None, None, None]
    return marked


def texture(images: Tensor, named: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """Stripes of half brightness behind the image, in one of K directions, at a random position."""
    height, width = images.shape[2:]
    angle = math.pi * named / num_classes
    phase = 2 * math.pi * torch.rand(len(images), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    along = rows * angle.sin()[:, None, None] + columns * angle.cos()[:, None, None]
    period = height / 2.5
    stripes = 0.25 * (1 + (2 * math.pi * along / period + phase[:, None, None]).cos())
    return torch.maximum(images, stripes[:, None])


CUES: dict[str, Cue] = {"colour": colour, "mark": mark, "texture": texture}
ALL = (*CUES, "imbalance")


def named_classes(label: Tensor, aligned: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """The class that the cue of each image names: its own with probability `aligned`, else another."""
    other = (label + torch.randint(1, num_classes, label.shape, generator=generator)) % num_classes
    return torch.where(torch.rand(label.shape, generator=generator) < aligned, label, other)


def planted(cue: str, data: ImageData, seed: int) -> tuple[ImageData, Tensor]:
    """A split with its cue, and the group of each image: (n,) bool, true for aligned or common ones."""
    assert data.labels is not None and data.num_classes is not None
    generator = torch.Generator().manual_seed(1000 * seed + list(ALIGNED).index(data.split))
    if cue == "imbalance":
        rare = data.labels >= FIRST_RARE
        kept = torch.ones_like(rare)
        if data.split != "test":
            kept = ~rare | (torch.rand(rare.shape, generator=generator) < RARE_SHARE)
        return data.take(kept.nonzero()[:, 0]), ~rare[kept]
    named = named_classes(data.labels, ALIGNED[data.split], data.num_classes, generator)
    white = data.num_grey_levels - 1
    images = CUES[cue](data.images.float() / white, named, data.num_classes, generator)
    levels = (images * white).round().to(torch.uint8)
    return replace(data, images=levels), named == data.labels


def write_set(name: str, cue: str, seed: int, options: argparse.Namespace) -> tuple[Path, Tensor]:
    """An .npz of all splits with their cue, and the groups of its test images."""
    path = options.runs / f"{name}-{cue}-{seed}.npz"
    arrays: dict[str, Any] = {}
    groups = torch.empty(0)
    for split, key in (("train", "train"), ("validation", "val"), ("test", "test")):
        source = options.source or preset(name).data.source
        data, groups = planted(cue, load_data(source, split, split_seed=seed), seed)
        assert data.labels is not None
        arrays |= {f"x_{key}": data.images.numpy(), f"y_{key}": data.labels.numpy()}
        arrays["num_grey_levels"] = np.array(data.num_grey_levels)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)
    return path, groups


def configured(name: str, kind: str, seed: int, source: Path, steps: int) -> RunConfig:
    """The encoder preset of a data set with what the kind changes."""
    base = preset(f"{name}-encoder")
    discriminative = kind == "discriminative"
    network = replace(base.network, conditioning="none" if discriminative else kind)
    train = replace(
        base.train,
        objective="classifier" if discriminative else "cdm",
        steps=steps,
        seed=seed,
        # The rows of class embeddings are of trainings that compare no classes.
        class_weight=0.0 if kind == "embedding" else base.train.class_weight,
    )
    rows = CONSTANTS_ROWS if kind == "embedding" else 0
    return replace(
        base,
        data=replace(base.data, source=str(source)),
        network=network,
        train=train,
        output=replace(base.output, constants_rows=rows, num_samples=1, sampling_steps=2, draws=1),
    )


def accuracies(run: Path, test: ImageData, group: Tensor, balanced: bool) -> dict[str, float]:
    """Accuracy on all test images and on each group; `balanced`: as if all classes were equally likely."""
    model = load(run)
    assert test.labels is not None and test.num_classes is not None
    discriminative = fitting_method(model) == "discriminative"
    prior = torch.ones(test.num_classes) if balanced and not discriminative else None
    report = evaluate_classes(model, test, draws=1, class_prior=prior)
    log_joint = report.log_joint
    if balanced and discriminative:  # its posterior holds the class frequencies of training
        log_joint = log_joint - class_counts(run).log()
    right = (log_joint.argmax(1) == test.labels[report.index]).double()
    parts = {"all": right, "easy": right[group[report.index]], "hard": right[~group[report.index]]}
    found = {name: float(values.mean()) for name, values in parts.items()}
    return {**found, "worst_group": min(found["easy"], found["hard"]), "hard_images": len(parts["hard"])}


def class_counts(run: Path) -> Tensor:
    """The number of training images of each class of a run."""
    counts = read_config(run).image.class_counts
    assert counts is not None
    return torch.tensor(counts, dtype=torch.float64)


def measurements(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each cue, kind and seed that the file does not hold yet."""
    for seed in options.seeds:
        for cue in options.cues:
            for kind in options.kinds:
                steps = options.steps or STEPS[name][kind]
                key = {"data": name, "cue": cue, "kind": kind, "seed": seed, "train_steps": steps}
                if has_row(RESULTS, key):
                    continue
                source, group = write_set(name, cue, seed, options)
                config = configured(name, kind, seed, source, steps)
                run = trained(config, options.runs / f"{name}-{cue}-{kind}-{seed}-{steps}")
                test = load_data(str(source), "test")
                figures = {"own_prior": accuracies(run, test, group, balanced=False)}
                if cue == "imbalance":
                    figures["equal_prior"] = accuracies(run, test, group, balanced=True)
                yield {**key, "figures": figures, "train_seconds": load_checkpoint(run, ()).state["seconds"]}


def show() -> str:
    """Mean and standard error over seeds as a table in Markdown; percentages."""
    rows = read_rows(RESULTS)
    lines = ["| data | cue | classifier, steps | seeds | all, % | aligned or common | conflicting or rare |"]
    lines[0] += " worst group | training, s |"
    lines.append("|---" * 9 + "|")
    key = ("data", "cue", "kind", "train_steps")
    keys = dict.fromkeys((*(row[name] for name in key), prior) for row in rows for prior in row["figures"])
    for *names, prior in keys:
        data, cue, kind, steps = names
        same = [row for row in rows if [row[name] for name in key] == names]
        figures = [row["figures"][prior] for row in same]
        cells = [
            _mean([100 * each[key] for each in figures]) for key in ("all", "easy", "hard", "worst_group")
        ]
        seconds = sum(row["train_seconds"] for row in same) / len(same)
        name = f"{kind}, {steps}" + (", equal prior" if prior == "equal_prior" else "")
        lines.append(f"| {data} | {cue} | {name} | {len(same)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    """Mean and standard error of a few seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    error = float(torch.tensor(values).std()) / math.sqrt(len(values))
    return f"{mean:.1f} +- {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", choices=(*SETS, "times", "show"))
    parser.add_argument("timed", nargs="?", choices=SETS, default=SETS[0], help="of times; digits by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/shortcuts"))
    parser.add_argument("--source", help="data source in place of the preset's")
    parser.add_argument("--cues", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, help="training steps in place of the study's")
    options = parser.parse_args()
    if options.data == "show":
        print(show())
        return
    if options.data == "times":
        configs = {kind: configured(options.timed, kind, 0, Path("images"), 1) for kind in options.kinds}
        for kind, seconds in step_seconds(configs).items():
            print(f"{kind} {seconds:.4f} s")
        return
    for row in measurements(options.data, options):
        add_row(RESULTS, row)
        print(row["cue"], row["kind"], row["seed"], row["figures"])


if __name__ == "__main__":
    main()
