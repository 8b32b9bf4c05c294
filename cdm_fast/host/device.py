"""The device on which a process computes, and copies to it."""

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.processes import this_process
from cdm_fast.host.reading import shown


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from the host to a GPU through pinned memory, asynchronously."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def wait_for(device: torch.device) -> None:
    """Waits until the device has completed all work enqueued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pick_device(name: str) -> torch.device:
    """The torch device called `name`.

    Args:
        name: "cpu", "cuda", "cuda:1", ...; "auto" is "cuda" if PyTorch finds a GPU, else "cpu". In a run of
            several processes "cuda" is the GPU whose index is the local rank.

    Raises:
        UserError: the device is not available, or the machine has fewer GPUs than processes.

    >>> pick_device("cpu")
    device(type='cpu')
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
    """Why PyTorch refuses a device, in a few words; its own message may be a page long."""
    if str(error).startswith("Could not run"):
        return "this PyTorch has no backend for it"
    return shown(str(error).splitlines()[0], 120)


def _own_gpu(name: str, available: int) -> torch.device:
    """The GPU whose index is the local rank; UserError if there are too few, or `name` has an index."""
    process = this_process()
    if ":" in name:
        raise UserError(f"--device {name}: torchrun assigns one GPU to each process; give cuda")
    if process.local_count > available:
        raise UserError(
            f"{process.local_count} processes on a machine of {available} GPUs; start as many as there are"
            " (torchrun --nproc-per-node), or give --device cpu"
        )
    return torch.device("cuda", process.local_rank)
