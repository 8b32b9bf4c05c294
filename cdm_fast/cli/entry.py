"""The command line: parses, runs a command, and prints its result. Nothing here imports torch.

Exit status: 0; 2 for anything that the user can fix (one line on standard error); 130 for a Ctrl-C that the
command did not handle; 141 if the reader of standard output has gone.
"""

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TextIO, Union

import tyro
from tyro.conf import subcommand

from cdm_fast.cli.arguments import (
    Calibrate,
    Classify,
    Command,
    Convert,
    Data,
    Denoise,
    Doctor,
    Nll,
    Plot,
    Push,
    Replay,
    Report,
    Restore,
    Sample,
    Score,
    Train,
)
from cdm_fast.cli.help import registry
from cdm_fast.cli.interrupt import INTERRUPTED, interruptible
from cdm_fast.cli.streams import Lossy, OutputGone, open_standard_streams, writing_result
from cdm_fast.config import preset
from cdm_fast.config.json import finite
from cdm_fast.errors import UserError
from cdm_fast.host.allocator import keep_freed_memory
from cdm_fast.host.processes import launched, starts_again


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments describe; invalid arguments raise a UserError of one line.

    `--help` prints and exits. The defaults of `train` come from `--preset`, or from the run of `--resume` or
    `--finetune`. `~` at the beginning of a path is the user's home.
    """
    train = _train_defaults(arguments) if arguments[:1] == ["train"] else Train()
    commands: Any = Union[  # noqa: UP007  (built at run time)
        Annotated[Train, subcommand("train", default=train)],
        Annotated[Sample, subcommand("sample")],
        Annotated[Nll, subcommand("nll")],
        Annotated[Calibrate, subcommand("calibrate")],
        Annotated[Classify, subcommand("classify")],
        Annotated[Score, subcommand("score")],
        Annotated[Denoise, subcommand("denoise")],
        Annotated[Restore, subcommand("restore")],
        Annotated[Plot, subcommand("plot")],
        Annotated[Report, subcommand("report")],
        Annotated[Replay, subcommand("replay")],
        Annotated[Convert, subcommand("convert")],
        Annotated[Push, subcommand("push")],
        Annotated[Doctor, subcommand("doctor")],
        Annotated[Data, subcommand("data")],
    ]
    markers = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.PositionalMetavarFromFieldName,
    )
    complaint = io.StringIO()
    try:
        with writing_result(), contextlib.redirect_stderr(complaint), registry:
            command = tyro.cli(commands, prog="cdm-fast", args=list(arguments), config=markers)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue())) from None
    return _at_home(command)


def _at_home(command: Command) -> Command:
    """The command with `~` expanded in every path."""
    paths = {each.name: _expanded(getattr(command, each.name)) for each in fields(command)}
    if isinstance(command, Train) and (source := command.config.train.finetune) is not None:
        settings = replace(command.config.train, finetune=str(_home(source)))
        paths["config"] = replace(command.config, train=settings)
    return replace(command, **paths)


def _expanded(value: Any) -> Any:
    """A path, or a tuple of paths, with `~` expanded; any other value unchanged."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return _home(value) if isinstance(value, Path) else value


def _home(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~NAME of a user who does not exist
        raise UserError(f"{path}: {error}; give the path in full") from None


def _train_defaults(arguments: Sequence[str]) -> Train:
    """The defaults of `train`, before its flags are read."""
    name, run = _value_of("--preset", arguments), _value_of("--resume", arguments)
    source = _value_of("--finetune", arguments)
    if run is None and source is not None:
        return _finetune_defaults(name, source)
    if run is None:
        return Train(config=preset(name or Train.preset))
    for flag in ("--preset", "--out", "--finetune"):
        if _value_of(flag, arguments) is not None:
            raise UserError(f"{flag} starts a new run and --resume {run} continues one; give only one")
    from cdm_fast.cli.hub_runs import resumable  # imports torch
    from cdm_fast.runs.checkpoint import read_config

    return Train(resume=Path(run), config=read_config(resumable(_home(run))))


def _finetune_defaults(name: str | None, source: str) -> Train:
    """`train --finetune`: the settings of that run, whose network and levels the new one keeps."""
    if name is not None:
        raise UserError(f"--preset {name}: network and settings come from --finetune {source}; leave it out")
    from cdm_fast.cli.hub_runs import local_run  # imports torch
    from cdm_fast.runs.checkpoint import read_config

    config = read_config(local_run(_home(source)))
    return Train(config=replace(config, train=replace(config.train, finetune=source)))


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of `flag`, given as `--flag value` or `--flag=value`; None without it."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
        if argument == flag and position + 1 < len(arguments):
            return arguments[position + 1]
    return None


_FRAME = "╭╮╰╯│"  # of the boxes in which tyro draws its errors
_RULES = ({"─"}, {"-"})  # what the lines between their sections consist of, the second in an ASCII locale
_FOOTERS = ("For full helptext", "Argument helptext", "Perhaps you meant")


def _one_line(boxed: str) -> str:
    """tyro's error box as one line."""
    inside = [line.strip(_FRAME + " ") for line in boxed.splitlines()[1:]]
    sections = " ".join("\n" if set(line) in _RULES else line for line in inside if line).split("\n")
    kept = [text for section in sections if (text := section.strip()) and not text.startswith(_FOOTERS)]
    return f"{'; '.join(kept).rstrip('.')}; see cdm-fast --help"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    With `--json` standard output is exactly one JSON object, {"error": ...} if the command failed; everything
    else, including the output of libraries, goes to standard error. Among several processes only rank 0
    prints, and among several restarts by torchrun only the last.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    process = launched()
    if process is None or process.rank == 0:
        with contextlib.redirect_stderr(Lossy(sys.stderr)):
            return _run(arguments)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        command = parse(arguments)
        with contextlib.redirect_stdout(sys.stderr), _warnings_of_one_line():
            from cdm_fast.cli.commands import run  # imports torch

            interruptible()
            keep_freed_memory()
            outcome = run(command)
        with writing_result():
            print(json.dumps(finite(outcome.result)) if as_json else "\n".join(outcome.lines))
        return 0
    except UserError as error:
        return _refuse(str(error), as_json)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _refuse(f"out of memory ({str(error)[:200]}); give a smaller --batch-size", as_json)
    except OutputGone as gone:
        return gone.status
    except KeyboardInterrupt:
        return INTERRUPTED


def _refuse(message: str, as_json: bool) -> int:
    """Prints an error that the user can fix, on one line; returns the exit status."""
    line = " ".join(message.split())
    print(f"cdm-fast: error: {line}", file=sys.stderr)
    if as_json and not starts_again():
        with contextlib.suppress(OutputGone, UserError), writing_result():
            print(json.dumps({"error": line}))
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    """True for the errors of Python, of accelerators (torch.OutOfMemoryError) and of PyTorch on CPUs."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Warnings on standard error as `cdm-fast: warning: MESSAGE`, one line each."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"cdm-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
