"""Triton kernels and their launchers, one or two files per op (installed as cdm_fast.kernels).

Two rules hold for every launcher. It is decorated with `on_its_device`. Its grid has one axis: the others
end at 65,535 programs, the first only at 2^31 - 1; `tests/ops/test_launches.py` checks both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def on_its_device(
    launcher: Callable[Concatenate[Tensor, _Rest], _Result],
) -> Callable[Concatenate[Tensor, _Rest], _Result]:
    """The launcher, run with the device of its first tensor as the current one.

    Triton launches on the current device and its current stream, wherever the tensors are. Where their device
    is current already, as it nearly always is, this costs one comparison.
    """

    @wraps(launcher)
    def guarded(first: Tensor, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(first, *args, **kwargs)
        with torch.cuda.device(device):
            return launcher(first, *args, **kwargs)

    return guarded
