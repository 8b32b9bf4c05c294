"""noising against what it replaces, at the CIFAR-10 batch: randn, gathers and a multiply-add."""

import torch

from cdm_fast.ops.noising import noising

NUM_LEVELS = 1002


def _inputs(small, device, dtype):
    shape = (4, 3, 32, 32) if small else (128, 3, 32, 32)
    s = torch.linspace(0, 1, NUM_LEVELS, device=device)
    level = torch.randint(0, NUM_LEVELS, shape[:1], device=device)
    if dtype == torch.uint8:
        x0 = torch.randint(0, 256, shape, dtype=dtype, device=device)
    else:
        x0 = 2 * torch.rand(shape, device=device) - 1
    return x0, level, (1 - s**2).sqrt(), s, torch.tensor([1, 2], device=device)


def _per_image(table, level):
    return table[level][:, None, None, None]


def _check_law(candidate, baseline):
    """Both results hold x_t, eps and x_0; the noise differs, but has the same distribution."""
    for eps in (candidate[1], baseline[1]):
        assert abs(float(eps.mean())) < 0.05 and abs(float(eps.std()) - 1) < 0.05


def test_float_images(benchmark, compare, small, device):
    x0, level, a, s, seed = _inputs(small, device, torch.float32)

    def plain():
        eps = torch.randn_like(x0)
        return _per_image(a, level) * x0 + _per_image(s, level) * eps, eps

    compare(benchmark, lambda: noising(x0, level, a, s, seed), plain, _check_law)
    benchmark.extra_info.update(shape=list(x0.shape), dtype="fp32")


def test_uint8_images(benchmark, compare, small, device):
    x0, level, a, s, seed = _inputs(small, device, torch.uint8)

    def plain():
        clean = 2 * (x0 + torch.rand(x0.shape, device=device)) / 256 - 1
        flips = torch.rand(len(x0), 1, 1, 1, device=device) < 0.5
        clean = torch.where(flips, clean.flip(-1), clean)
        eps = torch.randn_like(clean)
        return _per_image(a, level) * clean + _per_image(s, level) * eps, eps, clean

    compare(
        benchmark, lambda: noising(x0, level, a, s, seed, num_grey_levels=256, flip=True), plain, _check_law
    )
    benchmark.extra_info.update(shape=list(x0.shape), dtype="uint8")


def test_channels_last_images(benchmark, compare, small, device):
    """Channels-last images read and written in place, against copies to contiguous order and back."""
    x0, level, a, s, seed = _inputs(small, device, torch.float32)
    x0 = x0.contiguous(memory_format=torch.channels_last)

    def copied():
        results = noising(x0.contiguous(), level, a, s, seed)
        return tuple(x.contiguous(memory_format=torch.channels_last) for x in results[:2])

    def check(candidate, baseline):
        assert all(torch.equal(x, y) for x, y in zip(candidate, baseline, strict=False))

    compare(benchmark, lambda: noising(x0, level, a, s, seed), copied, check)
    benchmark.extra_info.update(shape=list(x0.shape), dtype="fp32", layout="channels-last")
