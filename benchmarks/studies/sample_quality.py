"""Samples of labelled runs beside real images, by sampler: docs/measurements/sampling.md.

    python -m benchmarks.studies.sample_quality measure NAME=RUN [NAME=RUN ...] [--classifier RUN]
    python -m benchmarks.studies.sample_quality show          # results/sample_quality.jsonl as a table
    python -m benchmarks.studies.sample_quality errors NAME=RUN [NAME=RUN ...]  # of the denoisers, by level
    python -m benchmarks.studies.sample_quality base NAME=RUN [NAME=RUN ...]    # the classes by bases alone
    python -m benchmarks.studies.sample_quality sheet NAME=RUN [NAME=RUN ...] --out PICTURE.png

Each row compares samples, as many of each class, with 10,000 training images of the run:

- speckle: the mean absolute difference of neighbouring pixels, over that of as many test images; 1 is ideal;
- agreement: how often a random forest, trained on the real images, names the class that was asked for, and
  for test images how often it is right;
- Frechet: the Frechet distance of the first 50 principal components;
- variance: of these components, over that of real images;
- with `--classifier`, a run of `train --objective classifier` on the same data: how often it names the class
  that was asked for, and the Frechet distance of its features. A mixture of Gaussians can do well in
  principal components by itself, and not in these.

A CDM is drawn by `ddpm` and `blind`, a DDM by `ddpm`. `sheet` draws a row of each class, by `blind` for a CDM
and by `ddpm` for a DDM.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor

from benchmarks.studies.rows import add_row, has_row, read_rows
from cdm_fast import CDM, load, sample
from cdm_fast.data import ImageData
from cdm_fast.data.pixels import displayable, to_points
from cdm_fast.evaluation.quality import frechet_distance
from cdm_fast.host.progress import to_stderr
from cdm_fast.model import Denoiser
from cdm_fast.model.base import base_of
from cdm_fast.model.classifier import Classifier
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.data import run_data
from cdm_fast.sampling.blind import knows_levels

RESULTS = Path(__file__).parents[1] / "results" / "sample_quality.jsonl"
REAL, COMPONENTS, TREES, STEPS = 10_000, 50, 100, 50
GUIDANCE = (0.0, 1.0)
SAMPLERS = ("ddpm", "blind")
NAMED = 5000  # images of each split that the bases name
COLUMNS = 10  # images of a class on a sheet


def unit(data: ImageData, num: int) -> Tensor:
    """The first images of a split in [-1, 1], (num, C, H, W)."""
    return to_points(data.images[:num], data.num_grey_levels)


def total_variation(x: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, down and across."""
    return float(x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean())


class RealImages:
    """What samples of a run are compared with.

    Args:
        run: a labelled run.
        num: number of samples and of test images.
        classifier: a run of a classifier, or None.
    """

    def __init__(self, run: Path, num: int, classifier: Path | None = None) -> None:
        config = read_config(run)
        train, test = run_data(config, "train"), run_data(config, "test")
        assert train.labels is not None and test.labels is not None
        rows = unit(train, REAL).flatten(1).numpy()
        self.forest = RandomForestClassifier(TREES, random_state=0).fit(rows, train.labels[:REAL].numpy())
        self.pca = PCA(min(COMPONENTS, rows.shape[1]), random_state=0).fit(rows)
        self.components = self._components(rows)
        self.test, self.test_labels = unit(test, num), test.labels[:num]
        self.classifier = None
        if classifier is not None:
            self.classifier = load(classifier)
            assert isinstance(self.classifier, Classifier)
            self.features = self._in_batches(self.classifier.features, unit(train, REAL)).double()

    @staticmethod
    @torch.no_grad()
    def _in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(part) for part in x.split(500)])

    def _components(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.pca.transform(rows)).double()

    def compared(self, x: Tensor, label: Tensor) -> dict[str, float]:
        """The figures of images x (B, C, H, W) in [-1, 1] of these classes."""
        rows = x.flatten(1).numpy()
        components = self._components(rows)
        by_classifier = {}
        if self.classifier is not None:
            named = self._in_batches(self.classifier.logits, x).argmax(1)
            features = self._in_batches(self.classifier.features, x).double()
            by_classifier = {
                "named": float((named == label).double().mean()),
                "feature_frechet": frechet_distance(features, self.features),
            }
        return {
            **by_classifier,
            "speckle": total_variation(x) / total_variation(self.test),
            "agreement": float((self.forest.predict(rows) == label.numpy()).mean()),
            "frechet": frechet_distance(components, self.components),
            "variance": float(components.var(0).sum() / self.components.var(0).sum()),
        }


def drawn(model: Denoiser, num: int, classes: int, sampler: str, guidance: float) -> tuple[Tensor, Tensor]:
    """Samples, clipped to [-1, 1], and their classes in turn."""
    label = torch.arange(num) % classes
    return sample(model, num, sampler, STEPS, label=label, guidance=guidance).clamp(-1, 1), label


