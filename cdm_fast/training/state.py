"""The state of a training run, and its conversion to and from checkpoints."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.config.json import differences, fixed_part, from_json
from cdm_fast.errors import UserError
from cdm_fast.model import CDM, DDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.nn.trunk import Trunk
from cdm_fast.runs.build import build_model
from cdm_fast.runs.checkpoint import Checkpoint
from cdm_fast.runs.weights import (
    require_network,
    restore_optimizer,
    restore_weights,
    snapshot,
    snapshot_optimizer,
)
from cdm_fast.training.ema import Ema
from cdm_fast.training.step import StepResult, derived_seed, learning_rate, make_optimizer

RECENT = 64  # number of good steps in the running median of the loss
SPIKE = 3.0  # a loss above this many running medians is a spike


@dataclass
class TrainingState:
    """Everything that changes while a run trains; a checkpoint holds all of it."""

    model: CDM | DDM | Classifier
    ema: Ema
    optimizer: torch.optim.Optimizer
    sums: Tensor  # (5,) float64 since the last log line: sums of loss, ce, mse, grad_norm; good steps
    bad: Tensor  # (3,) int64: number of bad steps; number of the latest ones in a row; the last one
    recent: Tensor  # (RECENT,) float32: the last losses; infinite if there is none yet
    spikes: Tensor  # (4,) float64: count; for the worst since the last log line: medians, loss, step
    step: int = 0
    seconds: float = 0.0  # training time, without pictures and scores
    logged_step: int = 0
    logged_seconds: float = 0.0
    data: str = ""  # digest of the training images

    def record(self, result: StepResult) -> None:
        """Adds the result of a step to the counters, on the device."""
        values = torch.stack([*result[:4], torch.ones_like(result.loss)]).double()
        self.sums += torch.where(result.bad > 0, 0.0, values)
        is_bad = result.bad.long()
        total, row, last = self.bad.unbind()
        self.bad = torch.stack([total + is_bad, (row + 1) * is_bad, torch.where(is_bad > 0, self.step, last)])
        self._watch(result.loss, result.bad > 0)
        self.step += 1

    def _watch(self, loss: Tensor, bad: Tensor) -> None:
        """Compares a good step's loss with the running median, once this has `RECENT / 2` losses."""
        height = loss / self.recent.median()  # 0 while the median is infinite
        spike = (height > SPIKE) & ~bad
        total, worst, *_ = self.spikes.unbind()
        seen = torch.stack([height, loss, torch.full_like(loss, self.step, dtype=torch.float64)])
        kept = torch.where(spike & (height > worst), seen, self.spikes[1:])
        self.spikes = torch.cat([(total + spike).unsqueeze(0), kept])
        slot = self.step % RECENT
        self.recent[slot] = torch.where(bad, self.recent[slot], loss)

    def numbers(self, config: RunConfig) -> dict[str, float | int]:
        """Means since the last log line and counters, for the log; waits for the device."""
        *sums, count = self.sums.tolist()
        loss, ce, mse, grad_norm = (value / count if count else math.nan for value in sums)
        images = (self.step - self.logged_step) * config.train.batch_size
        seconds = self.seconds - self.logged_seconds
        numbers: dict[str, float | int] = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": learning_rate(config.train, max(self.step - 1, 0)),
            "skipped_steps": int(self.bad[0]),
            "loss_spikes": int(self.spikes[0]),
            "images_per_second": images / seconds if seconds > 0 else math.nan,
            "seconds": self.seconds,
        }
        terms = {"cdm": {"ce": ce, "mse": mse}, "ddm": {"mse": mse}, "classifier": {"ce": ce}}
        return terms[config.train.objective] | numbers | self._incidents()

    def _incidents(self) -> dict[str, float | int]:
        """The last skipped step and the worst spike of the loss since the last log line."""
        last_bad, (_, height, loss, step) = int(self.bad[2]), self.spikes.tolist()
        skipped = {"skipped_step": last_bad} if last_bad >= self.logged_step else {}
        spike = {"spike_step": int(step), "spike_loss": loss, "spike_medians": height} if height else {}
        return {**skipped, **spike}

    def start_interval(self) -> None:
        """Resets the means, after a log line."""
        self.sums.zero_()
        self.spikes[1:] = 0
        self.logged_step, self.logged_seconds = self.step, self.seconds


def _counter(value: Any, limit: float) -> Any:
    """The value, if it is a number in [0, limit]; ValueError otherwise."""
    if type(value) not in (int, float) or not 0 <= value <= limit:
        raise ValueError(f"{value!r:.40} for a number from 0")
    return value


