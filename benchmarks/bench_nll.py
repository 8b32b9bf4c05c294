"""Likelihood with the paper's 33.4 M CIFAR-10 network: how much slower than the bare network's forward pass.

`log_prob` is one forward pass and a little arithmetic; `evaluate` is the whole protocol from uint8 images on,
with dequantisation and bookkeeping. Batch 8 on CPU, 128 on a GPU.
"""

import torch

from benchmarks.support.cases import DTYPES
from benchmarks.support.limit import share
from benchmarks.support.networks import without_gradients
from benchmarks.support.train_steps import BATCH_SIZE, autocast
from cdm_fast.data import ImageData
from cdm_fast.likelihood import evaluate


@DTYPES
def test_log_prob(benchmark, compare, models, device, dtype):
    model, x = models.cdm(), models.images(BATCH_SIZE[device.type])

    def in_precision(function):
        def run():
            with autocast(device, dtype):
                return function()

        return without_gradients(run)

    def check(got, logits):
        assert bool(torch.isfinite(got).all()) and got.shape == logits.shape[:1]

    compare(
        benchmark,
        in_precision(lambda: model.log_prob(x)),
        in_precision(lambda: model.network(x)),
        check,
        rounds=9,
    )
    benchmark.extra_info["shape"] = list(x.shape)
    share(benchmark.extra_info, 1, len(x), models.sizes, dtype, device)


def test_protocol(benchmark, compare, models, device):
    """`cdm-fast nll` on one batch of uint8 images, one draw, against the forward pass."""
    model, x = models.cdm(), models.images(BATCH_SIZE[device.type])
    images = torch.randint(256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageData(images, None, 256, None, "random", "test")

    def candidate():
        return evaluate(model, data, draws=1, batch_size=len(images), check_levels=0).bits_per_dim

    def check(bits_per_dim, logits):
        assert bits_per_dim == bits_per_dim and len(logits) == len(images)

    compare(benchmark, candidate, without_gradients(lambda: model.network(x)), check, rounds=9)
    benchmark.extra_info["shape"] = list(x.shape)
