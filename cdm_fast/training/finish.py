"""The end of a training run: its final pictures and scores, and its summary."""

import copy
from typing import Any

from cdm_fast.host.distributed import lost_peer
from cdm_fast.host.progress import to_stderr
from cdm_fast.model import CDM
from cdm_fast.runs.constants import put_constants, write_constants
from cdm_fast.runs.data import run_data
from cdm_fast.training.constants import refit_constants
from cdm_fast.training.loop import Session
from cdm_fast.training.report import update_loss_curves, write_final


def finish(session: Session, stopped: str | None) -> dict[str, Any]:
    """Writes the final pictures and test scores, unless a signal ended the run; returns the summary.

    A signal that arrives during this interrupts it; all checkpoints are on the disk already.

    Args:
        session: the session after its last step.
        stopped: as in `summary`.
    """
    model, run = session.state.ema.model, session.run
    try:
        update_loss_curves(run)
        if stopped == "finished" and session.config.output.constants_rows:
            model = with_constants(session)
        score = {} if stopped == "signal" else write_final(model, session.config, session.validation, run)
    except (KeyboardInterrupt, RuntimeError) as error:
        # If a signal ends another process first, this one fails in its next collective operation.
        if isinstance(error, RuntimeError) and not lost_peer(error):
            raise
        score, stopped = {}, "signal"
    return {**score, **summary(session, stopped)}


def with_constants(session: Session) -> Any:
    """A copy of the averaged model with refitted constants; writes them to RUN/constants.json."""
    config, model = session.config, copy.deepcopy(session.state.ema.model)
    if not isinstance(model, CDM):
        return model
    constants = refit_constants(
        model,
        run_data(config, "train"),
        config.output.constants_rows,
        flip=config.data.flip,
        null_class=config.train.label_dropout > 0,
        seed=config.train.seed,
        progress=to_stderr,
    )
    write_constants(session.run, constants)
    put_constants(model, constants)
    return model


def summary(session: Session, stopped: str | None) -> dict[str, Any]:
    """run, step, steps, stopped, skipped_steps, seconds (of training) and images_per_second.

    stopped: "finished", "max_time" or "signal". With `keep_best`, "best" is the directory of that checkpoint.
    """
    state, train = session.state, session.config.train
    kept = session.best is not None and session.best.folder.is_dir()
    best = {"best": str(session.best.folder)} if session.best is not None and kept else {}
    return {
        **best,
        "run": str(session.run),
        "step": state.step,
        "steps": train.steps,
        "stopped": stopped,
        "skipped_steps": int(state.bad[0]),
        "seconds": state.seconds,
        "images_per_second": state.step * train.batch_size / state.seconds if state.seconds else None,
    }
