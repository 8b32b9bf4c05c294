"""The content of the page for a run: read from the run, computed if cheap, or shown as missing.

# n images, C channels, H W pixels, L = T+2 noise levels
"""

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from cdm_fast.host.reading import bad, error_text, read_bytes, require_inside
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
from cdm_fast.runs.reports import KEPT_LIMIT, figure_text, read_report
from cdm_fast.sampling import sampler_name
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

Words = Callable[[Mapping[str, Any]], list[str]]


@dataclass(frozen=True)
class Source:
    """A run that is open: its folder, settings and model, and the images of a split, at most `MOST_IMAGES`.

    data: None where they cannot be read, and `why` says the reason.
    given: the images are not those that the run names.
    """

    run: Path
    config: RunConfig
    model: CDM | DDM | Classifier
    data: ImageData | None
    validation: ImageData | None
    why: str
    audit_words: Words
    given: bool = False

    @property
    def likelihood(self) -> CDM | None:
        """The model where it has a likelihood in one pass."""
        return self.model if isinstance(self.model, CDM) else None

    def no_data(self, title: str) -> Missing:
        """The block shown in place of a part that needs the images."""
        return Missing(
            title, self.why or "the images have no labels", self.command("report", "--data", "DATA")
        )

    def command(self, name: str, *words: str) -> str:
        """A command on the run, quoted for a shell."""
        return shlex.join(["cdm-fast", name, str(self.run), *words])

    def pixels(self, images: Tensor) -> Tensor:
        """Grey levels (n,C,H,W) as uint8 0..255."""
        return levels_to_display(images, self.config.image.num_grey_levels)

    def shown(self, x: Tensor) -> Tensor:
        """Images (n,C,H,W) in [-1, 1] as uint8 0..255."""
        return displayable(x.cpu(), self.config.image.num_grey_levels, self.config.data.pixels)


def gather(source: Source, progress: Progress = silent) -> RunPage:
    """Every section of one run. What fails with a UserError is shown as missing, with its message."""
    sections: dict[str, list[Block]] = {}
    for key, make in _MAKERS.items():
        progress(f"{source.run}: {SECTIONS[key].lower()}")
        try:
            sections[key] = make(source)
        except UserError as error:
            sections[key] = [Missing(SECTIONS[key], str(error))]
    figures = _figures(source.run, sections)
    return RunPage(_name(source.run), _facts(source), figures, sections, _kind(source.model))


def _name(run: Path) -> str:
    return run.resolve().name


def _kind(model: CDM | DDM | Classifier) -> str:
    if isinstance(model, Classifier):
        return "Classifier of images"
    return "Classification Diffusion Model" if isinstance(model, CDM) else "Denoising Diffusion Model"


def _facts(source: Source) -> list[tuple[str, str]]:
    config, image = source.config, source.config.image
    parameters = sum(weight.numel() for weight in source.model.parameters())
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
        ("steps", _steps(source)),
    ]


def _steps(source: Source) -> str:
    """How long the run was trained, or why that is not known."""
    try:
        state = load_checkpoint(source.run, parts=()).state
        seconds = state.get("seconds")
        time = f", {seconds:,.0f} s of training" if isinstance(seconds, int | float) else ""
        return f"{state['step']:,} of {source.config.train.steps:,}{time}"
    except UserError as error:
        return str(error)


def _figures(run: Path, sections: dict[str, list[Block]]) -> dict[str, str]:
    """The figures that the run keeps, by name; a file that cannot be read is added to its section."""
    reports: dict[str, dict[str, Any]] = {}
    for name, key in (("nll", "likelihood"), ("audit", "audit"), ("classes", "classes")):
        try:
            reports[name] = read_report(run, f"{name}.json") or {}
        except UserError as error:
            reports[name] = {}
            if not any(isinstance(each, Missing) and each.reason == str(error) for each in sections[key]):
                sections[key].insert(0, Missing(f"{name}.json", str(error)))
    nll, audit, classes = reports["nll"], reports["audit"], reports["classes"]
    if (audit.get("level"), audit.get("split")) != (0, "test"):
        audit = {}  # not the run's figure
    found = {
        "bits/dim, unaudited": figure_text(nll, "bits_per_dim"),
        "bits/dim, audited": figure_text(audit, "audited_bits_per_dim"),
        "accuracy": figure_text(classes, "accuracy", 100, " %"),
        "calibration error": figure_text(classes, "ece", 100, " %"),
    }
    return {name: value for name, value in found.items() if value}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns the errors of a kept file with other content than expected into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error_text(error)}"
        raise bad(path, f"the kept file does not fit ({told}); write it again or remove it") from error