def measurements(
    name: str,
    run: Path,
    num: int,
    samplers: Sequence[str],
    guidances: Sequence[float],
    classifier: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a run that the file lacks, of these samplers and strengths of guidance."""
    model, config, real = load(run), read_config(run), RealImages(run, num, classifier)
    assert isinstance(model, Denoiser) and config.image.num_classes is not None
    seconds = load_checkpoint(run, ()).state["seconds"]
    known = SAMPLERS if knows_levels(model) else SAMPLERS[:1]
    for sampler in (None, *(each for each in samplers if each in known)):
        for guidance in guidances if sampler else (0.0,):
            key = {"name": name, "sampler": sampler, "guidance": guidance, "num": num}
            if classifier is not None:
                key["classifier"] = True
            if has_row(RESULTS, key):
                continue
            to_stderr(f"{name}: {sampler}, guidance {guidance:g}")
            x, label = real.test, real.test_labels
            if sampler:
                x, label = drawn(model, num, config.image.num_classes, sampler, guidance)
            yield {**key, "steps": STEPS, "train_seconds": seconds, **real.compared(x, label)}


def show() -> str:
    """The rows as a table in Markdown."""
    titles = ("run", "sampler", "guidance", "speckle", "agreement, %", "Frechet", "variance", "named, %")
    lines = ["| " + " | ".join((*titles, "Frechet of features")) + " |", "|---" * 9 + "|"]
    for row in read_rows(RESULTS):
        sampler = row["sampler"] or "test images"
        figures = f"{row['speckle']:.2f} | {100 * row['agreement']:.1f} | {row['frechet']:.3g}"
        named = f"{100 * row['named']:.1f} | {row['feature_frechet']:.3g}" if "named" in row else " | "
        figures = f"{figures} | {row['variance']:.2f} | {named}"
        lines.append(f"| {row['name']} | {sampler} | {row['guidance']:g} | {figures} |")
    return "\n".join(lines)


def denoising_errors(runs: dict[str, Path]) -> str:
    """Mean squared error of eps_hat by level, of 256 test images given their classes, in Markdown."""
    columns: dict[int, list[str]] = {}
    for run in runs.values():
        model, test = load(run), run_data(read_config(run), "test")
        assert isinstance(model, Denoiser) and test.labels is not None
        x0, label, schedule = unit(test, 256), test.labels[:256], model.schedule
        for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            level = round(share * (schedule.T + 1))
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(level))
            x = schedule.noise(x0, level, eps)
            with torch.no_grad():
                eps_hat = torch.cat(
                    [model.denoise(x[i : i + 128], level, label[i : i + 128]) for i in (0, 128)]
                )
            columns.setdefault(level, []).append(f"{(eps_hat - eps).square().mean():.4f}")
    lines = ["| level | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
    return "\n".join([*lines, *(f"| {level} | {' | '.join(row)} |" for level, row in columns.items())])


@torch.no_grad()
def base_classes(runs: dict[str, Path]) -> str:
    """How well the bases name the classes of noised images that they were fitted to, and of others."""
    titles = ("run", "level", "training images, %", "nats", "test images, %", "nats")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, run in runs.items():
        model, config = load(run), read_config(run)
        assert isinstance(model, CDM)
        base = base_of(model)
        for level in (200, 300, 400):
            row = [name, str(level)]
            for split in ("train", "test"):
                data = run_data(config, split)
                assert data.labels is not None
                label = data.labels[:NAMED]
                generator = torch.Generator().manual_seed(level)
                x = model.schedule.noise(unit(data, NAMED), level, generator=generator)
                logits = base.at_level(base.read(x), model.schedule.levels(level, x))
                right = (logits.argmax(1) == label).double().mean()
                row += [f"{100 * right:.1f}", f"{F.cross_entropy(logits, label):.3f}"]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def write_sheet(runs: dict[str, Path], out: Path) -> None:
    """A row for each class, the runs side by side under their names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(runs), 5.3), layout="constrained")
    for axes, (name, run) in zip(np.atleast_1d(figure.subplots(1, len(runs))), runs.items(), strict=True):
        model, config = load(run), read_config(run)
        assert isinstance(model, Denoiser) and config.image.num_classes is not None
        classes = config.image.num_classes
        sampler = "blind" if knows_levels(model) else "ddpm"
        x, _ = drawn(model, classes * COLUMNS, classes, sampler, 1.0)
        pixels = displayable(x, config.image.num_grey_levels, config.data.pixels)[:, 0]
        rows = pixels.unflatten(0, (COLUMNS, classes)).permute(1, 2, 0, 3)
        axes.imshow(rows.flatten(2).flatten(0, 1).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(name)
        axes.set_axis_off()
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("measure", "show", "errors", "base", "sheet"))
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN")
    parser.add_argument("--num", type=int, default=2000, help="samples of each row")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--guidance", nargs="+", type=float, default=GUIDANCE)
    parser.add_argument("--classifier", type=Path, metavar="RUN", help="run of a classifier")
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    options = parser.parse_args()
    runs = {name: Path(run) for name, run in (each.split("=", 1) for each in options.runs)}
    if options.what == "show":
        print(show())
    elif options.what == "errors":
        print(denoising_errors(runs))
    elif options.what == "base":
        print(base_classes(runs))
    elif options.what == "sheet":
        write_sheet(runs, options.out)
    else:
        for name, run in runs.items():
            of_run = (options.num, options.samplers, options.guidance, options.classifier)
            for row in measurements(name, run, *of_run):
                print(add_row(RESULTS, row), flush=True)


if __name__ == "__main__":
    main()
