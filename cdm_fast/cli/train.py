"""`cdm-fast train`."""

from pathlib import Path
from typing import Any

from cdm_fast.cli import arguments
from cdm_fast.cli.describe import describe_accuracy, describe_score
from cdm_fast.cli.outcome import Outcome, without_arrays
from cdm_fast.data.copies import cached_in
from cdm_fast.errors import UserError
from cdm_fast.host.distributed import broadcast_from_main
from cdm_fast.host.processes import is_main, launched
from cdm_fast.host.progress import to_stderr
from cdm_fast.training.prepare import config_to_resume
from cdm_fast.training.train import resume, train


def train_command(command: arguments.Train) -> Outcome:
    """`cdm-fast train`."""
    if command.max_time is not None and not command.max_time >= 0:
        raise UserError(f"--max-time is {command.max_time}; give seconds, 0 or more")
    options: dict[str, Any] = {
        "max_time": command.max_time,
        "device": command.device,
        "parallel": command.parallel,
    }
    run, config, begins = command.resume, command.config, command.resume is None
    if run is None:
        source = config.train.finetune
        name = command.preset if source is None else f"{Path(source).name}-finetuned"
        run = command.out or Path("runs") / name
        again = broadcast_from_main(config_to_resume(config, run) if launched() and is_main() else None)
        if again is not None:
            to_stderr(f"{run} holds the beginning of this run: continuing it")
            config, begins = again, False
    with cached_in(command.cache):
        summary = train(config, run, **options) if begins else resume(run, config, **options)
    lines = [f"{summary['run']}: {_stopped(summary)} after {summary['seconds']:.0f} s of training"]
    lines += describe_score(summary) if "bits_per_dim" in summary else []
    lines += [describe_accuracy(summary)] if "accuracy" in summary else []
    return Outcome(without_arrays(summary), lines)


def _stopped(summary: dict[str, Any]) -> str:
    progress = f"step {summary['step']} of {summary['steps']}"
    if summary["stopped"] == "finished":
        return f"finished, {progress},"
    cause = {"signal": "a signal", "max_time": "--max-time"}[summary["stopped"]]
    return f"stopped by {cause} at {progress} (cdm-fast train --resume {summary['run']} continues)"
