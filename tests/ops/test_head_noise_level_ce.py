"""head_noise_level_ce: the composition of head and loss, its gradients, and the memory it may take."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from cdm_fast.ops import use_backend
from cdm_fast.ops.head_noise_level_ce import head_noise_level_ce
from cdm_fast.ops.noise_level_ce import noise_level_ce
from tests.accuracy import assert_kernel_accurate

module = import_module("cdm_fast.ops.head_noise_level_ce")  # the package has a function of that name

# batch, levels, classes, logits in a block
CASES = {
    "one-block": (5, 12, 1, 1 << 20),
    "one-level-a-block": (5, 12, 1, 1),
    "odd-remainder": (5, 12, 1, 5 * 4),
    "exact-blocks": (4, 13, 1, 4 * 6),
    "one-image": (1, 33, 1, 7),
    "two-levels": (3, 2, 1, 4),
    "joint": (6, 9, 4, 1 << 20),
    "joint-odd-remainder": (6, 9, 4, 6 * 4 * 3),
    "more-classes-than-a-block": (3, 4, 37, 10),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEATURES = 7


@pytest.fixture
def case(request, monkeypatch):
    """(h, weight_c, bias_c, level, label, num_classes) of a case, and the size of its blocks."""
    batch, num_levels, num_classes, block = request.param
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    return _case(batch, num_levels, num_classes)


def _case(batch, num_levels, num_classes):
    num_rows = (num_levels - 1) * num_classes + 1
    tensors = (torch.randn(*shape) for shape in ((batch, FEATURES), (num_rows, FEATURES), (num_rows,)))
    # Values that every dtype holds, so that the truth is the same for all.
    h, weight_c, bias_c = (x.bfloat16().double().requires_grad_() for x in tensors)
    level = torch.arange(batch) * 7 % num_levels
    level[-1] = num_levels - 1  # pure noise, whose label means nothing
    label = None if num_classes == 1 else torch.arange(batch) % (num_classes + 1) - 1
    return h, weight_c, bias_c, level, label, num_classes


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys(), indirect=True)


def _converted(arguments, dtype):
    parameters = (x.detach().to(dtype).requires_grad_() for x in arguments[:3])
    return *parameters, *arguments[3:]


def _values_and_gradients(function, arguments):
    result = function(*arguments)
    weight = torch.linspace(-1, 2, len(arguments[3])).to(result.loss.dtype)
    scalar = (weight * (2 * result.loss + result.log_ratio)).sum()
    return *(x.detach() for x in result), *torch.autograd.grad(scalar, arguments[:3])


def _composition(h, weight_c, bias_c, level, label, num_classes):
    return noise_level_ce(F.linear(h, weight_c, bias_c), level, label, num_classes)


@every_case
def test_it_is_the_head_followed_by_the_loss(case):
    with use_backend("reference"):
        expected = _values_and_gradients(_composition, case)
        own_reference = _values_and_gradients(head_noise_level_ce, case)
    got = _values_and_gradients(head_noise_level_ce, case)
    for values in zip(expected, own_reference, got, strict=True):
        torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
        torch.testing.assert_close(values[2], values[0])


@every_case
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_it_is_as_accurate_as_the_reference(poison_empty, case, dtype):
    with use_backend("reference"):
        truth = _values_and_gradients(head_noise_level_ce, case)
        plain = _values_and_gradients(head_noise_level_ce, _converted(case, dtype))
    got = _values_and_gradients(head_noise_level_ce, _converted(case, dtype))
    names = ("loss", "log_ratio", "grad_h", "grad_weight_c", "grad_bias_c")
    for name, *values in zip(names, got, plain, truth, strict=True):
        assert_kernel_accurate(*values, name)


@every_case
def test_gradient_is_the_derivative(case):
    *parameters, level, label, num_classes = case
    assert torch.autograd.gradcheck(
        lambda *inputs: tuple(head_noise_level_ce(*inputs, level, label, num_classes)), parameters
    )


@pytest.mark.parametrize("name", ["loss", "log_ratio"])
def test_the_gradient_of_one_output_alone(name):
    arguments = _case(6, 9, 4)
    expected = torch.autograd.grad(getattr(_composition(*arguments), name).sum(), arguments[:3])
    got = torch.autograd.grad(getattr(head_noise_level_ce(*arguments), name).sum(), arguments[:3])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("label", [None, -1], ids=["none", "minus-one"])
def test_a_missing_label_is_the_marginal_over_classes(label):
    *head, level, _, num_classes = _case(6, 9, 4)
    label = label if label is None else torch.full((6,), label)
    of_each = [head_noise_level_ce(*head, level, torch.full((6,), c), num_classes).loss for c in range(4)]
    got = head_noise_level_ce(*head, level, label, num_classes).loss
    expected = -(-torch.stack(of_each)).logsumexp(0)  # p(t) = sum_c p(t, c), below pure noise
    torch.testing.assert_close(got[:-1], expected[:-1])
    torch.testing.assert_close(got[-1], of_each[0][-1])


@pytest.mark.parametrize("shift", [-1e4, 1e4], ids=["low", "high"])
def test_large_logits_lose_nothing(monkeypatch, shift):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 50)
    h, weight_c, bias_c, *rest = _case(6, 9, 4)
    # Few enough bits that a sum in fp32 is exact, and so is adding the shift.
    h, weight_c, bias_c = ((x.detach() * 16).round() / 16 for x in (h, weight_c, bias_c))
    expected = head_noise_level_ce(h, weight_c, bias_c, *rest)
    got = head_noise_level_ce(h.float(), weight_c.float(), (bias_c + shift).float(), *rest)
    torch.testing.assert_close(got.loss.double(), expected.loss, rtol=0, atol=2e-5)
    torch.testing.assert_close(got.log_ratio.double(), expected.log_ratio, rtol=0, atol=2e-5)


def test_far_apart_logits_stay_finite(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 20)
    bias_c = torch.full((40,), -1e4)
    bias_c[3] = 1e4
    h, weight_c = torch.zeros(2, 3), torch.zeros(40, 3)
    result = head_noise_level_ce(h, weight_c, bias_c.requires_grad_(), torch.tensor([3, 5]))
    (gradient,) = torch.autograd.grad(result.loss.sum(), bias_c)
    assert result.loss.tolist() == [0.0, 2e4]
    assert gradient[5] == -1 and gradient[3] == 1 and float(gradient.sum()) == 0


def test_nan_is_passed_on_to_its_image_alone():
    h = torch.zeros(2, 3)
    h[0, 1] = float("nan")
    loss = head_noise_level_ce(h, torch.randn(40, 3), torch.zeros(40), torch.tensor([3, 5])).loss
    assert loss.isnan().tolist() == [True, False]


def test_a_level_out_of_range_inside_a_compiled_step_gives_nan():
    head = torch.randn(3, 4), torch.randn(12, 4), torch.randn(12)
    compiled = torch.compile(
        lambda level: head_noise_level_ce(*head, level).loss, fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.tensor([12, 3, -1])).isnan().tolist() == [True, False, True]


def test_compiles_whole():
    *head, level, label, num_classes = _case(6, 9, 4)

    def loss(*head):
        return head_noise_level_ce(*head, level, label, num_classes).loss.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*head), head)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*head), head), rtol=0, atol=0)


def test_opcheck():
    *head, level, label, num_classes = _case(6, 9, 4)
    torch.library.opcheck(torch.ops.cdm_fast.head_noise_level_ce.default, (*head, level, label, num_classes))


def test_autocast_changes_nothing():
    arguments = _converted(_case(6, 9, 4), torch.float32)
    expected = _values_and_gradients(head_noise_level_ce, arguments)
    with torch.autocast(arguments[0].device.type, torch.bfloat16):
        got = _values_and_gradients(head_noise_level_ce, arguments)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_second_derivative_exists_in_the_reference_and_raises_in_the_op():
    *head, level, label, num_classes = _case(3, 4, 2)

    def loss(*head):
        return head_noise_level_ce(*head, level, label, num_classes).loss

    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(loss, head, fast_mode=True)
    (gradient,) = torch.autograd.grad(loss(*head).sum(), head[0], create_graph=True)
    with pytest.raises(RuntimeError, match="head_noise_level_ce_backward has no derivative"):
        torch.autograd.grad(gradient.square().sum(), head[0])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_no_allocation_is_larger_than_a_block_or_an_argument(monkeypatch, backend):
    batch, num_classes = 16, 10
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", batch * num_classes * 20)
    arguments = _converted(_case(batch, 300, num_classes), torch.float32)
    with use_backend(backend):
        _values_and_gradients(head_noise_level_ce, arguments)  # a GPU's libraries take their workspace
    with torch.profiler.profile(profile_memory=True) as profile, use_backend(backend):
        _values_and_gradients(head_noise_level_ce, arguments)
    events = profile.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    logits = 4 * batch * len(arguments[1])
    allowed = 512 * -(-4 * max(module.BLOCK_ELEMENTS, arguments[1].numel()) // 512)  # a GPU's are multiples
    assert allowed < logits / 2
    assert largest >= logits if backend == "reference" else largest <= allowed


ZERO = torch.zeros(2, dtype=torch.int64)
BAD = {
    "h-int": (dict(h=torch.zeros(2, 3, dtype=torch.int32)), TypeError, "h: expected dtype"),
    "h-1d": (dict(h=torch.zeros(3)), ValueError, "h: expected shape"),
    "h-empty": (dict(h=torch.zeros(0, 3)), ValueError, "h: expected at least one example"),
    "weight-width": (dict(weight_c=torch.zeros(5, 4)), ValueError, r"weight_c: expected shape \(any, 3\)"),
    "weight-dtype": (
        dict(weight_c=torch.zeros(5, 3).double()),
        TypeError,
        "weight_c: expected dtype float32",
    ),
    "bias-shape": (dict(bias_c=torch.zeros(4)), ValueError, r"bias_c: expected shape \(5\), got \(4,\)"),
    "classes": (dict(num_classes=3), ValueError, "weight_c: expected .* num_classes K = 3, got 5"),
    "level-dtype": (dict(level=ZERO.int()), TypeError, "level: expected dtype int64, got int32"),
    "level-shape": (dict(level=ZERO[:1]), ValueError, r"level: expected shape \(2\), got \(1,\)"),
    "level-high": (dict(level=ZERO + 5), ValueError, "level: expected values in 0..4, got 5"),
    "level-low": (dict(level=ZERO - 1), ValueError, "level: expected values in 0..4, got -1"),
    "level-device": (dict(level=ZERO.to("meta")), ValueError, r"level: expected it on c\S+, got meta"),
    "label-high": (dict(label=ZERO + 2, num_classes=2), ValueError, "label: expected values in -1..1, got 2"),
    "label-shape": (dict(label=ZERO[:1], num_classes=2), ValueError, "label: expected shape"),
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("change", "error", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(backend, change, error, says):
    good = dict(h=torch.zeros(2, 3), weight_c=torch.zeros(5, 3), bias_c=torch.zeros(5), level=ZERO)
    with use_backend(backend), pytest.raises(error, match=says):
        head_noise_level_ce(**(good | change))


@pytest.mark.parametrize("block", [1, 1 << 20], ids=["one-level-a-block", "one-block"])
@pytest.mark.parametrize("rows", [[-1], [2], [12, 13, 14, 15], [0, 1, 2, 3, 20]], ids=str)
def test_logits_of_minus_infinity(monkeypatch, rows, block):
    """A bias of -inf, for pure noise or a class: values as the reference's, gradients as with a bias of -1e4.

    The reference's own gradients are NaN where all classes of a level are impossible.
    """
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    h, weight_c, bias_c, _, label, num_classes = _case(6, 9, 4)
    level = torch.tensor([4, 4, 0, 6, 1, 2])  # pure noise against itself would be NaN in the log-ratio

    def loss_and_gradients(function, impossible):
        bias = bias_c.detach().clone()
        bias[rows] = impossible
        leaves = h, weight_c, bias.requires_grad_()
        result = function(*leaves, level, label, num_classes)
        likely = result.loss[result.loss < 1e3]
        assert len(likely)
        gradients = torch.autograd.grad(likely.sum(), leaves)
        return (result.loss.detach(), result.log_ratio.detach()), gradients

    values, gradients = loss_and_gradients(head_noise_level_ce, -torch.inf)
    reference = module.head_noise_level_ce_reference
    torch.testing.assert_close(values, loss_and_gradients(reference, -torch.inf)[0])
    torch.testing.assert_close(gradients, loss_and_gradients(reference, -1e4)[1])
