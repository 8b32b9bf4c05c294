"""`cdm-fast score`: ranks images by how unusual they are, reports it and draws it.

# n images
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdm_fast.cli import arguments
from cdm_fast.cli.arguments import Score
from cdm_fast.cli.describe import describe_outliers
from cdm_fast.cli.outcome import Outcome, Scored, scored_by
from cdm_fast.cli.per_image import write_per_image
from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData, dequantize, load_data
from cdm_fast.data.draws import choose, draw_generator
from cdm_fast.data.pixels import levels_to_display
from cdm_fast.errors import require_at_least
from cdm_fast.evaluation.outliers import (
    SCORES,
    OutlierReport,
    Scores,
    anomaly_map,
    evaluate_outliers,
    level_of,
)
from cdm_fast.host.optional import need
from cdm_fast.host.progress import to_stderr
from cdm_fast.likelihood import calibrate_sigma
from cdm_fast.model import CDM, Denoiser
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.plots.evaluation import write_outliers, write_sigma
from cdm_fast.plots.sheet import write_rows
from cdm_fast.runs.data import run_data

CORRUPTED = "corrupted"  # value of --against that is not a data source
REFERENCE_IMAGES = 2000  # images whose mean is the typical likelihood
SHOWN = 8  # images in a row of a picture
MAP_SIGMA = 0.5  # noise of the anomaly map, for data in [-1, 1], unless a level is given


class Compared(NamedTuple):
    """The images of one `cdm-fast score`.

    Fields:
        data, rows: the images to score, and their rows in the split, (n,) int64.
        other: the images of --against, or None.
        reference: images of the validation split, whose mean likelihood is the typical one.
    """

    data: ImageData
    rows: Tensor
    other: ImageData | None
    reference: ImageData


def score_images(command: Score, config: RunConfig, model: Denoiser, data: ImageData) -> Scored:
    """The JSON values, the lines of text, and the columns of the per-image file.

    Draws RUN/score.png, RUN/anomaly.png and, if requested, RUN/sigma.png; writes the per-image file of the
    other data. Raises UserError as in `evaluate_outliers` and `anomaly_map`.
    """
    if command.images is not None:
        require_at_least("--images", command.images, 1)
    cdm = require_likelihood(model)
    images = _choose_images(command, config, data)
    map_level = level_of(cdm, MAP_SIGMA) if command.map_level is None else command.map_level
    report = evaluate_outliers(
        cdm,
        images.data,
        images.reference,
        images.other,
        corruptions=command.against == CORRUPTED,
        level=command.level,
        draws=command.draws,
        false_alarms=command.false_alarms,
        batch_size=command.batch_size,
        seed=command.seed,
        progress=to_stderr,
    )
    result, lines = _draw_report(command, cdm, images, report, map_level)
    if command.noise:
        sigma, sigma_lines = _estimate_noise(command, cdm, images.data)
        result |= sigma
        lines += sigma_lines
    if command.out is not None and images.other is not None and report.against is not None:
        path = command.out.with_name(f"{command.out.stem}-against{command.out.suffix}")
        columns = _columns(report.against.scores, torch.arange(len(images.other)))
        result["against_out"] = str(write_per_image(path, images.other, columns))
    columns = {**_columns(report.scores, images.rows), "p_value": (images.rows, report.p_value)}
    return result, lines, columns


def _choose_images(command: Score, config: RunConfig, data: ImageData) -> Compared:
    """At most `--images` of each source, drawn by one generator in a fixed order."""
    generator = torch.Generator().manual_seed(command.seed)
    index = choose(len(data), command.images, generator)
    other = None
    if command.against is not None and command.against != CORRUPTED:
        other = other_data(command.against, command.split, config)
        other = other.take(choose(len(other), command.images, generator))
    return Compared(data.take(index), index, other, reference_images(config, generator))


def reference_images(config: RunConfig, generator: torch.Generator) -> ImageData:
    """At most `REFERENCE_IMAGES` of the run's validation split: held-out images like those of training."""
    reference = run_data(config, "validation")
    return reference.take(choose(len(reference), REFERENCE_IMAGES, generator))


