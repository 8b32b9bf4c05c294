"""The card of a published run: README.md of its repository, made from the files that are published.

Its last line has the digest of what stands between the metadata and that line, so the next push can tell
whether somebody has edited the card since.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cdm_fast.config import RunConfig
from cdm_fast.runs.build import build_model
from cdm_fast.runs.checkpoint import checkpoint_folders
from cdm_fast.runs.reports import figure_text, read_report

_PICTURES = {
    "samples.png": "Samples",
    "loss.png": "Loss curves",
    "confusion.png": "Mean level posterior by true level",
    "calibration.png": "Calibration of the level posteriors",
    "classes.png": "Confusion of classes, and reliability",
    "audit.png": "Audit of the likelihood",
}
_KINDS = {
    "cdm": "A Classification Diffusion Model: a classifier of noise levels that draws images and gives"
    " `log p(x)` from one forward pass (arXiv 2402.10095)",
    "ddm": "A plain denoising diffusion model",
    "classifier": "A classifier of images",
}


_METADATA = re.compile(r"---\r?\n.*?^---\s*$", re.DOTALL | re.MULTILINE)
_SEAL = re.compile(r"<!-- cdm-fast push: (\w+) -->\s*$")


def write_card(
    folder: Path,  # as `hub.stage_run` fills it
    config: RunConfig,
    repo: str,  # OWNER/NAME
    title: str,
    before: str | None = None,  # the card that it replaces
) -> str:
    """The text of the card: metadata, description, how to load the run, training, figures, limits, files.

    Metadata of `before` that a run does not tell, such as a licence, are kept.
    """
    text = "\n\n".join(_sections(folder, config, repo, title))
    return f"{_metadata(config, folder, repo, before)}\n\n{text}\n\n<!-- cdm-fast push: {_digest(text)} -->\n"


def is_edited(card: str) -> bool:
    """Whether a card has text that `write_card` did not write (besides metadata), or unreadable metadata."""
    if _added(card) is None:
        return True
    text = _METADATA.sub("", card, count=1) if card.startswith("---") else card
    seal = _SEAL.search(text)
    return bool(text.strip()) and (seal is None or _digest(text[: seal.start()]) != seal[1])


def _digest(text: str) -> str:
    """Of the text without blanks at the ends of lines, which editors remove."""
    lines = (line.rstrip() for line in text.strip().splitlines())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sections(folder: Path, config: RunConfig, repo: str, title: str) -> list[str]:
    return [
        f"# {title}",
        _what(config),
        *([] if not (folder / "samples.png").is_file() else ["![Samples](samples.png)"]),
        "## How to load it",
        _loading(config, repo),
        "## How it was trained",
        _table(("setting", "value"), _training(config, folder)),
        "## Figures",
        _figures(folder),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(config, folder)),
        "## Files",
        "\n".join(f"- {line}" for line in _files(folder)),
    ]


def _metadata(config: RunConfig, folder: Path, repo: str, before: str | None) -> str:
    """YAML metadata of the hub: library, task, tags, data set, the test figures, and what `before` adds."""
    from huggingface_hub import EvalResult, ModelCardData

    objective = config.train.objective
    task = "image-classification" if objective == "classifier" else "unconditional-image-generation"
    source = config.data.source
    data = source.removeprefix("hf:") if source.startswith("hf:") and "/" in source else None
    values = [
        (kind, value, report)
        for name, kind, key in (
            ("nll.json", "bits_per_dim", "bits_per_dim"),
            ("classes.json", "accuracy", "accuracy"),
        )
        if (report := read_report(folder, name)) is not None
        if isinstance(value := report.get(key), int | float)
    ]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data or source,
            dataset_name=str(report.get("data", source)),
            dataset_split=str(report.get("split", "test")),
            metric_type=kind,
            metric_value=value,
        )
        for kind, value, report in values
    ]
    card = ModelCardData(
        library_name="cdm_fast",
        pipeline_tag=task,
        tags=[
            "cdm_fast",
            "diffusion",
            "density-estimation",
            *(["arxiv:2402.10095"] if objective == "cdm" else []),
        ],
        datasets=None if data is None else [data],
        model_name=repo.partition("/")[2] if results else None,
        eval_results=results or None,
    )
    for key, value in (_added(before) or {}).items():
        if card.get(key) is None and key not in ("datasets", "model-index"):
            card[key] = value
    return f"---\n{card.to_yaml()}\n---"


def _added(card: str | None) -> dict[str, Any] | None:
    """The metadata of a card; None if they cannot be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # type: ignore[import-untyped]

    if card is None:
        return {}
    try:
        return dict(ModelCard(card, ignore_metadata_errors=True).data.to_dict())
    except (YAMLError, ValueError, TypeError):
        return None


