"""Sampling with the paper's 33.4 M CIFAR-10 network: single evaluations, guided ones, and whole runs of DDIM.

Batch 8 on CPU, 128 on a GPU (DDIM: half). A CDM evaluation is a forward pass and its adjoint, so the limit of
its ratio to our own plain diffusion model (DDM) on the same trunk is 0.5. The baseline of
whole runs is plain denoising by `autograd.grad` in fp32.
"""

import torch

from benchmarks.support.cases import DTYPES, both_finite
from benchmarks.support.limit import share
from benchmarks.support.networks import CLASSES, without_gradients
from benchmarks.support.train_steps import BATCH_SIZE, autocast
from cdm_fast.sampling import sample

# Of images from untrained weights, whose eps_hat is nearly s x.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def _evaluation(models, model, dtype, batch, **conditions):
    x, level = models.images(batch), torch.full((batch,), models.schedule.T // 2, device=models.device)

    def run():
        with autocast(models.device, dtype):
            if conditions:
                return model.guided_denoise(x, level, **conditions)
            return model.denoise(x, level)

    return without_gradients(run)


@DTYPES
def test_evaluation_against_ddm(benchmark, compare, models, device, dtype):
    batch = BATCH_SIZE[device.type]
    candidate, baseline = (_evaluation(models, model, dtype, batch) for model in (models.cdm(), models.ddm()))
    compare(benchmark, candidate, baseline, both_finite, rounds=9)
    benchmark.extra_info["shape"] = list(models.images(batch).shape)
    share(benchmark.extra_info, 2, batch, models.sizes, dtype, device)


@DTYPES
def test_guided_evaluation_against_ddm(benchmark, compare, models, device, dtype):
    """Guidance by a joint head is one evaluation; the DDM beside it is not guided."""
    batch = BATCH_SIZE[device.type]
    label = torch.arange(batch, device=device) % CLASSES
    candidate = _evaluation(models, models.joint(), dtype, batch, label=label, guidance=1.0)
    compare(benchmark, candidate, _evaluation(models, models.ddm(), dtype, batch), both_finite, rounds=9)
    benchmark.extra_info["shape"] = list(models.images(batch).shape)
    share(benchmark.extra_info, 2, batch, models.sizes, dtype, device)


@DTYPES
def test_guided_evaluation_against_unguided(benchmark, compare, models, device, dtype):
    """The same joint head, the same labels, with guidance and without."""
    batch = BATCH_SIZE[device.type]
    label, model = torch.arange(batch, device=device) % CLASSES, models.joint()
    guided, plain = (
        _evaluation(models, model, dtype, batch, label=label, guidance=guidance) for guidance in (1.0, 0.0)
    )
    compare(benchmark, guided, plain, both_finite, rounds=9)
    benchmark.extra_info["shape"] = list(models.images(batch).shape)


@DTYPES
def test_ddim(benchmark, compare, models, device, small, dtype):
    """The same noise through 50 steps of both."""
    batch, steps = BATCH_SIZE[device.type] // 2, 5 if small else 50
    ours, plain = models.cdm(), models.plain()

    def run():
        with autocast(device, dtype):
            return sample(ours, batch, "ddim", steps)

    def check(got, expected):
        error = float((got - expected).norm() / expected.norm())
        benchmark.extra_info["relative_error"] = error
        assert error < ALLOWED[dtype]

    compare(benchmark, run, lambda: sample(plain, batch, "ddim", steps), check, rounds=2)
    benchmark.extra_info["shape"] = list(models.images(batch).shape)