# Fields of reports that are null by design; elsewhere null stands for a number that is not finite.
_OPTIONAL = {
    *("elbo", "elbo_bits_per_dim", "elbo_bits_per_dim_stderr", "gap_bits_per_dim", "gap_bits_per_dim_stderr"),
    *("gap", "gap_stderr", "difference", "difference_stderr", "median_difference", "probes", "probe_stderr"),
    *("ratio_check", "sum_bits_per_dim", "sum_bits_per_dim_stderr", "precision_cost", "warning"),
    *("trials", "tolerance"),
}


def _with_nan(value: Any) -> Any:
    """A kept report with NaN, which JSON lacks, in place of null where a number is expected."""
    if isinstance(value, dict):
        return {
            key: None if each is None and key in _OPTIONAL else _with_nan(each) for key, each in value.items()
        }
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value


def _samples(source: Source) -> list[Block]:
    path = source.run / "samples.png"
    if isinstance(source.model, Classifier):
        return [Missing("Samples", "a classifier draws none")]
    if not path.is_file():
        return [Missing("Samples", "the run keeps no samples", source.command("sample", "--out", str(path)))]
    content = read_bytes(path, KEPT_LIMIT, source.run)
    name = sampler_name(source.config.output.sampler, source.model)
    return [Picture("Samples", png_source(content), plot=False, note=name)]


def _training(source: Source) -> list[Block]:
    path = source.run / "log.jsonl"
    if not path.exists():
        return [Missing("Loss curves", "the run keeps no log")]
    require_inside(path, source.run)
    records = read_log(path)
    blocks: list[Block] = []
    for key, (title, _) in LOSS_PANELS.items():
        with _reading(path):
            points = zip(*series(records, key), strict=True)
            lines = [{"step": step, key: value} for step, value in points]
        if lines:
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
    computed = report is None
    if report is None and source.data is not None and source.data.labels is not None:
        report = evaluate_classes(model, source.data, draws=1).to_json()
    if report is None:
        return [source.no_data("Classes")]
    with _reading(source.run / "classes.json"):
        return _class_blocks(_with_nan(report), source.data, computed or not source.given)


def _class_blocks(report: dict[str, Any], data: ImageData | None, of_data: bool) -> list[Block]:
    """of_data: the report is of the same source as the data, whose class names it takes."""
    matrix = torch.tensor(report["confusion"], dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError("the confusion matrix is not square")
    names: Sequence[object] = [f"class {c}" for c in range(len(matrix))]
    if of_data and data is not None and len(data.class_names or ()) == len(matrix):
        names = data.class_names or ()
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
    plot = Picture("Confusion and reliability", drawn(partial(write_classes, report)), plot=False)
    return [plot, Bars("Accuracy by class", rows, told)]


def _likelihood(source: Source) -> list[Block]:
    if source.likelihood is None:
        return [Missing("Likelihood", "this model has none in one pass")]
    if source.data is None:
        return [source.no_data("Likelihood")]
    found = evaluate(source.likelihood, source.data, draws=1, check_levels=0)
    finite = found.per_image[found.per_image.isfinite()]
    if not len(finite):
        return [Missing("Likelihood", "bits/dim is not finite for any image")]
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
        Picture("bits/dim over the images", drawn(partial(write_histogram, finite))),
        Tiles("Most and least likely images, bits/dim", rows, told),
    ]


def _audit(source: Source) -> list[Block]:
    if source.likelihood is None:
        return [Missing("Audit", "this model has no likelihood in one pass")]
    report = read_report(source.run, "audit.json")
    if report is None:
        if source.why:
            return [Missing("Audit", f"not measured; it needs the run's own images: {source.why}")]
        told = "not measured on the run's own images" if source.given else "not measured"
        return [Missing("Audit", told, source.command("nll", "--method", "audit"))]
    with _reading(source.run / "audit.json"):
        return _audit_blocks(_with_nan(report), source.audit_words)


