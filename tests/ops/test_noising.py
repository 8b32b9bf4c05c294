"""noising: every backend gives the reference's bits; distribution of the noise; derivatives; bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_fast.ops import use_backend
from cdm_fast.ops.noising import noising
from cdm_fast.ops.philox import philox_flip, philox_normal, philox_uniform

L = 12
S = torch.linspace(0, 1, L, dtype=torch.float64)
A = (1 - S**2).sqrt()
SEED = torch.tensor([2024, 7])

SHAPES = {
    "one-pixel": (1, 1, 1, 1),
    "odd": (3, 1, 5, 7),
    "vectors": (5, 3),
    "aligned": (2, 3, 8, 8),
    "one-big-image": (1, 3, 20, 19),
}
INPUTS = {
    "uint8": (torch.uint8, None),
    "uint8-bf16": (torch.uint8, torch.bfloat16),
    "fp32": (torch.float32, None),
    "fp32-fp16": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
    "fp64": (torch.float64, None),
}


def _levels(batch):
    return torch.arange(batch) * 5 % L


def _images(shape, dtype):
    if dtype == torch.uint8:
        return torch.randint(0, 17, shape, dtype=dtype)
    return (2 * torch.rand(shape, dtype=torch.float64) - 1).to(dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("dtype", "out_dtype"), INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
@pytest.mark.parametrize("given_eps", [False, True], ids=["drawn", "given"])
def test_kernels_equal_the_reference(kernels, poison_empty, shape, dtype, out_dtype, flip, given_eps):
    grey_levels = 17 if dtype == torch.uint8 else None
    x0 = _images(shape, dtype)
    options = {"num_grey_levels": grey_levels, "flip": flip, "dtype": out_dtype}
    if given_eps:
        options["eps"] = torch.randn(shape)
    results = []
    for name in ("reference", kernels):
        with use_backend(name):
            results.append(noising(x0, _levels(shape[0]), A, S, SEED, **options))
    expected, got = results
    half = expected.x_t.dtype in (torch.bfloat16, torch.float16)
    # The interpreter of Triton truncates where hardware rounds to bf16: one unit in the last place.
    tolerance = 2 * torch.finfo(expected.x_t.dtype).eps if half else 1e-6
    assert got.x_t.dtype == expected.x_t.dtype
    torch.testing.assert_close(got.x_t, expected.x_t, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(got.eps, expected.eps, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.x0, expected.x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("most", ["baseline", "avx2", "avx512"])
def test_the_cpp_kernels_give_the_same_bits_as_the_reference_with_every_instruction_set(most, limit_isa):
    limit_isa(most)
    x0 = _images((4, 3, 32, 32), torch.uint8)
    with use_backend("reference"):
        expected = noising(x0, _levels(4), A, S, SEED, num_grey_levels=256, flip=True)
    with use_backend("cpp"):
        got = noising(x0, _levels(4), A, S, SEED, num_grey_levels=256, flip=True)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 3, 20, 19), (2, 4, 6, 6), (1, 2, 1, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "out_dtype"), INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
@pytest.mark.parametrize("given_eps", [False, True], ids=["drawn", "given"])
def test_channels_last_in_and_out_is_the_same_bits(
    backend, poison_empty, shape, dtype, out_dtype, flip, given_eps
):
    x0, eps = _images(shape, dtype), torch.randn(shape) if given_eps else None
    options = {"num_grey_levels": 17 if dtype == torch.uint8 else None, "flip": flip, "dtype": out_dtype}
    expected = noising(x0, _levels(shape[0]), A, S, SEED, eps=eps, **options)
    last = x0.contiguous(memory_format=torch.channels_last)
    got = noising(last, _levels(shape[0]), A, S, SEED, eps=eps, **options)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
    assert got.eps is eps or got.eps.stride() == last.stride()
    assert got.x_t.stride() == got.x0.stride() == last.stride()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    seed=st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1)),
    flip=st.booleans(),
)
def test_cpp_on_random_shapes_and_seeds(shape, seed, flip):
    x0 = torch.zeros(shape, dtype=torch.uint8)
    seed = torch.tensor(seed)
    results = []
    for name in ("reference", "cpp"):
        with use_backend(name):
            results.append(noising(x0, _levels(shape[0]), A, S, seed, num_grey_levels=2, flip=flip))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_noise_is_recomputable_and_dequantisation_follows_its_formula(backend):
    x0 = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    result = noising(x0, _levels(3), A, S, SEED, num_grey_levels=256)
    torch.testing.assert_close(result.eps, philox_normal(SEED, x0.shape), rtol=0, atol=1e-6)
    expected = 2 * (x0 + philox_uniform(SEED, x0.shape)) / 256 - 1
    torch.testing.assert_close(result.x0, expected, rtol=0, atol=1e-6)
    assert float(result.x0.min()) >= -1 and float(result.x0.max()) <= 1


def test_ends_of_the_schedule_are_data_and_noise(backend):
    x0 = torch.rand(2, 5)
    result = noising(x0, torch.tensor([0, L - 1]), A, S, SEED)
    assert torch.equal(result.x_t[0], x0[0]) and torch.equal(result.x_t[1], result.eps[1])


def test_flip_mirrors_the_images_that_the_coin_says(backend):
    x0 = torch.rand(8, 1, 2, 5)
    result = noising(x0, torch.zeros(8, dtype=torch.int64), A, S, SEED, flip=True)
    coin = philox_flip(SEED, 8)
    assert 0 < int(coin.sum()) < 8
    expected = torch.where(coin[:, None, None, None], x0.flip(-1), x0)
    assert torch.equal(result.x0, expected) and torch.equal(result.x_t, expected)


def test_the_seed_is_read_when_the_op_runs(backend):
    seed = SEED.clone()
    first = noising(torch.zeros(2, 8), _levels(2), A, S, seed).eps
    seed[1] += 1
    assert not torch.equal(first, noising(torch.zeros(2, 8), _levels(2), A, S, seed).eps)


def test_given_noise_is_handed_back(backend):
    eps = torch.randn(2, 8)
    result = noising(torch.zeros(2, 8), _levels(2), A, S, eps=eps)
    assert result.eps is eps
    torch.testing.assert_close(result.x_t, S[_levels(2)].float()[:, None] * eps)


@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
def test_gradients(backend, flip):
    x0 = torch.rand(3, 2, 4, dtype=torch.float64, requires_grad=True)
    eps = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    def both(x0, eps):
        result = noising(x0, _levels(3), A, S, SEED, eps=eps, flip=flip)
        return result.x_t, result.x0

    assert torch.autograd.gradcheck(both, (x0, eps))


@pytest.mark.parametrize("draw", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(native, draw, layout):
    x0 = torch.rand(2, 3, 3, 4).contiguous(memory_format=layout).requires_grad_()
    eps = None if draw else torch.rand(2, 3, 3, 4).contiguous(memory_format=layout)
    arguments = (x0, _levels(2), A.float(), S.float(), SEED, eps, 0, True, torch.float32)
    with use_backend(native):
        torch.library.opcheck(torch.ops.cdm_fast.noising.default, arguments)


def test_compiles_whole():
    def step(x0, level, seed):
        return noising(x0, level, A, S, seed, num_grey_levels=17).x_t * 2

    x0 = _images((2, 1, 4, 4), torch.uint8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x0, _levels(2), SEED), step(x0, _levels(2), SEED))


def test_a_level_out_of_range_inside_a_compiled_step_gives_nan():
    compiled = torch.compile(
        lambda level: noising(torch.ones(2, 4), level, A, S, SEED).x_t, fullgraph=True, backend="aot_eager"
    )
    x_t = compiled(torch.tensor([L, 3]))
    assert bool(x_t[0].isnan().all()) and bool(x_t[1].isfinite().all())


BAD = {
    "x0-int": (dict(x0=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "x0: expected dtype uint8"),
    "x0-list": (dict(x0=[[1.0]]), TypeError, "x0: expected a tensor, got list"),
    "empty": (
        dict(x0=torch.zeros(0, 3), level=torch.zeros(0, dtype=torch.int64)),
        ValueError,
        "at least one",
    ),
    "level-dtype": (dict(level=torch.zeros(2)), TypeError, "level: expected dtype int64, got float32"),
    "level-shape": (
        dict(level=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        r"level: expected shape \(2\)",
    ),
    "level-high": (dict(level=torch.tensor([0, L])), ValueError, f"level: expected values in 0..11, got {L}"),
    "level-low": (dict(level=torch.tensor([-1, 0])), ValueError, "level: expected values in 0..11, got -1"),
    "table-shape": (dict(s=S[:-1]), ValueError, "s: expected shape"),
    "table-dtype": (dict(s=S.float()), TypeError, "s: expected dtype float64"),
    "table-grad": (dict(a=A.clone().requires_grad_()), ValueError, "a, s: expected tables without gradient"),
    "device": (
        dict(level=torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError,
        "level: expected it on",
    ),
    "no-seed": (dict(seed=None), ValueError, "seed: expected a tensor"),
    "flip-no-seed": (dict(seed=None, eps=torch.zeros(2, 3), flip=True), ValueError, "seed: expected"),
    "seed-shape": (dict(seed=torch.tensor([1])), ValueError, r"seed: expected shape \(2,\)"),
    "eps-shape": (dict(eps=torch.zeros(2, 4)), ValueError, "eps: expected shape"),
    "grey-float": (dict(num_grey_levels=17), ValueError, "num_grey_levels: expected an int for uint8"),
    "grey-missing": (dict(x0=torch.zeros(2, 3, dtype=torch.uint8)), ValueError, "num_grey_levels: expected"),
    "grey-range": (
        dict(x0=torch.zeros(2, 3, dtype=torch.uint8), num_grey_levels=1),
        ValueError,
        "num_grey_levels: expected 2..256, got 1",
    ),
    "dtype": (dict(dtype=torch.int32), TypeError, "dtype: expected a floating dtype"),
}


@pytest.mark.parametrize(("change", "error", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(backend, change, error, says):
    arguments = dict(x0=torch.zeros(2, 3), level=torch.zeros(2, dtype=torch.int64), a=A, s=S, seed=SEED)
    with pytest.raises(error, match=says):
        noising(**(arguments | change))
