"""The end of a training run: its final pictures and scores, and its summary."""

from typing import Any

from cdm_fast.host.distributed import lost_peer
from cdm_fast.training.loop import Session
from cdm_fast.training.report import update_loss_curves, write_final


def finish(session: Session, stopped: str | None) -> dict[str, Any]:
    """Writes the final pictures and test scores, unless a signal ended the run; returns the summary.

    A signal that arrives meanwhile cuts them short: all checkpoints are on the disk already.

    Args:
        session: after its last step.
        stopped: as in `summary`.
    """
    model, run = session.state.ema.model, session.run
    try:
        update_loss_curves(run)
        score = {} if stopped == "signal" else write_final(model, session.config, session.validation, run)
    except (KeyboardInterrupt, RuntimeError) as error:
        # Where a signal ends another process first, this one fails in its next collective operation.
        if isinstance(error, RuntimeError) and not lost_peer(error):
            raise
        score, stopped = {}, "signal"
    return {**score, **summary(session, stopped)}


def summary(session: Session, stopped: str | None) -> dict[str, Any]:
    """run, step, steps, stopped, skipped_steps, seconds (of training) and images_per_second.

    stopped: "finished", "max_time" or "signal".
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
