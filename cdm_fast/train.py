"""Training runs: begin one, continue one, and never lose one.

Every random draw of step n is a function of (seed, n), so a resumed run takes the very steps that an
uninterrupted one would have taken.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cdm_fast.build import pick_device, pick_precision
from cdm_fast.checkpoint import (
    create_run,
    load_checkpoint,
    read_config,
    require_new,
    save_checkpoint,
    write_config,
)
from cdm_fast.config import ImageShape, RunConfig, check
from cdm_fast.config_json import differences
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError
from cdm_fast.likelihood import evaluate
from cdm_fast.model import CDM
from cdm_fast.report import first_images, run_data, write_final, write_loss_curves, write_samples
from cdm_fast.runlog import Display, Sink, open_sinks, require_extras
from cdm_fast.state import TrainingState, from_checkpoint, new_state, to_checkpoint
from cdm_fast.step import LossFunction, derived_seed, draw_batch, learning_rate, make_loss, training_step
from cdm_fast.stop import Stopper


def train(
    config: RunConfig,
    out: str | Path,
    *,
    max_time: float | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Trains a new run into the directory `out` and returns its summary (see `_finish`).

    max_time: stop after so many seconds, with everything saved; device: "auto", "cpu", "cuda", ...
    Raises UserError for bad data or settings, before anything is written; when `out` exists; when the disk
    refuses; and when `max_bad_steps` steps in a row are not finite.
    """
    require_new(out)
    require_extras(config)
    place = pick_device(device)
    with _own_randomness(place):
        data = run_data(config, "train")
        config = resolve(config, data, place)
        state = new_state(config, place)
        create_run(out, config, to_checkpoint(state, config))
        return _run(config, Path(out), state, data, max_time)


def resume(
    run: str | Path,
    config: RunConfig | None = None,
    *,
    max_time: float | None = None,
    device: str = "auto",
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
        raise UserError(
            f"--resume {run} cannot change {'; '.join(changed)}; leave it, or train anew into another --out"
        )
    require_extras(config)
    place = pick_device(device)
    with _own_randomness(place):
        data = run_data(config, "train")
        if resolve(config, data, place).image != config.image:
            raise UserError(f"--data {config.data.source} is not what {run} was trained on; give that data")
        state = from_checkpoint(load_checkpoint(run), config, place, str(run))
        if config != stored:
            write_config(Path(run), config)
        return _run(config, Path(run), state, data, max_time)


def resolve(config: RunConfig, data: ImageData, device: torch.device) -> RunConfig:
    """The config with what only data and device tell: image shape, number of classes, precision."""
    _, channels, height, width = data.images.shape
    if height != width:
        raise UserError(
            f"{data.name} holds images of {height}x{width}; give --image-size to crop them square"
        )
    config = replace(
        config,
        image=ImageShape(height, channels, data.num_grey_levels, data.num_classes),
        train=replace(config.train, precision=pick_precision(config.train.precision, device)),
    )
    check(config)
    return config


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Keeps the caller's global generator, which dropout draws from and training seeds at each step."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _run(
    config: RunConfig, run: Path, state: TrainingState, data: ImageData, max_time: float | None
) -> dict[str, Any]:
    """Trains to the last step or until stopped, leaves everything on the disk, and returns the summary."""
    validation = first_images(run_data(config, "validation"), config.output.evaluate_images)
    sinks = open_sinks(run, config, state.step)
    try:
        with Stopper(max_time) as stopper:
            with Display(state.step, config.train.steps) as display:
                _loop(config, run, state, data, validation, sinks, display, stopper)
            stopper.all_saved = True
            finished = state.step == config.train.steps
            stopped = "finished" if finished else stopper.reason
            return _finish(config, run, state, validation, stopped)
    finally:
        for sink in sinks:
            sink.close()


