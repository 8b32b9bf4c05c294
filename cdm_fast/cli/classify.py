"""`cdm-fast classify`: accuracy, calibration, corruptions and attacks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cdm_fast.cli import arguments
from cdm_fast.cli.arguments import Classify
from cdm_fast.cli.certify import certify_images, check_certify, select_images
from cdm_fast.cli.describe import describe_attack, describe_classes, describe_corruptions
from cdm_fast.cli.outcome import Outcome, Scored, scored_by
from cdm_fast.config import RunConfig
from cdm_fast.config.choices import AttackName
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.evaluation.attack_methods import check_attack, load_foolbox, needs_foolbox
from cdm_fast.evaluation.attacks import evaluate_attack
from cdm_fast.evaluation.class_scores import fitting_method, require_classes
from cdm_fast.evaluation.classification import ClassReport, evaluate_classes
from cdm_fast.evaluation.robustness import evaluate_corruptions
from cdm_fast.host.progress import to_stderr
from cdm_fast.model import CDM, Denoiser
from cdm_fast.model.classifier import Classifier
from cdm_fast.plots.evaluation import write_attack, write_classes, write_corruptions
from cdm_fast.runs.build import class_prior
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.load import load


def score_classes(command: Classify, config: RunConfig, model: Denoiser, data: ImageData) -> Scored:
    """The JSON values, the lines of text, and the columns of the per-image file.

    Draws RUN/classes.png and, if requested, pictures of corruptions, an attack, abstention and certificates.
    Raises UserError as in `evaluate_classes`, `evaluate_attack` and `evaluate_certificates`.
    """
    require_classes(model)
    if command.attack is not None:
        _check_attack(command, command.attack, config, model)
    check_certify(command, model, data)
    report = _evaluate(command, config, model, data)
    result = report.to_json()
    picture = write_classes(result, command.run / "classes.png")
    result["picture"] = str(picture)
    lines = [*describe_classes(report), str(picture)]
    if command.corruptions:
        corrupted = evaluate_corruptions(
            lambda images: _evaluate(command, config, model, images), data, to_stderr, command.seed
        )
        picture = write_corruptions(corrupted.accuracy, report.accuracy, command.run / "corruptions.png")
        result |= {**corrupted.to_json(), "corruptions_picture": str(picture)}
        lines += [*describe_corruptions(corrupted), str(picture)]
    if command.attack is not None:
        attacked, attack_lines = _attack(command, command.attack, model, data)
        result |= {"attack": attacked}
        lines += attack_lines
    columns = report.columns()
    for scored in (
        *([select_images(command, config, model, data, report)] if command.selective else ()),
        *([certify_images(command, model, data)] if command.certify else ()),
    ):
        result |= scored[0]
        lines += scored[1]
        columns |= scored[2]
    return result, lines, columns


def _check_attack(command: Classify, attack: AttackName, config: RunConfig, model: Denoiser) -> None:
    """UserError for an attack that cannot run, before any image is classified."""
    if command.level:
        raise UserError(f"--attack perturbs clean images: leave --level {command.level} out")
    if fitting_method(model, command.method) in ("denoising", "ode"):
        raise UserError(
            "--attack needs the gradient of logits: a run and --method joint, embedding or discriminative"
        )
    check_attack(attack, command.attack_norm, command.budgets, command.attack_steps)
    require_at_least("--attack-draws", command.attack_draws, 0)
    if command.attack_from is not None:
        _require_same_kind(command.attack_from, config)
    if needs_foolbox(attack):
        load_foolbox()


def _attack(
    command: Classify, attack: AttackName, model: Denoiser, data: ImageData
) -> tuple[dict[str, Any], list[str]]:
    """JSON values and lines of `--attack`; draws RUN/attack.png."""
    logits = _require_logits(model, command.run)
    report = evaluate_attack(
        logits,
        data,
        attack,
        command.attack_norm,
        command.budgets,
        steps=command.attack_steps,
        draws=command.attack_draws,
        surrogate=None if command.attack_from is None else _surrogate(command.attack_from, logits),
        false_alarms=command.false_alarms,
        num_images=command.attack_images,
        batch_size=command.batch_size,
        seed=command.seed,
        progress=to_stderr,
    )
    picture = write_attack(report.to_json(), command.run / "attack.png")
    return {**report.to_json(), "picture": str(picture)}, [*describe_attack(report), str(picture)]


def _require_same_kind(run: Path, config: RunConfig) -> None:
    """UserError unless `run` was trained on images and classes like those of `config`."""
    other, own = (replace(each.image, class_counts=None) for each in (read_config(run), config))
    if other != own:
        raise UserError(f"--attack-from {run} was trained on other images or classes; give a run on the same")


def _surrogate(run: Path, model: Denoiser) -> CDM | Classifier:
    """The model of --attack-from, on the device of the other."""
    return _require_logits(load(run).to(model.a.device), run)


def _require_logits(model: Denoiser | Classifier, run: Path) -> CDM | Classifier:
    """The model itself; UserError for one without logits."""
    if not isinstance(model, CDM | Classifier):
        raise UserError(f"{run} has no logits to attack; give a CDM or a classifier")
    return model


def _evaluate(command: Classify, config: RunConfig, model: Denoiser, data: ImageData) -> ClassReport:
    return evaluate_classes(
        model,
        data,
        command.method,
        num_images=command.images,
        draws=command.draws,
        level=command.level,
        trials=command.trials,
        tolerance=command.tolerance,
        probes=command.probes,
        batch_size=command.batch_size,
        seed=command.seed,
        class_prior=class_prior(config),
        progress=to_stderr,
    )


def classify_command(command: arguments.Classify) -> Outcome:
    """`cdm-fast classify`."""
    return scored_by(score_classes, command)
