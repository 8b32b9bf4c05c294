"""Dispatch: runs the command that was parsed."""

from collections.abc import Callable
from typing import Any

from cdm_fast.cli import arguments
from cdm_fast.cli.classify import classify_command
from cdm_fast.cli.data import data_command
from cdm_fast.cli.hub_runs import with_local_runs
from cdm_fast.cli.nll import calibrate_command, nll_command
from cdm_fast.cli.outcome import Outcome
from cdm_fast.cli.push import push_command
from cdm_fast.cli.report import report_command
from cdm_fast.cli.restore import denoise_command, restore_command
from cdm_fast.cli.sample import sample_command
from cdm_fast.cli.score import score_command
from cdm_fast.cli.tools import convert_command, doctor_command, plot_command, replay_command
from cdm_fast.cli.train import train_command
from cdm_fast.errors import UserError
from cdm_fast.host.distributed import process_group
from cdm_fast.host.processes import launched


def run(command: arguments.Command) -> Outcome:
    """Runs a parsed command; UserError for whatever the user can fix.

    Under torchrun the processes share the work, and each returns the outcome.
    """
    if isinstance(command, arguments.Shared):
        with process_group(command.device):
            return _COMMANDS[type(command)](with_local_runs(command))
    if launched() is not None:
        raise UserError(f"{type(command).__name__.lower()} runs in one process; start it without torchrun")
    return _COMMANDS[type(command)](with_local_runs(command))


_COMMANDS: dict[type, Callable[[Any], Outcome]] = {
    arguments.Train: train_command,
    arguments.Sample: sample_command,
    arguments.Nll: nll_command,
    arguments.Calibrate: calibrate_command,
    arguments.Classify: classify_command,
    arguments.Score: score_command,
    arguments.Denoise: denoise_command,
    arguments.Restore: restore_command,
    arguments.Plot: plot_command,
    arguments.Report: report_command,
    arguments.Replay: replay_command,
    arguments.Convert: convert_command,
    arguments.Push: push_command,
    arguments.Doctor: doctor_command,
    arguments.Data: data_command,
}
