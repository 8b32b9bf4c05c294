"""Training runs: begin one, continue one, and never lose one.

Every random draw of step n is a function of (seed, n), so a resumed run takes the very steps that an
uninterrupted one would have taken.
"""

import contextlib
import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from cdm_fast.config import ImageShape, RunConfig, check
from cdm_fast.config.choices import Parallel
from cdm_fast.config.json import differences
from cdm_fast.data import ImageData
from cdm_fast.errors import DiskError, UserError
from cdm_fast.finetune import begin_from_run
from cdm_fast.host.device import pick_device, wait_for
from cdm_fast.host.distributed import agreed, from_main, lost_another
from cdm_fast.host.files import alone_in
from cdm_fast.host.processes import is_main, launched, this_process
from cdm_fast.likelihood import evaluate
from cdm_fast.model import CDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.report import write_final, write_loss_curves, write_samples
from cdm_fast.runlog import Display, Sink, open_sinks, require_extras
from cdm_fast.runs.build import head_rank, run_data
from cdm_fast.runs.checkpoint import (
    Checkpoint,
    create_run,
    load_checkpoint,
    make_ready,
    read_config,
    require_new,
    write_config,
)
from cdm_fast.saver import Saver
from cdm_fast.state import TrainingState, from_checkpoint, new_state, require_trained_here, to_checkpoint
from cdm_fast.step import (
    LossFunction,
    draw_batch,
    learning_rate,
    make_loss,
    seed_step,
    set_dropout,
    training_step,
)
from cdm_fast.stop import Stopper
from cdm_fast.tuning import compiled, pick_precision

if TYPE_CHECKING:
    from cdm_fast.parallel import JointSaver, Wrapped

SavesCheckpoints: TypeAlias = "Saver | JointSaver"


@dataclass(frozen=True)
class Session:
    """A run while it trains: what its steps, pictures and checkpoints are made from."""

    config: RunConfig
    run: Path
    state: TrainingState
    data: ImageData  # training images, on the state's device
    validation: ImageData  # the first `evaluate_images`
    sinks: list[Sink]
    saver: "SavesCheckpoints"
    wrapped: "Wrapped | None"  # among several processes

    def write(self, numbers: Mapping[str, float | int | str | None]) -> None:
        """Sends the numbers of the present step to every log."""
        for sink in self.sinks:
            sink.write(self.state.step, numbers)

    def copy(self) -> Checkpoint:
        """A checkpoint of the present step in host memory."""
        return to_checkpoint(self.state, self.config)


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
    config = config or stored
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


def begun(config: RunConfig, out: str | Path) -> RunConfig | None:
    """The config with which to resume `out`, if it holds the beginning of this very run; else None.

    torchrun starts its command again when a process has died, and so does a queue when a machine has.
    """
    if not (Path(out) / "config.json").is_file():
        return None
    stored = read_config(out)
    network, train = config.network, config.train
    told_by_machine = replace(
        config,
        image=stored.image,
        network=replace(
            network, head_rank=stored.network.head_rank if network.head_rank is None else network.head_rank
        ),
        train=replace(
            train, precision=stored.train.precision if train.precision == "auto" else train.precision
        ),
    )
    return None if differences(stored, told_by_machine) else told_by_machine


def resolve(config: RunConfig, data: ImageData, device: torch.device) -> RunConfig:
    """The config with what only data and device tell: image shape, classes, rank of the head, precision."""
    _, channels, height, width = data.images.shape
    if height != width:
        raise UserError(f"{data.name} holds {height}x{width} images; give --image-size to crop them square")
    image = ImageShape(height, channels, data.num_grey_levels, data.num_classes, class_counts(data))
    config = replace(config, image=image)
    check(config)
    if config.network.conditioning == "joint":
        config = replace(config, network=replace(config.network, head_rank=head_rank(config)))
    return replace(
        config,
        train=replace(config.train, precision=pick_precision(config, device)),
    )


def data_digest(data: ImageData) -> str:
    """A digest of the number of images, the labels, and 4096 images spread evenly over them."""
    spread = torch.linspace(0, len(data.images) - 1, min(len(data.images), 4096)).long()
    parts = [torch.tensor(data.images.shape), data.images[spread]]
    parts += [] if data.labels is None else [data.labels]
    return hashlib.blake2b(b"".join(part.numpy().tobytes() for part in parts), digest_size=16).hexdigest()


def check_parallel(config: RunConfig, parallel: Parallel) -> None:
    """UserError for a batch that the processes cannot share evenly, or settings that FSDP2 cannot serve."""
    train, count = config.train, this_process().count
    if count > 1 and train.batch_size % (train.accumulate * count):
        parts = f" and {train.accumulate} parts each (--accumulate)" if train.accumulate > 1 else ""
        raise UserError(
            f"--batch-size {train.batch_size} is that of all processes together, and {count}{parts} cannot"
            f" share it evenly; give a multiple of {count * train.accumulate}"
        )
    if parallel == "fsdp" and launched() is None:
        raise UserError(
            "--parallel fsdp splits a model over processes, and there is one; start with torchrun"
        )
    if parallel == "fsdp" and train.checkpoint_blocks:
        raise UserError("--parallel fsdp does not go with --checkpoint-blocks; leave one of them out")
    if parallel == "fsdp" and train.compile not in ("auto", "off"):
        raise UserError(f"--parallel fsdp does not go with --compile {train.compile}; give off")


