"""The training loop: steps, with log lines, validation, pictures and checkpoints at their intervals."""

import contextlib
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.errors import DiskError, UserError
from cdm_fast.host.device import wait_for
from cdm_fast.host.distributed import agree_on_stop
from cdm_fast.model.classifier import Classifier
from cdm_fast.runs.checkpoint import Checkpoint
from cdm_fast.training.best import BestCheckpoint
from cdm_fast.training.display import Display
from cdm_fast.training.log import Sink
from cdm_fast.training.report import update_loss_curves, write_level_checks, write_samples
from cdm_fast.training.saver import Saver
from cdm_fast.training.state import TrainingState, to_checkpoint
from cdm_fast.training.step import (
    LossFunction,
    begin_step,
    draw_batch,
    learning_rate,
    make_loss,
    training_step,
)
from cdm_fast.training.stop import Stopper
from cdm_fast.training.tuning import compiled
from cdm_fast.training.validation import validate

if TYPE_CHECKING:
    from cdm_fast.training.parallel import JointSaver, Wrapped


SavesCheckpoints: TypeAlias = "Saver | JointSaver"


@dataclass(frozen=True)
class Session:
    """A run during training: its config, state, data, and where results go."""

    config: RunConfig
    run: Path
    state: TrainingState
    data: ImageData  # training images, on the state's device
    validation: ImageData  # the first `evaluate_images`
    sinks: list[Sink]
    saver: "SavesCheckpoints"
    wrapped: "Wrapped | None"  # among several processes
    best: BestCheckpoint | None = None

    def write(self, numbers: Mapping[str, float | int | str | None]) -> None:
        """Writes numbers of the current step to every log."""
        for sink in self.sinks:
            sink.write(self.state.step, numbers)

    def copy(self) -> Checkpoint:
        """A checkpoint of the current step in host memory."""
        return to_checkpoint(self.state, self.config)


def train_steps(session: Session, display: Display, stopper: Stopper) -> str | None:
    """Trains to the last step, or until `stopper` reports a reason to stop; returns that reason, or None.

    Log lines, validation, pictures and checkpoints are made at the intervals of `config.output`.
    """
    config, state, output = session.config, session.state, session.config.output
    plain_loss = make_loss(config.train)
    sharded = session.wrapped is not None and session.wrapped.sharded
    mode = "off" if sharded else config.train.compile  # the communication of FSDP2 breaks graphs
    loss_function = compiled(plain_loss, mode, state.sums.device)
    first, reason = state.step, None
    while state.step < config.train.steps and not (reason := agree_on_stop(stopper.reason)):
        began = time.perf_counter()
        take_step(state, session.data, config, loss_function, session.wrapped)
        last = state.step == config.train.steps
        at_log_line = last or state.step % output.log_every == 0
        shows = at_log_line or display.due()
        if shows or _results_due(session):
            wait_for(state.sums.device)  # so that enqueued steps count as training time
        if at_log_line or state.sums.device.type == "cpu":  # on a GPU reading the counters stalls it
            _stop_when_diverged(session)
        seconds = time.perf_counter() - began
        state.seconds += seconds
        if loss_function is not plain_loss and state.step == first + 1:
            display.say(f"first step, with the compilation of the loss: {seconds:.0f} s")
        display.advance(state.step)
        if shows:
            numbers = state.numbers(config)
            display.show(state.step, numbers)
            if at_log_line:
                display.line(state.step, numbers)
                _tell_incidents(numbers, session, display)
                session.write(numbers)
                state.start_interval()
        if not last:
            _intermediate_results(session, display)
            session.saver.after_step(state.step, session.copy)
        elif session.best is not None:
            _validate(session, display)
    if reason == "signal":
        display.say(f"stopping: saving step {state.step} (Ctrl-C now leaves at once)")
    return reason


