"""Weights and optimizer state: copying them to host memory, checking and restoring them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cdm_fast.config import RunConfig
from cdm_fast.errors import UserError
from cdm_fast.host.distributed import gather_full
from cdm_fast.host.reading import shown
from cdm_fast.runs.build import build_network


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's weights and buffers in host memory, which training does not change."""
    return {name: _host_copy(tensor) for name, tensor in module.state_dict().items()}


def snapshot_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """A copy of the optimizer's state in host memory, as `PARAMETER.MOMENT` -> tensor."""
    return {
        f"{name}.{moment}": _host_copy(value)
        for name, parameter in module.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def require_network(config: RunConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError unless `tensors` hold the network of `config`; allocates no memory for it."""
    try:
        with torch.device("meta"):
            network = build_network(config)
    except UserError as error:
        raise UserError(f"{where}/config.json: {error}") from None
    _require_shapes(
        {f"network.{name}": value for name, value in network.state_dict().items()}, tensors, where
    )


def _require_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    for name, ours in sorted(expected.items()):
        theirs = tensors.get(name)
        if theirs is None or ours.shape != theirs.shape:
            raise UserError(
                f"{where}: weights of another architecture: {name} is {_shape(theirs)} in the file and"
                f" {_shape(ours)} in the network of config.json; restore the config.json that belongs to them"
            )


def restore_weights(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Loads `tensors` into the module; UserError names the first tensor that does not fit."""
    expected = module.state_dict()
    _require_shapes(expected, tensors, where)
    for name, value in tensors.items():
        if name not in expected:
            raise UserError(
                f"{where}: weights of another architecture: {shown(name, 100)} is not in the network of"
                " config.json; restore the config.json that belongs to them"
            )
        _require_numbers(name, value, where)
    module.load_state_dict(dict(tensors))


def restore_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Restores a `snapshot_optimizer`; UserError if it belongs to another network or optimizer."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        by_parameter.setdefault(name, {})[moment] = tensor
    parameters = dict(module.named_parameters())
    for name, moments in by_parameter.items():
        shapes = {key: value.shape for key, value in moments.items()}
        shape = parameters[name].shape if name in parameters else None
        if shapes != {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}:
            raise UserError(
                f"{where}: optimizer state of another network ({shown(name, 100)});"
                " restore the folder or train anew"
            )
        for moment, value in moments.items():
            _require_numbers(f"{name}.{moment}", value, where)
    state = {
        i: {moment: _like_parameter(value, parameters[name]) for moment, value in by_parameter[name].items()}
        for i, name in enumerate(parameters)
        if name in by_parameter
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _require_numbers(name: str, value: Tensor, where: str) -> None:
    """Raises UserError unless a tensor holds finite floating-point numbers."""
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"{where}: {name} holds {value.dtype}, not floating-point numbers; restore the file")
    if not torch.isfinite(value).all():
        raise UserError(f"{where}: {name} holds NaN or infinity; restore the file, or an older checkpoint")


def _like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment in its parameter's memory layout, which fused optimizers assume."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory with the original's memory layout, the fastest to make."""
    return gather_full(tensor.detach()).to("cpu", copy=True)


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "a scalar"