def class_counts(data: ImageData) -> tuple[int, ...] | None:
    """Images of each class, (K,); None without labels."""
    if data.labels is None:
        return None
    return tuple(torch.bincount(data.labels, minlength=data.num_classes or 0).tolist())


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Keeps the caller's global generator, which dropout draws from and training seeds at each step."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


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
            from cdm_fast.parallel import JointSaver, wrap  # takes a second to import

            wrapped = wrap(state, config, parallel)
            saver = JointSaver(writer, together=parallel == "fsdp")
        training = on_device(data, state.sums.device)
        session = Session(config, run, state, training, validation, sinks, saver, wrapped)
        stopper = stack.enter_context(Stopper(max_time))
        with Display(state.step, config.train.steps) as display:
            reason = _loop(session, display, stopper)
            saver.finish(state.step, session.copy)
        stopper.all_saved = True
        return _finish(session, "finished" if state.step == config.train.steps else reason)


def on_device(data: ImageData, device: torch.device) -> ImageData:
    """Images and labels moved to the device."""
    labels = None if data.labels is None else data.labels.to(device)
    return replace(data, images=data.images.to(device), labels=labels)


def _loop(session: Session, display: Display, stopper: Stopper) -> str | None:
    """The training loop: steps, and at their intervals log lines, scores, pictures and checkpoints.

    Returns why it stopped before the last step, or None.
    """
    config, state, output = session.config, session.state, session.config.output
    plain_loss = make_loss(config.train)
    sharded = session.wrapped is not None and session.wrapped.sharded
    mode = "off" if sharded else config.train.compile  # what FSDP2 does between blocks fits in no graph
    loss_function = compiled(plain_loss, mode, state.sums.device)
    first, reason = state.step, None
    while state.step < config.train.steps and not (reason := agreed(stopper.reason)):
        began = time.perf_counter()
        take_step(state, session.data, config, loss_function, session.wrapped)
        last = state.step == config.train.steps
        at_log_line = last or state.step % output.log_every == 0
        shows = at_log_line or display.due()
        if shows or _results_due(session):
            wait_for(state.sums.device)  # or the time of steps that are only enqueued would be lost
        if at_log_line or state.sums.device.type == "cpu":  # elsewhere reading the counters stalls the device
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
    """The step that follows the state's, a function of the state and the config alone.

    wrapped: the model as several processes train it, each with its own part of the batch.
    """
    train = config.train
    seed_step(train.seed, state.step)
    set_dropout(state.model, config, state.step)
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
    """Says which step since the last log line was skipped, and where the loss jumped most."""
    if "skipped_step" in numbers:
        display.say(f"step {numbers['skipped_step']} skipped: its loss or gradient is not finite")
    if "spike_step" in numbers:
        display.say(
            f"the loss jumped to {numbers['spike_loss']:.4g} at step {numbers['spike_step']},"
            f" {numbers['spike_medians']:.1f} times the median of the steps before"
        )


def _results_due(session: Session) -> bool:
    """Whether something other than a step reads the device now: scores, pictures, or most saves."""
    output, step = session.config.output, session.state.step
    intervals = output.evaluate_every, output.sample_every, max(1, output.save_every // 2)
    return any(every and step % every == 0 for every in intervals)


def _intermediate_results(session: Session, display: Display) -> None:
    """Validation score and pictures, where their intervals end."""
    output, step = session.config.output, session.state.step
    scores, draws = (every and step % every == 0 for every in (output.evaluate_every, output.sample_every))
    if not (scores or draws):
        return
    model = session.state.ema.model
    if scores and isinstance(model, CDM):
        bits_per_dim = evaluate(model, session.validation, draws=1, check_levels=0).bits_per_dim
        session.write({"split": "validation", "bits_per_dim": bits_per_dim})
        display.say(f"step {step}: {bits_per_dim:.3f} bits/dim on validation images, unaudited")
    if draws:
        try:
            if not isinstance(model, Classifier):
                write_samples(model, session.config, session.run)
            _write_loss_curves(session.run)
        except DiskError as error:
            warnings.warn(f"{error}; training goes on without this picture", stacklevel=2)


def _finish(session: Session, stopped: str | None) -> dict[str, Any]:
    """Final pictures and test score, cut short by a signal, whose sender waits; returns the summary."""
    model, run = session.state.ema.model, session.run
    try:
        _write_loss_curves(run)
        score = {} if stopped == "signal" else write_final(model, session.config, session.validation, run)
    except (KeyboardInterrupt, RuntimeError) as error:
        # A signal may reach another process first, which is then gone; everything is saved.
        if isinstance(error, RuntimeError) and not lost_another(error):
            raise
        score, stopped = {}, "signal"
    return {**score, **_summary(session, stopped)}


def _write_loss_curves(run: Path) -> None:
    if is_main():  # the log that they are drawn from is its own
        write_loss_curves(run)


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