def _what(config: RunConfig) -> str:
    image, conditioning = config.image, config.network.conditioning
    kind = (
        f"{image.height}x{image.width} images of {_count(image.channels, 'channel')} and"
        f" {image.num_grey_levels} grey levels"
    )
    classes = {
        "none": "It was trained without classes.",
        "embedding": f"Its network is given one of {image.num_classes} classes, or none.",
        "joint": f"One pass gives the likelihood under each of {image.num_classes} classes: it classifies.",
    }[conditioning if config.train.objective != "classifier" else "none"]
    if config.train.objective == "classifier":
        classes = f"It tells {image.num_classes} classes apart."
    return f"{_KINDS[config.train.objective]} for {kind} ({_source(config)}). {classes} Trained by cdm_fast."


def _source(config: RunConfig) -> str:
    return "scikit-learn's digits" if config.data.source == "digits" else f"data `{config.data.source}`"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _loading(config: RunConfig, repo: str) -> str:
    run, image = f"hf:{repo}", config.image
    x = f"torch.rand(4, {image.channels}, {image.height}, {image.width}) * 2 - 1  # images in [-1, 1]"
    if config.train.objective == "classifier":
        uses = ["model.log_class_posterior(x)  # (4, K) nats"]
        commands = [f"cdm-fast classify {run} --data DATA"]
    else:
        uses = ['images = sample(model, 16, sampler="ddim", steps=50)']
        commands = [f"cdm-fast sample {run} --num 16 --out samples.png"]
    if config.train.objective == "cdm":
        uses.append("log_p = model.log_prob(x)  # (4,) nats, from one pass")
        commands.append(f"cdm-fast nll {run} --data DATA")
    if config.train.objective == "cdm" and config.network.conditioning == "joint":
        uses.append("posterior = model.log_class_posterior(x).exp()  # (4, K)")
    names = "load" if config.train.objective == "classifier" else "load, sample"
    code = ["import torch", f"from cdm_fast import {names}", "", f'model = load("{run}")', f"x = {x}", *uses]
    return (
        "    pip install 'cdm_fast[hub]'\n\n"
        f"```python\n{chr(10).join(code)}\n```\n\n"
        "On the command line it stands for a run directory:\n\n    " + "\n    ".join(commands)
    )


def _training(config: RunConfig, folder: Path) -> Iterator[tuple[str, str]]:
    network, train, schedule = config.network, config.train, config.schedule
    (newest, *_) = checkpoint_folders(folder)
    state = read_report(newest, "state.json") or {}
    parameters = sum(weight.numel() for weight in build_model(config).parameters())
    counts = config.image.class_counts
    yield "data", _source(config) + ("" if counts is None else f", {sum(counts):,} training images")
    yield (
        "network",
        f"{network.architecture}, {parameters:,} parameters, conditioning: {network.conditioning}",
    )
    yield "noise", f"{schedule.schedule} schedule, T = {schedule.T}, levels {schedule.level_distribution}"
    yield "steps", f"{state.get('step', train.steps):,} of {train.steps:,}, batches of {train.batch_size}"
    yield (
        "optimizer",
        f"{train.optimizer}, learning rate {train.lr:g}, decay of the average {train.ema_decay:g},"
        f" {train.precision}",
    )
    if train.finetune is not None:
        yield "began from", f"the run `{train.finetune}`"
    if isinstance(seconds := state.get("seconds"), int | float):
        yield "time", f"{seconds:,.0f} s of training, torch {state.get('torch', 'unknown')}"
    yield "seed", f"{train.seed}"


