"""The pretended device refuses what a GPU would refuse, and computes as the CPU does."""

import pytest
import torch

from tests.pretend_cuda import DEVICE, PretendCuda


@pytest.fixture(autouse=True)
def _pretended():
    with PretendCuda():
        yield


def test_tensors_lie_on_the_device_unless_they_were_put_on_the_host():
    x = torch.randn(3)
    assert x.device == DEVICE and x.is_cuda and x.mul(2).sum().device == DEVICE
    host = x.cpu()
    assert host.device.type == "cpu" and not host.is_cuda and host[:2].exp().device.type == "cpu"
    assert x.device == DEVICE
    assert host.to(x).device == host.cuda().device == DEVICE and x.to("cpu").device.type == "cpu"
    assert torch.zeros_like(host).device.type == "cpu" and torch.zeros(2, device="cpu").device.type == "cpu"
    assert torch.ones(2, device=DEVICE).device == DEVICE and x.to("meta").is_meta


def test_values_and_gradients_are_the_cpus():
    x = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(x.square().sum(), x)
    assert gradient.device == DEVICE
    torch.testing.assert_close(gradient, 2 * x)
    assert torch.arange(3).tolist() == [0, 1, 2] and int(torch.tensor(5)) == 5


REFUSED = {
    "generator-of-a-factory": lambda: torch.randn(3, generator=torch.Generator()),
    "generator-in-place": lambda: torch.empty(3).normal_(generator=torch.Generator()),
    "two-places": lambda: torch.ones(3) + torch.ones(3, device="cpu"),
    "two-places-in-a-list": lambda: torch.cat([torch.ones(3), torch.ones(3).cpu()]),
    "comparison": lambda: torch.equal(torch.ones(3), torch.ones(3).cpu()),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_a_gpu_refuses_is_refused(call):
    with pytest.raises(RuntimeError, match="device"):
        call()


def test_numpy_sees_the_host_only():
    with pytest.raises(TypeError, match="to numpy"):
        torch.ones(3).numpy()
    assert torch.ones(3).cpu().numpy().sum() == 3


def test_a_generator_of_the_host_serves_the_host_and_numbers_may_lie_anywhere():
    x = torch.randn(3, generator=torch.Generator(), device="cpu")
    assert x.device.type == "cpu"
    assert (torch.ones(3) * torch.tensor(2.0, device="cpu")).device == DEVICE
