"""What only a GPU can show: a captured graph draws new noise, and a step never waits for the host."""

import pytest
import torch

from cdm_fast import CDM, NoiseSchedule, UNet, cdm_loss
from cdm_fast.ops import use_backend
from cdm_fast.ops.noising import noising

pytestmark = pytest.mark.gpu
SCHEDULE = NoiseSchedule.uniform(T=10)


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """As users run it: no check of values, which would wait for the device."""
    monkeypatch.delenv("CDM_FAST_CHECKED", raising=False)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_replayed_graph_draws_the_noise_of_its_seed(backend):
    x0, level = torch.zeros(4, 1, 8, 8, device="cuda"), torch.full((4,), 5, device="cuda")
    tables = SCHEDULE.a.float().cuda(), SCHEDULE.s.float().cuda()
    seed = torch.tensor([3, 0], device="cuda")
    with use_backend(backend):
        expected = [
            noising(x0, level, *tables, torch.tensor([3, offset], device="cuda")).eps for offset in (0, 1)
        ]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eps = noising(x0, level, *tables, seed).eps
    for wanted in expected:
        graph.replay()
        assert torch.equal(eps, wanted)
        seed[1] += 1


def test_a_training_step_waits_for_nothing():
    network = UNet(8, 1, SCHEDULE.num_levels, 8, (1, 2), 1, (4,), num_groups=4)
    model = CDM(network, SCHEDULE).cuda()
    x0, level = torch.rand(4, 1, 8, 8, device="cuda"), torch.tensor([0, 3, 10, 11], device="cuda")
    eps = torch.randn_like(x0)
    cdm_loss(model, x0, level, eps).loss.backward()  # the kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        cdm_loss(model, x0, level, eps).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