def _fill(target: Tensor, values: object, kind: type[int] | type[float]) -> None:
    """Copies a list of numbers of type `kind` into `target`; ValueError for another length or type."""
    if not isinstance(values, list) or len(values) != len(target):
        raise ValueError(f"no list of {len(target)} numbers")
    if any(type(value) not in (kind, int) for value in values):
        raise ValueError(f"a list of other values than {kind.__name__}")
    target.copy_(torch.tensor([kind(value) for value in values], dtype=target.dtype))


def ema_start(config: RunConfig) -> int | None:
    """`start` of the run's `Ema`; with a rising decay a fine-tuned run would forget its initial weights."""
    train = config.train
    return train.ema_start if train.ema_start or train.finetune is not None else None


def new_state(config: RunConfig, device: torch.device) -> TrainingState:
    """The state before the first step; the weights are drawn from the config's seed."""
    torch.manual_seed(derived_seed(config.train.seed, 0, "weights"))
    model = build_model(config).to(device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    bad = torch.tensor([0, 0, -1], device=device)
    recent = torch.full((RECENT,), math.inf, device=device)
    spikes = torch.zeros(4, dtype=torch.float64, device=device)
    ema = Ema(model, config.train.ema_decay, ema_start(config))
    # Only after the average was copied, which is never differentiated.
    cast(Trunk, model.network).recompute = config.train.checkpoint_blocks
    return TrainingState(model, ema, make_optimizer(config.train, model), sums, bad, recent, spikes)


def to_checkpoint(state: TrainingState, config: RunConfig) -> Checkpoint:
    """A copy of the state in host memory; a collective operation if the state is sharded."""
    tensors = {
        "model": snapshot(state.model),
        "ema": snapshot(state.ema.model),
        "optimizer": snapshot_optimizer(state.optimizer, state.model),
    }
    facts = {
        "step": state.step,
        "seed": config.train.seed,
        "config": fixed_part(config),
        "data_digest": state.data,
        "sums": state.sums.tolist(),
        "bad_steps": state.bad.tolist(),
        "recent_losses": [loss if math.isfinite(loss) else None for loss in state.recent.tolist()],
        "spikes": state.spikes.tolist(),
        "seconds": state.seconds,
        "logged_step": state.logged_step,
        "logged_seconds": state.logged_seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return Checkpoint(tensors, facts)


def require_trained_here(checkpoint: Checkpoint, where: str) -> None:
    """Raises UserError for the checkpoint of a converted run, which has no optimizer state."""
    if "config" not in checkpoint.state:
        raise UserError(
            f"{where} was not trained here, so there is nothing to continue;"
            f" cdm-fast train --finetune {where} begins a new run from its weights"
        )


def from_checkpoint(
    checkpoint: Checkpoint, config: RunConfig, device: torch.device, where: str
) -> TrainingState:
    """The state that `to_checkpoint` copied; UserError if it does not fit `config`."""
    facts = checkpoint.state
    require_trained_here(checkpoint, where)
    trained_with = from_json(RunConfig, facts["config"], f"{where}: state.json: config")
    if others := [difference.partition(":")[0] for difference in differences(trained_with, config)]:
        raise UserError(
            f"{where}: its checkpoint was trained with another {', '.join(others)}; restore its config.json"
        )
    require_network(config, checkpoint.tensors["model"], where)
    state = new_state(config, device)
    restore_weights(state.model, checkpoint.tensors["model"], where)
    restore_weights(state.ema.model, checkpoint.tensors["ema"], where)
    restore_optimizer(state.optimizer, state.model, checkpoint.tensors["optimizer"], where)
    try:
        _fill(state.sums, facts["sums"], float)
        _fill(state.bad, facts["bad_steps"], int)
        _fill(state.spikes, facts["spikes"], float)
        recent = facts["recent_losses"]
        _fill(state.recent, [math.inf if loss is None else loss for loss in recent], float)
        state.data = str(facts["data_digest"])
        state.step, state.logged_step = (_counter(facts[key], 2**53) for key in ("step", "logged_step"))
        state.seconds, state.logged_seconds = (
            float(_counter(facts[key], 1e12)) for key in ("seconds", "logged_seconds")
        )
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(
            f"{where}: state.json has a missing or invalid counter ({ascii(error)[:80]}); restore it"
        ) from error
    if facts.get("threads") != torch.get_num_threads():
        warnings.warn(
            f"resuming with {torch.get_num_threads()} threads a run of {ascii(facts.get('threads'))[:20]}:"
            " results may differ in their last bits (OMP_NUM_THREADS sets the number)",
            stacklevel=2,
        )
    return state
