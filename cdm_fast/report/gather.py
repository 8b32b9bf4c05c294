"""The content of the page for a run: read from the run, computed if cheap, or shown as missing.

# n images, C channels, H W pixels, L = T+2 noise levels
"""

import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.config.json import to_json
from cdm_fast.data import ImageData
from cdm_fast.data.draws import choose, draw_generator
from cdm_fast.data.pixels import dequantize, displayable, levels_to_display
from cdm_fast.errors import UserError
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.host.progress import Progress, silent
from cdm_fast.host.reading import read_bytes
from cdm_fast.likelihood import denoise_blind, evaluate, level_confusion, mse_per_level
from cdm_fast.model import CDM, DDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.plots.evaluation import write_audit, write_classes, write_histogram
from cdm_fast.plots.training import (
    LOSS_PANELS,
    series,
    write_calibration,
    write_confusion,
    write_level_mse,
    write_losses,
)
from cdm_fast.report.blocks import (
    Bars,
    Block,
    Missing,
    Picture,
    RunPage,
    Table,
    Tile,
    Tiles,
    drawn,
    png_source,
    tile_source,
)
from cdm_fast.runs.checkpoint import load_checkpoint
from cdm_fast.runs.reports import read_report
from cdm_fast.sampling.corrected import MALA
from cdm_fast.sampling.restoration import Known, restore
from cdm_fast.training.log import read_log
from cdm_fast.training.validation import check_levels, num_rows

SECTIONS = {
    "samples": "Samples",
    "training": "Training",
    "levels": "Noise levels",
    "classes": "Classes",
    "likelihood": "Likelihood",
    "audit": "Audit of the likelihood",
    "restoration": "Restoration",
    "configuration": "Configuration",
}
MOST_IMAGES = 1000  # that are scored
SHOWN = 10  # most and least likely images
RESTORED, CANDIDATES, RESTORE_STEPS = 3, 3, 20
NOISE = 0.5  # standard deviation of the noise that is removed again, in units of [-1, 1]
_LIMIT = 2**26  # bytes of a picture that a run keeps

Words = Callable[[Mapping[str, Any]], list[str]]


@dataclass(frozen=True)
class Source:
    """A run that is open: its folder, settings and model, and the images of a split, at most `MOST_IMAGES`.

    data, validation: test and validation images; None if they cannot be read, and `why` gives the reason.
    own_data: whether they are the images that the run was trained with, whose scores it keeps.
    """

    run: Path
    config: RunConfig
    model: CDM | DDM | Classifier
    data: ImageData | None
    validation: ImageData | None
    why: str
    audit_words: Words
    own_data: bool = True

    @property
    def likelihood(self) -> CDM | None:
        """The model where it has a likelihood in one pass."""
        return self.model if isinstance(self.model, CDM) else None

    def no_data(self, title: str) -> Missing:
        """The block shown in place of a part that needs the images."""
        return Missing(title, self.why, self.command("report", "--data DATA"))

    def command(self, name: str, options: str = "") -> str:
        """A command line for this run."""
        return f"cdm-fast {name} {shlex.quote(str(self.run))} {options}".rstrip()

    def pixels(self, images: Tensor) -> Tensor:
        """Grey levels (n,C,H,W) as uint8 0..255."""
        return levels_to_display(images, self.config.image.num_grey_levels)

    def shown(self, x: Tensor) -> Tensor:
        """Images (n,C,H,W) in [-1, 1] as uint8 0..255."""
        return displayable(x.cpu(), self.config.image.num_grey_levels, self.config.data.pixels)


def gather(source: Source, progress: Progress = silent) -> RunPage:
    """The page of one run. A section that raises UserError is shown as missing, with its message."""
    sections: dict[str, list[Block]] = {}
    for key, make in _MAKERS.items():
        progress(f"{source.run}: {SECTIONS[key].lower()}")
        try:
            sections[key] = make(source)
        except UserError as error:
            sections[key] = [Missing(SECTIONS[key], str(error))]
    return RunPage(_name(source.run), _facts(source), _figures(source.run), sections)


def _name(run: Path) -> str:
    return run.resolve().name