def take_step(
    state: TrainingState,
    data: ImageData,
    config: RunConfig,
    loss_function: LossFunction,
    wrapped: "Wrapped | None" = None,
) -> None:
    """Takes one training step; it depends on the state, the data and the config alone.

    Args:
        state: changed in place.
        data: training images on the state's device.
        loss_function: from `make_loss`.
        wrapped: the model wrapped by DDP or FSDP2, in a run of several processes.
    """
    train = config.train
    begin_step(state.model, config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(train, state.step)
    result = training_step(
        state.model,
        state.optimizer,
        state.ema,
        draw_batch(data, state.model, config, state.step),
        loss_function if wrapped is None else wrapped.loss(loss_function),
        step=state.step,
        clip_norm=train.clip_norm,
        parts=train.accumulate,
        precision=train.precision,
        keep_local=contextlib.nullcontext if wrapped is None else wrapped.keep_local,
    )
    state.record(result)


def _stop_when_diverged(session: Session) -> None:
    """Raises UserError once too many steps in a row were bad; names the (seed, step) to replay."""
    _, in_a_row, last = session.state.bad.tolist()
    train = session.config.train
    if in_a_row >= train.max_bad_steps:
        first, run = last - in_a_row + 1, session.run
        raise UserError(
            f"{run}: {in_a_row} steps in a row without a finite loss and gradient, (seed {train.seed}, step"
            f" {first}) to (seed {train.seed}, step {last}); train with a lower --lr or --precision fp32"
            f" (cdm-fast replay {run} --step {first} shows the first)"
        )


def _tell_incidents(numbers: Mapping[str, float | int], session: Session, display: Display) -> None:
    """Prints the last skipped step and the largest spike of the loss since the last log line."""
    if "skipped_step" in numbers:
        display.say(f"step {numbers['skipped_step']} skipped: its loss or gradient is not finite")
    if "spike_step" in numbers:
        display.say(
            f"the loss jumped to {numbers['spike_loss']:.4g} at step {numbers['spike_step']},"
            f" {numbers['spike_medians']:.1f} times the median of the steps before"
        )


def _results_due(session: Session) -> bool:
    """True if validation, pictures or a save may read from the device after this step."""
    output, step = session.config.output, session.state.step
    intervals = output.evaluate_every, output.sample_every, max(1, output.save_every // 2)
    return any(every and step % every == 0 for every in intervals)


def _intermediate_results(session: Session, display: Display) -> None:
    """Validation and pictures, if due at this step."""
    output, step = session.config.output, session.state.step
    if output.evaluate_every and step % output.evaluate_every == 0:
        _validate(session, display)
    if output.sample_every and step % output.sample_every == 0:
        _draw(session)


def _validate(session: Session, display: Display) -> None:
    """Logs the validation figures of the averaged model, and keeps its checkpoint if it is the best."""
    numbers = validate(session.state.ema.model, session.validation)
    if not numbers:
        return
    session.write({"split": "validation", **numbers})
    display.say(f"step {session.state.step}, validation: {describe_validation(numbers)}")
    if session.best is not None and session.best.offer(numbers, session.copy):
        display.say(f"step {session.state.step} is the best so far; kept in {session.best.folder}")


def describe_validation(numbers: Mapping[str, float]) -> str:
    """The figures of `validate` as one line."""
    parts = []
    if "bits_per_dim" in numbers:
        parts.append(f"{numbers['bits_per_dim']:.3f} bits/dim on validation images, unaudited")
        ratio, error = numbers["ratio_bits_per_dim"], numbers["ratio_bits_per_dim_stderr"]
        parts.append(f"ratio check {ratio:+.3f} +- {error:.3f}")
    if "class_ce" in numbers:
        parts.append(f"class CE {numbers['class_ce']:.3f}, accuracy {numbers['accuracy']:.1%}")
    return "; ".join(parts)


def _draw(session: Session) -> None:
    """Pictures of the averaged model; a full disk causes a warning."""
    model = session.state.ema.model
    try:
        if not isinstance(model, Classifier):
            write_samples(model, session.config, session.run)
        write_level_checks(model, session.validation, session.run)
        update_loss_curves(session.run)
    except DiskError as error:
        warnings.warn(f"{error}; training goes on without this picture", stacklevel=2)