def _draw_report(
    command: Score, model: CDM, images: Compared, report: OutlierReport, map_level: int
) -> tuple[dict[str, Any], list[str]]:
    """The report as JSON values and lines; draws RUN/score.png and RUN/anomaly.png."""
    order = report.order()
    least = order.flip(0)[:SHOWN]
    anomaly = _draw_anomaly(command, model, images.data, least, map_level)
    result = {
        **report.to_json(),
        "most_likely": images.rows[order[:SHOWN]].tolist(),
        "least_likely": images.rows[least].tolist(),
        "picture": str(_draw_ranking(command.run, report, images.data, images.other)),
        "anomaly_level": map_level,
        "anomaly_picture": str(anomaly),
    }
    lines = [
        *describe_outliers(report),
        f"least likely images: {', '.join(map(str, result['least_likely']))}",
        result["picture"],
        result["anomaly_picture"],
    ]
    return result, lines


def _estimate_noise(command: Score, model: CDM, data: ImageData) -> tuple[dict[str, Any], list[str]]:
    """`--noise` as JSON values and lines; draws RUN/sigma.png."""
    to_stderr("estimating known noise")
    found = calibrate_sigma(model, data, seed=command.seed).to_json()
    picture = str(write_sigma(found, command.run / "sigma.png"))
    rows = zip(*(found[key] for key in ("sigma", "median", "low", "high")), strict=True)
    lines = ["sigma added, and its estimate (median, 10th to 90th percentile):"]
    lines += ["  {:.4f}  {:.4f}  {:.4f} to {:.4f}".format(*row) for row in rows]
    return {"sigma": found, "sigma_picture": picture}, [*lines, picture]


def other_data(source: str, split: str, config: RunConfig) -> ImageData:
    """A split of another source as images of the run's size, channels and grey levels.

    Its grey levels are mapped linearly to the run's, black to black and white to white.
    """
    image = config.image
    data = load_data(
        source,
        split,
        image.sides,
        config.data.split_seed,
        image.channels,
        crop=config.data.crop,
        resample=config.data.resample,
    )
    scaled = data.images.float() * ((image.num_grey_levels - 1) / (data.num_grey_levels - 1))
    return replace(
        data,
        images=scaled.round().to(torch.uint8),
        num_grey_levels=image.num_grey_levels,
        pixels=config.data.pixels,
    )


def _columns(scores: Scores, index: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Scores as columns of the per-image file, in which the likelihood is named after its unit."""
    return {"bits_per_dim" if name == "likelihood" else name: (index, scores[name]) for name in SCORES}


def _draw_ranking(run: Path, report: OutlierReport, data: ImageData, other: ImageData | None) -> Path:
    """RUN/score.png."""
    order = report.order()
    rows = {"most likely": order[:SHOWN], "least likely": order.flip(0)[:SHOWN]}
    shown = {name: _pixels(data.take(index)) for name, index in rows.items()}
    bits = {f"{data.name}, {data.split}": report.scores["likelihood"]}
    curves = {}
    if other is not None and report.against is not None:
        theirs = report.against.scores
        likeliest = theirs["likelihood"].argsort(stable=True)[:SHOWN]
        shown["likeliest others"] = _pixels(other.take(likeliest))
        bits[report.against.data] = theirs["likelihood"]
        for name in SCORES:
            kind = torch.cat([torch.zeros(len(data)), torch.ones(len(other))])
            values = torch.cat([report.scores[name], theirs[name]])
            roc_curve = need("sklearn.metrics", "the ROC curve").roc_curve
            curves[name] = roc_curve(kind.numpy(), values.numpy())[:2]
    return write_outliers(
        shown, bits, report.reference_bits_per_dim, report.to_json(), curves, run / "score.png"
    )


def _draw_anomaly(command: Score, model: CDM, data: ImageData, index: Tensor, level: int) -> Path:
    """RUN/anomaly.png: images above their anomaly maps, all on one scale."""
    chosen = data.take(index)
    x = dequantize(chosen.images, chosen.num_grey_levels, draw_generator(command.seed, 0), chosen.pixels)
    maps = anomaly_map(model, x, level, seed=command.seed)
    white = float(maps.max())
    rows = {"image": _pixels(chosen), "anomaly": (maps[:, None] * (255 / white)).round().to(torch.uint8)}
    sigma = float(model.schedule.sigma[level])
    title = f"least likely images; |x0_hat(x_t) - x|, level {level} (sigma {sigma:.2g}), white {white:.2g}"
    return write_rows(rows, command.run / "anomaly.png", title)


def _pixels(data: ImageData) -> Tensor:
    """(n,C,H,W) uint8 0..255."""
    return levels_to_display(data.images, data.num_grey_levels)


def score_command(command: arguments.Score) -> Outcome:
    """`cdm-fast score`."""
    return scored_by(score_images, command)
