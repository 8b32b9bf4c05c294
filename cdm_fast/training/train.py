"""`train` starts a run, `resume` continues one; both write everything to the run directory.

`prepare` does what comes before the first step, `loop` the steps, `finish` what comes after the last. Every
random draw of step n is a function of (seed, n), so a resumed run takes the same steps as an uninterrupted
one.
"""

import contextlib
from pathlib import Path
from typing import Any

from cdm_fast.config import RunConfig
from cdm_fast.config.choices import Parallel
from cdm_fast.host.device import pick_device
from cdm_fast.host.files import exclusive_lock
from cdm_fast.host.processes import is_main, this_process
from cdm_fast.runs.checkpoint import create_run, require_new
from cdm_fast.runs.data import in_place
from cdm_fast.training.best import BestCheckpoint
from cdm_fast.training.display import Display
from cdm_fast.training.feed import on_device
from cdm_fast.training.finish import finish
from cdm_fast.training.log import open_sinks, require_extras
from cdm_fast.training.loop import SavesCheckpoints, Session, train_steps
from cdm_fast.training.prepare import (
    Prepared,
    check_parallel,
    prepare_new,
    prepare_resumed,
    preserved_rng,
    resumed_config,
)
from cdm_fast.training.saver import Saver
from cdm_fast.training.state import to_checkpoint
from cdm_fast.training.stop import Stopper


def train(
    config: RunConfig,
    out: str | Path,
    *,
    max_time: float | None = None,
    device: str = "auto",
    parallel: Parallel = "ddp",
) -> dict[str, Any]:
    """Trains a new run into the directory `out` and returns its summary (`finish.summary`).

    If the finished run is scored, the summary also has the keys of its nll.json, accuracy and ECE.

    Args:
        config: config of the run; settings that depend on data and device are filled in (`prepare.resolve`).
        out: a directory that does not exist, or is empty.
        max_time: seconds after which to stop, with everything saved; no limit by default.
        device: "auto", "cpu", "cuda", ...
        parallel: how the processes of a `distributed.process_group` train together.

    Raises:
        UserError: invalid data or settings, or `out` exists (before anything is written); the disk is full;
            `max_bad_steps` steps in a row are not finite.

    Example:
        >>> import tempfile
        >>> from dataclasses import replace
        >>> import cdm_fast
        >>> from cdm_fast.config import NetworkConfig, OutputConfig, RunConfig, ScheduleConfig, TrainConfig
        >>> config = RunConfig(
        ...     schedule=ScheduleConfig(T=4),
        ...     network=NetworkConfig(multipliers=(1,), blocks_per_level=1, attention_resolutions=()),
        ...     train=TrainConfig(steps=2, batch_size=4, precision="fp32"),
        ...     output=OutputConfig(num_samples=1, sampling_steps=2, draws=1),
        ... )
        >>> folder = tempfile.TemporaryDirectory()
        >>> train(config, f"{folder.name}/run", max_time=0.0)["step"]  # stopped before the first step
        0
        >>> resume(f"{folder.name}/run", device="cpu")["step"]
        2
        >>> cdm_fast.load(f"{folder.name}/run").schedule.T
        4
        >>> folder.cleanup()
    """
    out = Path(out).expanduser()
    if is_main():
        require_new(out)
    config = in_place(config)
    require_extras(config)
    check_parallel(config, parallel)
    chosen = pick_device(device)
    with preserved_rng(chosen):
        prepared = prepare_new(config, chosen)
        if is_main():
            create_run(out, prepared.config, to_checkpoint(prepared.state, prepared.config))
        with exclusive_lock(out):
            return _train(prepared, out, max_time, parallel)


def resume(
    run: str | Path,
    config: RunConfig | None = None,
    *,
    max_time: float | None = None,
    device: str = "auto",
    parallel: Parallel = "ddp",
) -> dict[str, Any]:
    """Continues a run from its newest intact checkpoint, bitwise as if it had never been interrupted.

    Args:
        run: the run directory.
        config: by default the run's own; another number of steps and other `output` settings are allowed.
        max_time, device, parallel: as in `train`.

    Raises:
        UserError: as in `train`; `config` changes anything else, or has fewer steps than the run has taken;
            the data are not those of the run.
    """
    run = Path(run).expanduser()
    config, stored = resumed_config(run, config)
    require_extras(config)
    check_parallel(config, parallel)
    chosen = pick_device(device)
    with exclusive_lock(run), preserved_rng(chosen):
        prepared = prepare_resumed(run, config, stored, chosen)
        return _train(prepared, run, max_time, parallel)


def _train(prepared: Prepared, run: Path, max_time: float | None, parallel: Parallel) -> dict[str, Any]:
    """Trains to the last step or until stopped, leaves everything on the disk, and returns the summary."""
    config, state, output = prepared.config, prepared.state, prepared.config.output
    with contextlib.ExitStack() as stack:
        sinks = stack.enter_context(open_sinks(run, config, state.step))
        writer = stack.enter_context(Saver(run, output.save_every, output.keep, state.step, sinks))
        saver: SavesCheckpoints = writer
        wrapped = None
        if this_process().count > 1:
            from cdm_fast.training.parallel import JointSaver, wrap  # takes a second to import

            wrapped = wrap(state, config, parallel)
            saver = JointSaver(writer, together=parallel == "fsdp")
        training = on_device(prepared.data, state.sums.device)
        best = None if output.keep_best == "none" else BestCheckpoint(run, config)
        session = Session(config, run, state, training, prepared.validation, sinks, saver, wrapped, best)
        stopper = stack.enter_context(Stopper(max_time))
        with Display(state.step, config.train.steps) as display:
            reason = train_steps(session, display, stopper)
            saver.finish(state.step, session.copy)
        stopper.all_saved = True
        return finish(session, "finished" if state.step == config.train.steps else reason)
