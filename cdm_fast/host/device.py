"""The device that a process computes on, and copies to it."""

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.processes import this_process
from cdm_fast.host.reading import shown


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from the host to a GPU by way of pinned memory, without a wait for either."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def wait_for(device: torch.device) -> None:
    """Returns once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a CUDA device or the CPU. UserError when it is not there.

    Among several processes of a run each has a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and this_process().count > 1:
        return _own_gpu(name, torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"--device {name or repr(name)} cannot be used here ({_reason(error)}); give cpu"
        ) from error
    if device.type == "meta":
        raise UserError("--device meta computes nothing; give cpu")
    return device


def _reason(error: Exception) -> str:
    """Why PyTorch refuses a device, in a few words: it may say so in a page about its own internals."""
    if str(error).startswith("Could not run"):
        return "this PyTorch has no backend for it"
    return shown(str(error).splitlines()[0], 120)


def _own_gpu(name: str, available: int) -> torch.device:
    """The GPU whose number is the local rank; UserError when there are too few, or `name` is one of them."""
    process = this_process()
    if ":" in name:
        raise UserError(f"--device {name}: under torchrun every process takes a GPU of its own; give cuda")
    if process.local_count > available:
        raise UserError(
            f"{process.local_count} processes on a machine of {available} GPUs; start as many as there are"
            " (torchrun --nproc-per-node), or give --device cpu"
        )
    return torch.device("cuda", process.local_rank)
