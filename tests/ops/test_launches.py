"""The launches of the Triton launchers, recorded on fake tensors of a second GPU: their device and grid."""

import importlib
import inspect
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.launches import LARGE, LAUNCHES

pytestmark = pytest.mark.cpu
triton = pytest.importorskip("triton", reason="triton is not installed")
DEVICE = torch.device("cuda:1")
WITHOUT_LAUNCHERS = {"__init__", "attention_tiles"}
MODULES = sorted(
    {path.stem for path in (Path(__file__).parents[2] / "kernels").glob("*.py")} - WITHOUT_LAUNCHERS
)


class Launch(NamedTuple):
    kernel: str
    current: int  # device
    grid: tuple[int, ...]
    tensors: list[Tensor]


class Driver:
    """In place of CUDA's: knows which device is current."""

    current = 0

    def exchange(self, index: int) -> int:
        before, self.current = self.current, self.current if index < 0 else index
        return before


@pytest.fixture
def launched(monkeypatch):
    """launched(module, calls): the launches of these calls, their tensors fake and on a GPU not current."""
    driver, launches = Driver(), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.current)
    monkeypatch.setattr(torch.cuda, "_exchange_device", driver.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", driver.exchange)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        launches.append(Launch(kernel.__name__, driver.current, grid, tensors))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    def record(module: Any, calls: Any) -> list[Launch]:
        for value in vars(module).values():
            if isinstance(value, triton.KernelInterface):
                monkeypatch.setattr(type(value), "run", run)
        launches.clear()
        with FakeTensorMode():
            calls(module, empty)
        assert driver.current == 0  # as it was
        return list(launches)

    return record


def _module(name):
    return importlib.import_module(f"cdm_fast.kernels.{name}")


def _kernels(module):
    of_module = vars(module).items()
    return {
        name for name, x in of_module if isinstance(x, triton.KernelInterface) and name.endswith("kernel")
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_launch_is_on_the_device_of_its_tensors(launched, name):
    module = _module(name)
    launches = launched(module, LAUNCHES[name])
    assert {launch.kernel for launch in launches} >= _kernels(module)
    for launch in launches:
        assert launch.tensors and {x.device for x in launch.tensors} == {DEVICE}
        assert launch.current == DEVICE.index, launch.kernel


@pytest.mark.parametrize("name", MODULES)
def test_every_launcher_is_guarded(name):
    """Also one that no launch above calls: whatever a kernel module offers to the ops by name."""
    module = _module(name)
    launchers = {
        key: x
        for key, x in vars(module).items()
        if inspect.isfunction(x) and x.__module__ == module.__name__ and not key.startswith("_")
    }
    launchers.pop("choose_blocks", None)  # launches nothing
    assert launchers
    for key, launcher in launchers.items():
        assert hasattr(launcher, "__wrapped__"), f"{name}.{key} lacks @on_its_device"


def test_the_current_device_is_left_alone(monkeypatch):
    """Where the tensors are on the current device, or on none, nothing is switched."""
    from cdm_fast.kernels import on_its_device

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: pytest.fail("switched"))
    launcher = on_its_device(lambda x, y: (x, y))
    with FakeTensorMode():
        x = torch.empty(2, device=DEVICE)
    assert launcher(x, y=3) == (x, 3)
    assert launcher(torch.empty(2), 3)[1] == 3


@pytest.mark.parametrize("name", MODULES)
def test_grids_stay_within_the_limits_of_a_gpu(launched, name):
    module = _module(name)
    launches = launched(module, LARGE[name])
    assert {launch.kernel for launch in launches} >= _kernels(module)
    assert any(x.numel() >= 2**31 for launch in launches for x in launch.tensors)
    for kernel, _, grid, _ in launches:
        assert len(grid) == 1, (kernel, grid)  # the second and third axes end at 65,535
        assert 0 < math.prod(grid) < 2**31, (kernel, grid)