def _audit_blocks(report: dict[str, Any], words: Words) -> list[Block]:
    rows = [
        (name, figure_text(report, key), told)
        for name, key, told in (
            ("single pass", "bits_per_dim", "unaudited"),
            ("single pass, normalised", "audited_bits_per_dim", "audited by log Z"),
            ("probability-flow ODE", "ode_bits_per_dim", f"{report['ode']['num_images']} images"),
            ("variational bound", "elbo_bits_per_dim", f"{(report['elbo'] or {}).get('num_images')} images"),
            ("log2 Z / d", "log_z_bits_per_dim", f"{report['log_z']['particles']} particles"),
        )
        if figure_text(report, key)
    ]
    plot = Picture("Audit by level", drawn(partial(write_audit, report)))
    return [Table("Audit", ("figure", "bits/dim", "from"), rows, words(report)), plot]


def _restoration(source: Source) -> list[Block]:
    kept = [
        _made(f"Restored: {path.stem.removeprefix('restored-')}", partial(_kept_picture, source.run, path))
        for path in sorted(source.run.glob("restored-*.png"))
    ]
    if isinstance(source.model, Classifier):
        return [Missing("Restoration", "a classifier restores nothing")]
    if source.data is None:
        return [*kept, source.no_data("Restoration")]
    made = [_made("Denoising without knowing the noise", partial(_denoised, source))]
    if source.likelihood is not None:
        half = "lower" if source.config.image.height > 1 else "right"
        made.append(_made(f"Filling in the {half} half", partial(_filled_in, source, source.likelihood)))
    return [*made, *kept]


def _kept_picture(run: Path, path: Path, title: str) -> Picture:
    return Picture(title, png_source(read_bytes(path, KEPT_LIMIT, run)), plot=False)


def _made(title: str, make: Callable[[str], Block]) -> Block:
    """The block, or what stands for it where it fails."""
    try:
        return make(title)
    except UserError as error:
        return Missing(title, str(error))


def _some_images(source: Source, data: ImageData, count: int) -> tuple[Tensor, Tensor]:
    """(pixels uint8, x in [-1, 1]) of `count` images."""
    generator = draw_generator(0, 0)
    images = data.take(choose(len(data), count, generator)).images
    x = dequantize(images, source.config.image.num_grey_levels, generator, source.config.data.pixels)
    return source.pixels(images), x.to(source.model.a.device)


def _denoised(source: Source, title: str) -> Tiles:
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
    return Tiles(title, rows, told)


def _filled_in(source: Source, model: CDM, title: str) -> Tiles:
    assert source.data is not None
    pixels, x = _some_images(source, source.data, RESTORED)
    known = _known_half(x[0])
    sigma = 1 / (source.config.image.num_grey_levels * 3**0.5)  # of rounding to grey levels
    steps = min(RESTORE_STEPS, model.schedule.T)
    rows = []
    for image, each in zip(pixels, x, strict=True):
        found = restore(model, Known(each, sigma, known), CANDIDATES, steps, sampler=MALA(moves=4))
        half = torch.where(known.cpu(), source.shown(each[None])[0].int(), 128).to(torch.uint8)
        tiles = [Tile(tile_source(image), "image"), Tile(tile_source(half), "known")]
        words = [f"{value:.0f} nats" for value in found.log_prob.tolist()]
        tiles += [
            Tile(tile_source(one), word) for one, word in zip(source.shown(found.images), words, strict=True)
        ]
        rows.append(("", tiles))
    told = f"The other half is drawn {CANDIDATES} times and ranked by log p; {steps} levels, 4 moves each."
    return Tiles(title, rows, told)


def _known_half(image: Tensor) -> Tensor:
    """(C,H,W) bool: True in the upper half, or in the left half of an image of one row."""
    known = torch.ones_like(image, dtype=torch.bool)
    axis = 1 if image.shape[1] > 1 else 2
    size = image.shape[axis]
    known.narrow(axis, size // 2, size - size // 2).fill_(False)
    return known


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