def _loop(
    config: RunConfig,
    run: Path,
    state: TrainingState,
    data: ImageData,
    validation: ImageData,
    sinks: list[Sink],
    display: Display,
    stopper: Stopper,
) -> None:
    """The training loop: steps, and at their intervals log lines, scores, pictures and checkpoints."""
    device = state.sums.device
    images = replace(
        data, images=data.images.to(device), labels=None if data.labels is None else data.labels.to(device)
    )
    loss_function, output, saved = make_loss(config.train), config.output, state.step
    while state.step < config.train.steps and not stopper.reason:
        began = time.perf_counter()
        _one_step(config, state, images, loss_function)
        last = state.step == config.train.steps
        at_log_line = last or state.step % output.log_every == 0
        if at_log_line or device.type == "cpu":  # elsewhere reading the counters would stall the device
            _stop_when_diverged(config, run, state)
        state.seconds += time.perf_counter() - began
        display.advance(state.step)
        if at_log_line or display.due():
            numbers = state.numbers(config)
            display.show(state.step, numbers)
            if at_log_line:
                display.line(state.step, numbers)
                _write_all(sinks, state.step, numbers)
                state.start_interval()
        _intermediate_results(config, run, state, validation, sinks, display)
        if last or state.step % output.save_every == 0:
            saved = _save(config, run, state)
    if saved != state.step:
        _save(config, run, state)


def _one_step(config: RunConfig, state: TrainingState, data: ImageData, loss_function: LossFunction) -> None:
    train, step = config.train, state.step
    torch.manual_seed(derived_seed(train.seed, step, "dropout"))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(train, step)
    result = training_step(
        state.model,
        state.optimizer,
        state.ema,
        draw_batch(data, state.model, config, step),
        loss_function,
        step=step,
        clip_norm=train.clip_norm,
        parts=train.accumulate,
        precision=train.precision,
    )
    state.record(result)


def _stop_when_diverged(config: RunConfig, run: Path, state: TrainingState) -> None:
    """Raises UserError once too many steps in a row were bad; names the (seed, step) to replay."""
    _, in_a_row, last = state.bad.tolist()
    if in_a_row >= config.train.max_bad_steps:
        raise UserError(
            f"{run}: {in_a_row} steps in a row without a finite loss and gradient, the last at"
            f" (seed {config.train.seed}, step {last}); train with a lower --lr or --precision fp32"
        )


def _intermediate_results(
    config: RunConfig,
    run: Path,
    state: TrainingState,
    validation: ImageData,
    sinks: list[Sink],
    display: Display,
) -> None:
    """Validation score and pictures, where their intervals end before the last step."""
    output, step, model = config.output, state.step, state.ema.model
    if step == config.train.steps:
        return
    if output.evaluate_every and step % output.evaluate_every == 0 and isinstance(model, CDM):
        bits_per_dim = evaluate(model, validation, draws=1, check_levels=0).bits_per_dim
        _write_all(sinks, step, {"split": "validation", "bits_per_dim": bits_per_dim})
        display.say(f"step {step}: {bits_per_dim:.3f} bits/dim on validation images, unaudited")
    if output.sample_every and step % output.sample_every == 0:
        write_samples(model, config, run)
        write_loss_curves(run)


def _write_all(sinks: list[Sink], step: int, numbers: Mapping[str, float | int | str | None]) -> None:
    for sink in sinks:
        sink.write(step, numbers)


def _save(config: RunConfig, run: Path, state: TrainingState) -> int:
    """Writes a checkpoint of this step; returns the step."""
    save_checkpoint(run, to_checkpoint(state, config), config.output.keep)
    return state.step


def _finish(
    config: RunConfig, run: Path, state: TrainingState, validation: ImageData, stopped: str | None
) -> dict[str, Any]:
    """Final pictures and test score, which a signal cuts short: whoever sent it waits.

    Returns the summary: run, step, steps, stopped ("finished", "max_time" or "signal"), skipped_steps,
    seconds (of training), images_per_second, and where scored the other keys of nll.json.
    """
    images = state.step * config.train.batch_size
    summary = {
        "run": str(run),
        "step": state.step,
        "steps": config.train.steps,
        "stopped": stopped,
        "skipped_steps": int(state.bad[0]),
        "seconds": state.seconds,
        "images_per_second": images / state.seconds if state.seconds else None,
    }
    try:
        write_loss_curves(run)
        score = write_final(state.ema.model, config, validation, run) if stopped != "signal" else {}
    except KeyboardInterrupt:
        return {**summary, "stopped": "signal"}
    return {**score, **summary}
