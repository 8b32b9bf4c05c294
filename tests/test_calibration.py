"""Calibration: a planted constant per level is measured and subtracted; runs store, report and remove it."""

import json
import math

import pytest
import torch

from cdm_fast import CDM, NoiseSchedule, UserError
from cdm_fast.data import ImageData
from cdm_fast.likelihood.units import nats_per_bit_per_dim
from cdm_fast.nn.heads import CumulativeHead, JointHead, LowRankHead, noise_head
from cdm_fast.nn.network import AdjointNetwork
from cdm_fast.runs.calibrate import calibrate
from cdm_fast.runs.calibration import fold
from cdm_fast.runs.load import load
from tests.opaque import Opaque
from tests.test_cli import call, call_json
from tests.tiny_run import FLAGS, write_images

T, CLASSES, VARIANCE, DIM = 40, 3, 0.2, 4
SCHEDULE = NoiseSchedule.uniform(T)
RAMP = torch.linspace(3, 0, T + 2, dtype=torch.float64)
MARGINAL_VARIANCE = SCHEDULE.a**2 * VARIANCE + SCHEDULE.s**2  # (L,)


class GaussianPixels(AdjointNetwork):
    """The exact classifier of Gaussian pixels, whose log ratios are linear in |x|^2; classes are alike."""

    input_shape = (1, 2, 2)

    def __init__(self, shift, conditioning):
        super().__init__()
        self.num_classes, self.conditioning = (CLASSES if conditioning == "joint" else None), conditioning
        self.linear_layer = noise_head(1, T + 2, self.num_classes, conditioning).double()
        head, weight = self.linear_layer, -0.5 / MARGINAL_VARIANCE
        with torch.no_grad():
            head.bias.zero_()
            head.shift(weight)  # rows that cumulate to it
            head.weight[:, 0] = head.bias
            head.bias.zero_()
            head.shift(shift - DIM / 2 * MARGINAL_VARIANCE.log() + self._log_share())

    def _log_share(self):
        """log p(c) at the levels that know classes."""
        return -math.log(self.num_classes or 1) * (torch.arange(T + 2) <= T)

    def features(self, x, label=None, keep_residuals=True):
        return x.square().flatten(1).sum(1, keepdim=True), x

    def adjoint(self, residuals, g):
        return 2 * g.view(-1, 1, 1, 1) * residuals


def pixels(num=200, grey=256):
    x = VARIANCE**0.5 * torch.randn(num, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images = ((x.clamp(-0.999, 0.999) + 1) * grey / 2).floor().to(torch.uint8)
    return ImageData(images, torch.arange(num) % CLASSES, grey, CLASSES, name="gaussian", split="validation")


def exact(x):
    """(B, L) log p_t."""
    square = x.square().flatten(1).sum(1, keepdim=True)
    return -0.5 * (square / MARGINAL_VARIANCE + DIM * (2 * math.pi * MARGINAL_VARIANCE).log())


@pytest.fixture(params=["embedding", "joint"])
def shifted(request):
    """A model whose level t is off by the constant RAMP[t]."""
    return CDM(GaussianPixels(RAMP, request.param), SCHEDULE)


X = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LEVEL = torch.tensor([0, 1, 7, T, T + 1])


@pytest.mark.parametrize(
    "head",
    [CumulativeHead(5, 7), JointHead(5, 7, 4), LowRankHead(5, 7, 4, rank=2)],
    ids=lambda h: type(h).__name__,
)
def test_shift_adds_to_every_logit_of_its_level(head):
    head = head.double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    h, by = torch.randn(3, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    before = head(h)
    head.shift(by)
    classes = 1 if type(head) is CumulativeHead else 4
    wanted = torch.cat([by[:-1].repeat_interleave(classes), by[-1:]])
    assert torch.allclose(head(h) - before, wanted.expand_as(before), atol=1e-12)


def test_folding_the_constants_in_gives_the_exact_density(shifted):
    score = shifted.score(X, LEVEL)
    assert torch.allclose(shifted.log_prob_levels(X), exact(X) + RAMP, atol=1e-10)
    fold(shifted, tuple(RAMP.tolist()))
    assert torch.allclose(shifted.log_prob_levels(X), exact(X), atol=1e-10)
    assert torch.equal(shifted.score(X, LEVEL), score)
    if shifted.num_classes is not None:
        of_class = shifted.log_prob_levels(X, label=torch.arange(5) % CLASSES)
        assert torch.allclose(of_class, exact(X), atol=1e-10)


def test_particles_recover_a_planted_shift(shifted):
    found = calibrate(shifted, pixels(), particles=200, runs=3)
    assert found.log_z == pytest.approx(RAMP.tolist(), abs=0.15)
    assert found.log_z_up == pytest.approx(float(RAMP[0]), abs=0.15)
    assert torch.allclose(shifted.log_prob_levels(X), exact(X), atol=0.15)
    assert nats_per_bit_per_dim(pixels()) == pytest.approx(DIM * math.log(2))  # as the nll command converts


def test_a_network_without_our_head_is_refused():
    model = CDM(Opaque(GaussianPixels(RAMP, "embedding")), SCHEDULE, input_shape=(1, 2, 2))
    with pytest.raises(UserError, match="no such head"):
        calibrate(model, pixels())
    with pytest.raises(UserError, match="3 constants do not fit the 42 levels"):
        fold(model, (0.0, 0.0, 0.0))


def test_a_run_keeps_its_calibration_and_gives_it_up(tmp_path):
    data, run = write_images(tmp_path / "images.npz"), tmp_path / "run"
    call_json("train", "--data", data, "--out", run, *FLAGS, "--conditioning", "joint", "--device", "cpu")
    quick = ["--particles", "8", "--runs", "2", "--rungs", "3", "--device", "cpu"]
    before = call_json("nll", run)
    found = call_json("calibrate", run, *quick)
    after = call_json("nll", run)
    stored = json.loads((run / "calibration.json").read_text())
    constant = stored["log_z"][0] / (64 * math.log(2))
    assert found["after"]["bits_per_dim"] - found["before"]["bits_per_dim"] == pytest.approx(
        constant, abs=1e-4
    )
    assert after["bits_per_dim"] == pytest.approx(before["bits_per_dim"] + constant, abs=1e-4)
    assert after["uncalibrated_bits_per_dim"] == pytest.approx(before["bits_per_dim"], abs=1e-4)
    call_json("calibrate", run, *quick)
    assert json.loads((run / "calibration.json").read_text()) == stored  # from the trained weights
    assert "calibrated; " in call("nll", run)[1] and "uncalibrated_bits_per_dim" not in before
    damaged = run / "calibration.json"
    damaged.write_text(json.dumps({**stored, "weights": "0" * 64}))
    with pytest.warns(UserWarning, match="other weights"):
        load(run)
    damaged.write_text("{")
    assert call("nll", run)[0] == 2
    assert call_json("calibrate", run, "--undo")["undone"]
    assert call_json("nll", run)["bits_per_dim"] == before["bits_per_dim"]
    status, _, err = call("calibrate", run, "--undo")
    assert status == 2 and "not calibrated" in err
