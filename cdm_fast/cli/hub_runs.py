"""Runs of the hub on the command line: `hf:OWNER/NAME` in place of a run directory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cdm_fast.cli import arguments
from cdm_fast.errors import UserError
from cdm_fast.host.distributed import broadcast_from_main
from cdm_fast.host.hub import on_hub, parse_hub_name
from cdm_fast.host.processes import is_main
from cdm_fast.host.progress import to_stderr
from cdm_fast.runs.hub import fetch_run, require_run

# Commands that take other programs' models too, which may be on the hub.
FOREIGN = arguments.Sample | arguments.Nll | arguments.Classify | arguments.Score | arguments.Denoise


def with_local_runs(command: arguments.Command) -> arguments.Command:
    """The command with each run of the hub replaced by its run directory, runs/hf-OWNER-NAME-COMMIT.

    Commands write their results into that directory. Among several processes rank 0 fetches. Raises UserError
    for a repository that cannot be fetched, or that holds no run where one is needed.
    """
    if not _named_on_hub(command):
        return command
    return broadcast_from_main(_replaced(command) if is_main() else command)


def local_run(run: str | Path) -> Path:
    """`run` as a local run directory; a run of the hub is fetched first."""
    return require_run(run, folder=_folder(run)) if on_hub(run) else Path(run)


def resumable(run: Path) -> Path:
    """`run` unchanged; UserError for a run of the hub, which cannot be resumed."""
    if on_hub(run):
        raise UserError(
            f"--resume {run} is a run of the hub; give --finetune {run} to begin a new run from its weights"
        )
    return run


def _named_on_hub(command: Any) -> bool:
    values = [value for value in vars(command).values() if isinstance(value, str | Path | tuple)]
    if isinstance(command, arguments.Train):
        values.append(command.config.train.finetune or "")
    return any(on_hub(each) for value in values for each in (value if isinstance(value, tuple) else (value,)))


def _replaced(command: Any) -> Any:
    if isinstance(command, arguments.Train):
        return _train(command)
    changed: dict[str, Any] = {}
    for name, value in vars(command).items():
        if name == "run" and on_hub(value) and isinstance(command, FOREIGN):
            found = fetch_run(value, folder=_folder(value))
            changed[name] = value if found is None else _told(value, found)
        elif isinstance(value, Path) and on_hub(value) and name in ("run", "denoiser", "attack_from"):
            changed[name] = _told(value, local_run(value))
        elif name == "runs" and isinstance(value, tuple):
            changed[name] = tuple(_told(each, local_run(each)) if on_hub(each) else each for each in value)
    return replace(command, **changed)


def _train(command: arguments.Train) -> arguments.Train:
    source = command.config.train.finetune
    if source is None or not on_hub(source):
        return command
    settings = replace(command.config.train, finetune=str(local_run(source)))
    return replace(command, config=replace(command.config, train=settings))


def _folder(run: str | Path) -> Path:
    return Path("runs") / f"hf-{parse_hub_name(run).repo.replace('/', '-')}"


def _told(run: Path, folder: Path) -> Path:
    to_stderr(f"{run} is in {folder}")
    return folder
