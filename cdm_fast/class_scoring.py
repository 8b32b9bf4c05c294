"""`cdm-fast classify`: from parsed arguments to what is told."""

import sys
from typing import Any

from torch import Tensor

from cdm_fast.arguments import Classify
from cdm_fast.build import class_prior
from cdm_fast.classify import ClassReport, describe_classes, evaluate_classes
from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.model import CDM, DDM
from cdm_fast.plots import write_classes, write_corruptions
from cdm_fast.robustness import describe_corruptions, evaluate_corruptions

Scored = tuple[dict[str, Any], list[str], dict[str, tuple[Tensor, Tensor]]]  # JSON, lines, columns per image


def score_classes(command: Classify, config: RunConfig, model: CDM | DDM, data: ImageData) -> Scored:
    """The JSON values, the lines for a person, and the columns of the per-image file.

    Draws RUN/classes.png and, if asked for, RUN/corruptions.png. Raises UserError as `evaluate_classes` does.
    """
    report = _evaluate(command, config, model, data)
    result = report.to_json()
    picture = write_classes(result, command.run / "classes.png")
    result["picture"] = str(picture)
    lines = [*describe_classes(report), str(picture)]
    if command.corruptions:
        corrupted = evaluate_corruptions(
            lambda images: _evaluate(command, config, model, images), data, _progress, command.seed
        )
        picture = write_corruptions(corrupted.accuracy, report.accuracy, command.run / "corruptions.png")
        result |= {**corrupted.to_json(), "corruptions_picture": str(picture)}
        lines += [*describe_corruptions(corrupted), str(picture)]
    return result, lines, report.columns()


def _evaluate(command: Classify, config: RunConfig, model: CDM | DDM, data: ImageData) -> ClassReport:
    return evaluate_classes(
        model,
        data,
        command.method,
        num_images=command.images,
        draws=command.draws,
        trials=command.trials,
        tolerance=command.tolerance,
        probes=command.probes,
        batch_size=command.batch_size,
        seed=command.seed,
        class_prior=class_prior(config),
        progress=_progress,
    )


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
