"""The functions that the processes of the distributed tests run.

They are forked from a server that has imported everything and started no thread.
"""

import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import load_data
from cdm_fast.errors import UserError
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.host.distributed import gather_full, process_group
from cdm_fast.host.processes import this_process
from cdm_fast.likelihood import evaluate, evaluate_elbo, evaluate_ode, mse_per_level
from cdm_fast.model.losses import Noised
from cdm_fast.runs.build import build_model
from cdm_fast.sampling import sample
from cdm_fast.training import finish, loop
from cdm_fast.training import train as training
from cdm_fast.training.base import begin_from_base
from cdm_fast.training.ema import Ema
from cdm_fast.training.parallel import wrap
from cdm_fast.training.state import TrainingState, new_state
from cdm_fast.training.step import (
    StepResult,
    begin_step,
    draw_batch,
    make_loss,
    make_optimizer,
    training_step,
)

CPU = torch.device("cpu")


def start(count: int, function: Callable[..., Any], out: Path, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returned in each of `count` processes that have joined."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.workers"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(target=_run, args=(rank, count, port, function, out, arguments), daemon=True)
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    for rank, worker in enumerate(workers):
        worker.join(300)
        error = out / f"{rank}.error"
        assert worker.exitcode == 0, error.read_text() if error.exists() else f"process {rank} hangs"
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run(
    rank: int, count: int, port: int, function: Callable[..., Any], out: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    try:
        torch.save(function(*arguments), out / f"{rank}.pt")
    except BaseException:
        (out / f"{rank}.error").write_text(traceback.format_exc())
        raise


def joint_steps(config: RunConfig, parallel: str, steps: int) -> dict[str, Any]:
    """Everything of `steps_taken`, of processes that share each step."""
    with process_group("cpu"):
        return steps_taken(config, parallel, steps)


def steps_taken(config: RunConfig, parallel: str | None, steps: int) -> dict[str, Any]:
    """Gradients and results of one step in fp32 and fp64; the losses of many steps and where they end."""
    found: dict[str, Any] = {"losses": many_steps(config, parallel, steps)}
    for dtype in (torch.float32, torch.float64):
        state, loss = _state(config, dtype, parallel)
        result = _step(config, state, loss, 3)
        gradient = [
            gather_full(weight.grad) for weight in state.model.parameters() if weight.grad is not None
        ]
        found[str(dtype)] = {"gradient": _flat(gradient), "result": torch.stack([*result])}
    return found


def many_steps(
    config: RunConfig, parallel: str | None, steps: int, poisoned: int | None = None
) -> dict[str, Any]:
    """The losses, the counts of bad steps and the averaged weights; the last rank has a NaN in one step."""
    state, loss = _state(config, torch.float32, parallel)
    losses = []
    for step in range(steps):
        result = _step(config, state, loss, step, poisoned == step)
        losses.append(result.loss)
        state.record(result)
    return {"loss": torch.stack(losses), "bad": state.bad, "ema": _flat([*state.ema.model.parameters()])}


def joint_losses(config: RunConfig, parallel: str, steps: int) -> dict[str, Any]:
    """`many_steps` of processes that share each step."""
    with process_group("cpu"):
        return many_steps(config, parallel, steps)


def joint_bad_step(config: RunConfig, parallel: str) -> dict[str, Any]:
    """`many_steps` with a NaN in step 2 of one process."""
    with process_group("cpu"):
        return many_steps(config, parallel, 4, poisoned=2)


def _state(config: RunConfig, dtype: torch.dtype, parallel: Any) -> tuple[TrainingState, dict[str, Any]]:
    state, loss = new_state(config, CPU), make_loss(config.train)
    begin_from_base(config, state, load_data(config.data.source))
    if dtype != torch.float32:
        state.model.to(dtype)
        state.ema = Ema(state.model, config.train.ema_decay)
        state.optimizer = make_optimizer(config.train, state.model)
    if parallel is None:
        return state, {"loss_function": loss}
    wrapped = wrap(state, config, parallel)
    return state, {"loss_function": wrapped.loss(loss), "keep_local": wrapped.keep_local}


def _step(
    config: RunConfig, state: TrainingState, loss: dict[str, Any], step: int, spoilt: bool = False
) -> StepResult:
    train, dtype = config.train, state.model.a.dtype
    begin_step(state.model, config, step)
    batch = draw_batch(load_data(config.data.source), state.model, config, step)
    if spoilt and this_process().rank == this_process().count - 1:
        batch = _spoilt(batch)
    batch = batch._replace(x_t=batch.x_t.to(dtype), eps=batch.eps.to(dtype))
    return training_step(
        state.model,
        state.optimizer,
        state.ema,
        batch,
        step=step,
        clip_norm=train.clip_norm,
        parts=train.accumulate,
        **loss,
    )


def _spoilt(batch: Noised) -> Noised:
    return batch._replace(x_t=batch.x_t * float("nan"))


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().contiguous().flatten() for tensor in tensors])


def joint_measurements(config: RunConfig) -> dict[str, Any]:
    """`measurements` that processes share."""
    with process_group("cpu"):
        return measurements(config)


def measurements(config: RunConfig) -> dict[str, Any]:
    """Samples, likelihoods and class scores of an untrained model."""
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    data = load_data(config.data.source, "test")
    label = torch.arange(5) % 3
    single = evaluate(model, data, draws=2, batch_size=4, check_levels=3)
    ode = evaluate_ode(model, data, num_images=3, batch_size=2, tolerance=1e-2, probes=2)
    return {
        "samples": sample(model, 5, "ddpm", 4, label=label, batch_size=2),
        "one sample": sample(model, 1, steps=4),
        "single": single.per_image,
        "ratios": torch.tensor(single.ratio_check.log_mean_ratio),
        "elbo": evaluate_elbo(model, data, 5).per_image,
        "ode": torch.cat([ode.per_image, torch.tensor([ode.difference, *ode.difference_at])]),
        "mse": torch.tensor(mse_per_level(model, data, num_images=3)[1]),
        **{
            method: evaluate_classes(
                model, data, method, num_images=5, draws=1, trials=3, tolerance=1e-2, probes=2
            ).class_scores
            for method in ("joint", "denoising", "ode")
        },
    }


def joint_run(config: RunConfig, out: Path, parallel: str, signalled: int | None = None) -> dict[str, Any]:
    """Trains a run; the last rank is told to stop in step `signalled`."""
    finish.write_final = lambda *_: {}
    draw = loop.draw_batch

    def signalling(data: Any, model: Any, config: RunConfig, step: int) -> Noised:
        if step == signalled and this_process().rank == this_process().count - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(data, model, config, step)

    loop.draw_batch = signalling
    with process_group("cpu"):
        return training.train(config, out, device="cpu", parallel=parallel)


def joint_failure(config: RunConfig, out: Path) -> str:
    """What each process says when the last one fails in step 2."""
    draw = loop.draw_batch

    def failing(data: Any, model: Any, config: RunConfig, step: int) -> Noised:
        if step == 2 and this_process().rank == this_process().count - 1:
            raise UserError("its disk is on fire; put it out")
        return draw(data, model, config, step)

    loop.draw_batch = failing
    try:
        with process_group("cpu"):
            training.train(config, out, device="cpu")
    except UserError as error:
        return str(error)
    return "nothing"


def uneven(config: RunConfig, out: Path) -> str:
    """What is said of a batch that the processes cannot share."""
    odd = replace(config, train=replace(config.train, batch_size=9))
    try:
        with process_group("cpu"):
            training.train(odd, out, device="cpu")
    except UserError as error:
        return str(error)
    return "nothing"
