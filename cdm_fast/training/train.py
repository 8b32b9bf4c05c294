"""Training runs: begin one, continue one, and never lose one.

Every random draw of step n is a function of (seed, n), so a resumed run takes the very steps that an
uninterrupted one would have taken.
"""

import contextlib
from pathlib import Path
from typing import Any

from cdm_fast.config import RunConfig, check
from cdm_fast.config.choices import Parallel
from cdm_fast.config.json import differences
from cdm_fast.data import ImageData
from cdm_fast.data.load import data_digest
from cdm_fast.errors import UserError
from cdm_fast.host.device import pick_device
from cdm_fast.host.distributed import from_main, lost_another
from cdm_fast.host.files import alone_in
from cdm_fast.host.processes import is_main, this_process
from cdm_fast.host.progress import to_stderr
from cdm_fast.runs.checkpoint import (
    create_run,
    load_checkpoint,
    make_ready,
    read_config,
    require_new,
    write_config,
)
from cdm_fast.runs.data import in_place, run_data
from cdm_fast.training.display import Display
from cdm_fast.training.feed import on_device
from cdm_fast.training.finetune import begin_from_run
from cdm_fast.training.log import open_sinks, require_extras
from cdm_fast.training.loop import SavesCheckpoints, Session, train_steps
from cdm_fast.training.prepare import check_parallel, own_randomness, resolve
from cdm_fast.training.report import update_loss_curves, write_final
from cdm_fast.training.saver import Saver
from cdm_fast.training.state import (
    TrainingState,
    from_checkpoint,
    new_state,
    require_trained_here,
    to_checkpoint,
)
from cdm_fast.training.stop import Stopper


def train(
    config: RunConfig,
    out: str | Path,
    *,
    max_time: float | None = None,
    device: str = "auto",
    parallel: Parallel = "ddp",
) -> dict[str, Any]:
    """Trains a new run into the directory `out` and returns its summary (see `_summary`).

    max_time: stop after so many seconds, with everything saved; device: "auto", "cpu", "cuda", ...;
    parallel: how processes that have joined (`distributed.joined`) share the work.
    Raises UserError for bad data or settings, before anything is written; when `out` exists; when the disk
    refuses; and when `max_bad_steps` steps in a row are not finite.
    """
    if is_main():
        require_new(out)
    config = in_place(config)
    require_extras(config)
    check_parallel(config, parallel)
    place = pick_device(device)
    with own_randomness(place):
        data = run_data(config, "train")
        config = from_main(resolve(config, data, place))
        validation = run_data(config, "validation").take(slice(config.output.evaluate_images))
        state = new_state(config, place)
        begin_from_run(config, state)
        state.data = data_digest(data)
        to_stderr(data.describe())
        if is_main():
            create_run(out, config, to_checkpoint(state, config))
        with alone_in(Path(out)):
            return _train(config, Path(out), state, data, validation, max_time, parallel)


def resume(
    run: str | Path,
    config: RunConfig | None = None,
    *,
    max_time: float | None = None,
    device: str = "auto",
    parallel: Parallel = "ddp",
) -> dict[str, Any]:
    """Continues a run from its newest intact checkpoint, exactly as if it had never stopped.

    config: the run's own, with another number of steps or other `output` settings if wanted.
    Raises UserError as `train` does, and when `config` changes anything that decides the numbers.
    """
    stored = read_config(run)
    config = in_place(config or stored)
    check(config)
    changed = differences(stored, config)
    if changed:
        raise UserError(f"--resume {run} cannot change {'; '.join(changed)}; train into another --out")
    require_extras(config)
    check_parallel(config, parallel)
    require_trained_here(load_checkpoint(run, parts=()), str(run))  # before its data are looked for
    place = pick_device(device)
    with alone_in(Path(run)), own_randomness(place):
        data = run_data(config, "train")
        if from_main(resolve(config, data, place)).image != config.image:
            raise UserError(f"--data {config.data.source} is not what {run} was trained on; give that data")
        validation = run_data(config, "validation").take(slice(config.output.evaluate_images))
        state = from_checkpoint(load_checkpoint(run), config, place, str(run))
        if state.data != data_digest(data):
            raise UserError(f"{config.data.source} has changed since {run} began; restore those images")
        if from_main(state.step) != state.step:
            raise UserError(f"{run} is another one on another machine; put it where all of them see it")
        if is_main():
            make_ready(Path(run), state.step)
        if config != stored:
            write_config(Path(run), config)
        return _train(config, Path(run), state, data, validation, max_time, parallel)


def _train(
    config: RunConfig,
    run: Path,
    state: TrainingState,
    data: ImageData,
    validation: ImageData,
    max_time: float | None,
    parallel: Parallel,
) -> dict[str, Any]:
    """Trains to the last step or until stopped, leaves everything on the disk, and returns the summary."""
    output = config.output
    with contextlib.ExitStack() as stack:
        sinks = stack.enter_context(open_sinks(run, config, state.step))
        writer = stack.enter_context(Saver(run, output.save_every, output.keep, state.step, sinks))
        saver: SavesCheckpoints = writer
        wrapped = None
        if this_process().count > 1:
            from cdm_fast.training.parallel import JointSaver, wrap  # takes a second to import

            wrapped = wrap(state, config, parallel)
            saver = JointSaver(writer, together=parallel == "fsdp")
        training = on_device(data, state.sums.device)
        session = Session(config, run, state, training, validation, sinks, saver, wrapped)
        stopper = stack.enter_context(Stopper(max_time))
        with Display(state.step, config.train.steps) as display:
            reason = train_steps(session, display, stopper)
            saver.finish(state.step, session.copy)
        stopper.all_saved = True
        return _finish(session, "finished" if state.step == config.train.steps else reason)


def _finish(session: Session, stopped: str | None) -> dict[str, Any]:
    """Final pictures and test score, cut short by a signal, whose sender waits; returns the summary."""
    model, run = session.state.ema.model, session.run
    try:
        update_loss_curves(run)
        score = {} if stopped == "signal" else write_final(model, session.config, session.validation, run)
    except (KeyboardInterrupt, RuntimeError) as error:
        # A signal may reach another process first, which is then gone; everything is saved.
        if isinstance(error, RuntimeError) and not lost_another(error):
            raise
        score, stopped = {}, "signal"
    return {**score, **_summary(session, stopped)}


def _summary(session: Session, stopped: str | None) -> dict[str, Any]:
    """run, step, steps, stopped, skipped_steps, seconds (of training) and images_per_second.

    `stopped` is "finished", "max_time" or "signal". Where the run was scored, the other keys of nll.json are
    returned beside these.
    """
    state, train = session.state, session.config.train
    return {
        "run": str(session.run),
        "step": state.step,
        "steps": train.steps,
        "stopped": stopped,
        "skipped_steps": int(state.bad[0]),
        "seconds": state.seconds,
        "images_per_second": state.step * train.batch_size / state.seconds if state.seconds else None,
    }