def _figures(folder: Path) -> str:
    rows = [*_likelihoods(folder), *_accuracies(folder)]
    if not rows:
        return "This run keeps no scores; `cdm-fast nll` and `cdm-fast classify` measure them."
    return _table(("figure", "value", "protocol", "file"), rows)


def _likelihoods(folder: Path) -> Iterator[tuple[str, ...]]:
    report = read_report(folder, "nll.json")
    if report is not None and report.get("bits_per_dim") is not None:
        protocol = (
            f"{report.get('num_images')} {report.get('split')} images of {report.get('data')}, level"
            f" {report.get('level')}, {report.get('draws')} draws, {report.get('protocol')}, single pass,"
            " unaudited"
        )
        yield "bits/dim", figure_text(report, "bits_per_dim"), protocol, "[nll.json](nll.json)"
    audit = read_report(folder, "audit.json")
    for name, key in (("audited", "audited"), ("ODE", "ode"), ("variational bound", "elbo")):
        if audit is not None and audit.get(f"{key}_bits_per_dim") is not None:
            images = (audit.get(key) or audit).get("num_images")
            protocol = f"{images} {audit.get('split')} images of {audit.get('data')}, {_AUDIT[key]}"
            yield (
                f"bits/dim, {name}",
                figure_text(audit, f"{key}_bits_per_dim"),
                protocol,
                "[audit.json](audit.json)",
            )


_AUDIT = {
    "audited": "single pass with its density normalised by log Z",
    "ode": "probability-flow ODE",
    "elbo": "bound over all levels",
}


def _accuracies(folder: Path) -> Iterator[tuple[str, ...]]:
    report = read_report(folder, "classes.json")
    if report is None or report.get("accuracy") is None:
        return
    protocol = (
        f"{report.get('num_images')} {report.get('split')} images of {report.get('data')}, method"
        f" {report.get('method')}, level {report.get('level')}, {report.get('draws')} draws"
    )
    file = "[classes.json](classes.json)"
    yield "accuracy", figure_text(report, "accuracy", 100, " %"), protocol, file
    if error := figure_text(report, "ece", 100, " %"):
        yield "calibration error (ECE)", error, protocol, file


def _limits(config: RunConfig, folder: Path) -> Iterator[str]:
    image = config.image
    yield (
        f"It takes {image.height}x{image.width} images like those it was trained on; for others its numbers"
        " mean little."
    )
    if config.train.objective == "cdm":
        if not (folder / "audit.json").is_file():
            yield (
                "Likelihoods of a single pass are those of a density that need not integrate to one, and no"
                " audit stands beside them: `cdm-fast nll RUN --method audit` adds ODE, bound and log Z."
            )
        if (folder / "calibration.json").is_file():
            yield "Its likelihoods are calibrated: `load` subtracts the log Z in calibration.json by level."
        yield "A high likelihood does not mean that an image is typical: smooth images score high."
    yield "This card states no licence for the training data or the weights; ask the owner."


def _files(folder: Path) -> Iterator[str]:
    yield "[config.json](config.json): every setting"
    (newest, *_) = checkpoint_folders(folder)
    for path in sorted(newest.glob("*.safetensors")):
        what = {"ema": "averaged weights", "model": "raw weights", "optimizer": "optimizer state"}[path.stem]
        place = path.relative_to(folder).as_posix()
        yield f"[{place}]({place}): {what}"
    for name, title in _PICTURES.items():
        if (folder / name).is_file():
            yield f"[{name}]({name}): {title[0].lower()}{title[1:]}"
    for path in sorted(folder.glob("*.json")):
        if path.name != "config.json":
            yield f"[{path.name}]({path.name})"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)
