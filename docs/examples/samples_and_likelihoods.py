"""Draws the picture of the README: samples of each class beside log p(x | c) of test images.

    python docs/examples/samples_and_likelihoods.py RUN docs/pictures/samples_and_likelihoods.png

Without arguments it trains the digits preset first, for `STEPS` steps, into a temporary folder.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from cdm_fast import CDM, load, sample
from cdm_fast.config import preset
from cdm_fast.data import ImageData, dequantize, load_data
from cdm_fast.training.train import train

CLASSES = 10
COLUMNS = 8


def train_digits(run: Path) -> Path:
    """Trains the digits preset for `STEPS` steps."""
    config = preset("digits-encoder")
    steps = int(os.environ.get("STEPS", config.train.steps))
    output = replace(config.output, evaluate_every=0)
    train(replace(config, train=replace(config.train, steps=steps), output=output), run)
    return run


def first_of_each_class(data: ImageData) -> ImageData:
    """The first image of every class, in order."""
    assert data.labels is not None
    return data.take(torch.stack([(data.labels == c).nonzero()[0, 0] for c in range(CLASSES)]))


def draw(model: CDM, path: Path) -> None:
    """Writes the picture."""
    labels = torch.arange(CLASSES).repeat_interleave(COLUMNS)
    images = sample(model, CLASSES * COLUMNS, sampler="ddpm", steps=100, label=labels)
    test = first_of_each_class(load_data("digits", "test"))
    x = dequantize(test.images, test.num_grey_levels, torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_p = model.log_prob_classes(x)  # (10, 10) nats

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(COLUMNS, CLASSES))
    images = F.pad(images, (1, 1, 1, 1), value=0.0)  # grey lines between images
    size = images.shape[-1]
    sheet = images.view(CLASSES, COLUMNS, size, size).permute(0, 2, 1, 3).reshape(CLASSES * size, -1)
    left.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    left.set_title("samples of each class")
    left.set_axis_off()
    heat = right.imshow(log_p, cmap="viridis", vmin=float(log_p.median()))
    right.set_title("log p(x | c) of ten test images, from one pass")
    right.set_xlabel("class c")
    right.set_ylabel("test image of class")
    right.set_xticks(range(CLASSES))
    right.set_yticks(range(CLASSES))
    figure.colorbar(heat, ax=right, label="nats")
    figure.savefig(path, dpi=100)


def main() -> None:
    arguments = [Path(argument) for argument in sys.argv[1:]]
    run = arguments[0] if arguments else train_digits(Path(mkdtemp()) / "digits")
    path = arguments[1] if len(arguments) > 1 else run / "samples_and_likelihoods.png"
    model = load(run)
    assert isinstance(model, CDM)
    draw(model, path)
    print(path)


if __name__ == "__main__":
    main()