def _facts(source: Source) -> list[tuple[str, str]]:
    config, state = source.config, load_checkpoint(source.run, parts=()).state
    image = config.image
    parameters = sum(weight.numel() for weight in source.model.parameters())
    seconds = state.get("seconds")
    time = f", {seconds:,.0f} s of training" if isinstance(seconds, int | float) else ""
    return [
        (
            "data",
            f"{config.data.given or config.data.source}, {image.channels}x{image.height}x{image.width}",
        ),
        (
            "network",
            f"{config.network.architecture}, {parameters:,} parameters, {config.network.conditioning}",
        ),
        ("noise", f"{config.schedule.schedule}, T = {config.schedule.T}"),
        ("steps", f"{state['step']:,} of {config.train.steps:,}{time}"),
    ]


def _figures(run: Path) -> dict[str, str]:
    """The figures that the run keeps, by name."""
    nll, audit, classes = (_kept_or_empty(run, f"{name}.json") for name in ("nll", "audit", "classes"))
    found = {
        "bits/dim, unaudited": _value(nll, "bits_per_dim"),
        "bits/dim, audited": _value(audit, "audited_bits_per_dim"),
        "accuracy": _value(classes, "accuracy", 100, " %"),
        "calibration error": _value(classes, "ece", 100, " %"),
    }
    return {name: value for name, value in found.items() if value}


def _kept_or_empty(run: Path, name: str) -> dict[str, Any]:
    """A kept report; empty without the file, or if it is damaged, of which its section tells."""
    try:
        return read_report(run, name) or {}
    except UserError:
        return {}


@contextmanager
def _as_kept(path: Path) -> Iterator[None]:
    """UserError for a kept file that is JSON, but not what this version writes."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not fit ({type(error).__name__}: {error}); write it again or remove it"
        ) from None


def _value(report: Mapping[str, Any], key: str, scale: float = 1, unit: str = "") -> str:
    value, error = report.get(key), report.get(f"{key}_stderr")
    if not isinstance(value, int | float):
        return ""
    digits = 2 if unit else 4
    spread = f" ± {scale * error:.{digits}f}" if isinstance(error, int | float) else ""
    return f"{scale * value:.{digits}f}{spread}{unit}"


def _samples(source: Source) -> list[Block]:
    path = source.run / "samples.png"
    if isinstance(source.model, Classifier):
        return [Missing("Samples", "a classifier draws none")]
    if not path.is_file():
        options = f"--out {shlex.quote(str(path))}"
        return [Missing("Samples", "the run keeps no samples", source.command("sample", options))]
    content = read_bytes(path, _LIMIT, source.run)
    return [Picture(f"Samples, {source.config.output.sampler}", png_source(content), plot=False)]


def _training(source: Source) -> list[Block]:
    if not (source.run / "log.jsonl").exists():
        return [Missing("Loss curves", "the run keeps no log")]
    records = read_log(source.run / "log.jsonl")
    blocks: list[Block] = []
    for key, (title, _) in LOSS_PANELS.items():
        if series(records, key)[0]:
            with _as_kept(source.run / "log.jsonl"):
                lines = [{"step": each["step"], key: each[key]} for each in records if key in each]
                blocks.append(Picture(title.capitalize(), drawn(partial(write_losses, lines))))
    return blocks or [Missing("Loss curves", "the log holds no line yet")]


def _levels(source: Source) -> list[Block]:
    if isinstance(source.model, Classifier):
        return [Missing("Noise levels", "a classifier knows none")]
    if source.validation is None:
        return [source.no_data("Noise levels")]
    blocks: list[Block] = []
    model = source.likelihood
    if model is not None:
        _, confusion = level_confusion(model, source.validation)
        levels = model.schedule.num_levels
        write = partial(write_confusion, confusion, num_levels=levels)
        blocks.append(Picture("Confusion of noise levels", drawn(write), plot=False))
        checks = asdict(check_levels(model, source.validation, num_rows(source.validation)))
        blocks.append(Picture("Calibration of noise levels", drawn(partial(write_calibration, checks))))
    found = mse_per_level(source.model, source.validation)
    blocks.append(Picture("Denoising error", drawn(partial(write_level_mse, *found))))
    return blocks


def _classes(source: Source) -> list[Block]:
    model = source.model
    if isinstance(model, DDM) or model.num_classes is None:
        return [Missing("Classes", "the run was trained without classes")]
    report = read_report(source.run, "classes.json")
    if report is not None:
        with _as_kept(source.run / "classes.json"):
            return _class_blocks(report, source.data if source.own_data else None)
    if source.data is None:
        return [source.no_data("Classes")]
    if source.data.labels is None:
        return [Missing("Classes", "the images have no labels", source.command("report", "--data DATA"))]
    return _class_blocks(evaluate_classes(model, source.data, draws=1).to_json(), source.data)


def _class_blocks(report: dict[str, Any], data: ImageData | None) -> list[Block]:
    """Confusion, reliability and accuracies; data: the images that were scored, whose names are shown."""
    matrix = torch.tensor(report["confusion"], dtype=torch.float64)
    names: list[Any] = list((data and data.class_names) or [])
    if len(names) != len(matrix):
        names = [f"class {c}" for c in range(len(matrix))]
    right, count = matrix.diagonal().tolist(), matrix.sum(1).tolist()
    rows = [
        (
            str(name),
            hit / total if total else 0.0,
            f"{100 * hit / total:.1f} %, {int(total)}" if total else "none",
        )
        for name, hit, total in zip(names, right, count, strict=True)
    ]
    told = f"{report['num_images']} {report['split']} images of {report['data']}, method {report['method']}"
    plot = Picture("Confusion and reliability", drawn(partial(write_classes, _with_nan(report))), plot=False)
    return [plot, Bars("Accuracy by class", rows, told)]


def _with_nan(report: Any) -> Any:
    """The report with NaN, which JSON lacks, back in its lists of numbers, such as empty bins."""
    if isinstance(report, dict):
        return {key: _with_nan(value) for key, value in report.items()}
    if isinstance(report, list):
        return [math.nan if each is None else _with_nan(each) for each in report]
    return report


def _likelihood(source: Source) -> list[Block]:
    if source.likelihood is None:
        return [Missing("Likelihood", "this model has none in one pass")]
    if source.data is None:
        return [source.no_data("Likelihood")]
    found = evaluate(source.likelihood, source.data, draws=1, check_levels=0)
    order = found.per_image.argsort()
    picked = {"most likely": order[:SHOWN], "least likely": order.flip(0)[:SHOWN]}
    rows = [
        (
            name,
            [
                Tile(tile_source(pixels), f"{found.per_image[i]:.2f}")
                for i, pixels in zip(index, images, strict=True)
            ],
        )
        for name, index in picked.items()
        for images in [source.pixels(source.data.images[index])]
    ]
    told = (
        f"{found.bits_per_dim:.4f} ± {found.bits_per_dim_stderr:.4f} bits/dim, unaudited: {found.num_images}"
        f" {found.split} images of {found.data}, one draw, single pass"
    )
    return [
        Picture("bits/dim over the images", drawn(partial(write_histogram, found.per_image))),
        Tiles("Most and least likely images, bits/dim", rows, told),
    ]


def _audit(source: Source) -> list[Block]:
    if source.likelihood is None:
        return [Missing("Audit", "this model has no likelihood in one pass")]
    report = read_report(source.run, "audit.json")
    if report is None:
        if source.own_data and source.data is not None:
            return [Missing("Audit", "not measured", source.command("nll", "--method audit"))]
        return [Missing("Audit", "the run keeps none; it is measured on the run's own images")]
    with _as_kept(source.run / "audit.json"):
        return _audit_blocks(report, source.audit_words)


def _audit_blocks(report: dict[str, Any], words: Words) -> list[Block]:
    rows = [
        (name, _value(report, key), told)
        for name, key, told in (
            ("single pass", "bits_per_dim", "unaudited"),
            ("single pass, normalised", "audited_bits_per_dim", "audited by log Z"),
            ("probability-flow ODE", "ode_bits_per_dim", f"{report['ode']['num_images']} images"),
            ("variational bound", "elbo_bits_per_dim", f"{(report['elbo'] or {}).get('num_images')} images"),
            ("log2 Z / d", "log_z_bits_per_dim", f"{report['log_z']['particles']} particles"),
        )
        if _value(report, key)
    ]
    plot = Picture("Audit by level", drawn(partial(write_audit, _with_nan(report))))
    return [Table("Audit", ("figure", "bits/dim", "from"), rows, words(report)), plot]


def _restoration(source: Source) -> list[Block]:
    kept = [
        Picture(
            f"Restored: {path.stem.removeprefix('restored-')}",
            png_source(read_bytes(path, _LIMIT, source.run)),
            plot=False,
        )
        for path in sorted(source.run.glob("restored-*.png"))
    ]
    if isinstance(source.model, Classifier):
        return [Missing("Restoration", "a classifier restores nothing")]
    if source.data is None:
        return [*kept, source.no_data("Restoration")]
    makers: dict[str, Callable[[], Block]] = {"Denoising": lambda: _denoised(source)}
    if (model := source.likelihood) is not None:
        makers["Filling in"] = lambda: _filled_in(source, model)
    made: list[Block] = []
    for title, make in makers.items():
        try:
            made.append(make())
        except UserError as error:
            made.append(Missing(title, str(error)))
    return [*made, *kept]


def _some_images(source: Source, data: ImageData, count: int) -> tuple[Tensor, Tensor]:
    """(pixels uint8, x in [-1, 1]) of `count` images."""
    generator = draw_generator(0, 0)
    images = data.take(choose(len(data), count, generator)).images
    x = dequantize(images, source.config.image.num_grey_levels, generator, source.config.data.pixels)
    return source.pixels(images), x.to(source.model.a.device)


def _denoised(source: Source) -> Tiles:
    assert source.data is not None and not isinstance(source.model, Classifier)
    pixels, x = _some_images(source, source.data, 2 * RESTORED)
    noise = torch.randn(x.shape, generator=draw_generator(0, 1)).to(x)
    clean, sigma, _ = denoise_blind(source.model, x + NOISE * noise)
    rows = [
        ("image", [Tile(tile_source(each)) for each in pixels]),
        ("noisy", [Tile(tile_source(each)) for each in source.shown((x + NOISE * noise).clamp(-1, 1))]),
        (
            "denoised",
            [
                Tile(tile_source(each), f"σ {s:.2f}")
                for each, s in zip(source.shown(clean), sigma.tolist(), strict=True)
            ],
        ),
    ]
    told = f"Noise with σ = {NOISE} is added, then removed as by cdm-fast denoise, which estimates σ."
    return Tiles("Denoising without knowing the noise", rows, told)


def _filled_in(source: Source, model: CDM) -> Tiles:
    assert source.data is not None
    pixels, x = _some_images(source, source.data, RESTORED)
    known = torch.ones_like(x[0], dtype=torch.bool)
    if known.shape[1] > 1:
        half, known[:, known.shape[1] // 2 :] = "lower", False
    else:  # a signal
        half, known[:, :, known.shape[2] // 2 :] = "right", False
    sigma = 1 / (source.config.image.num_grey_levels * 3**0.5)  # of rounding to grey levels
    steps = min(RESTORE_STEPS, model.schedule.T)
    rows = []
    for image, each in zip(pixels, x, strict=True):
        found = restore(model, Known(each, sigma, known), CANDIDATES, steps, sampler=MALA(moves=4))
        kept = torch.where(known.cpu(), source.shown(each[None])[0].int(), 128).to(torch.uint8)
        tiles = [Tile(tile_source(image), "image"), Tile(tile_source(kept), "known")]
        words = [f"{value:.0f} nats" for value in found.log_prob.tolist()]
        tiles += [
            Tile(tile_source(one), word) for one, word in zip(source.shown(found.images), words, strict=True)
        ]
        rows.append(("", tiles))
    told = f"The {half} half is drawn {CANDIDATES} times and ranked by log p; {steps} levels, 4 moves each."
    return Tiles(f"Filling in the {half} half", rows, told)


def _configuration(source: Source) -> list[Block]:
    rows = [
        (f"{section}.{name}", "" if value is None else str(value))
        for section, values in to_json(source.config).items()
        for name, value in values.items()
    ]
    return [Table("Settings", ("setting", "value"), rows, folded=True)]


_MAKERS: dict[str, Callable[[Source], list[Block]]] = {
    "samples": _samples,
    "training": _training,
    "levels": _levels,
    "classes": _classes,
    "likelihood": _likelihood,
    "audit": _audit,
    "restoration": _restoration,
    "configuration": _configuration,
}
