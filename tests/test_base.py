"""The base beneath a network: closed forms, gradients against autograd, the fit, runs that have one."""

import copy
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.support.analytic import GaussianMixture
from cdm_fast import CDM, MLP, NoiseSchedule, UserError, cdm_loss, load, use_backend
from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData, batch_indices
from cdm_fast.model import cdm
from cdm_fast.model.base import fit_base
from cdm_fast.nn.base import FADE, MixtureBase
from cdm_fast.runs.build import build_model
from cdm_fast.runs.checkpoint import load_checkpoint
from cdm_fast.runs.data import run_data
from cdm_fast.training.base import begin_from_base
from cdm_fast.training.folds import step_indices, use_base_of_step
from cdm_fast.training.prepare import resolve
from cdm_fast.training.replay import replay
from cdm_fast.training.state import new_state
from tests.accuracy import relative_error
from tests.opaque import Opaque
from tests.test_cli import call, call_json
from tests.tiny_run import CLASSES, FLAGS, tiny_config, write_images

SCHEDULE = NoiseSchedule.uniform(T=20)
K, M, D = 3, 2, 5
LEVEL = torch.tensor([0, 1, 5, 20, 21, 12])
LABELS = {
    "labelled": torch.tensor([0, 1, 2, 0, 1, 2]),
    "mixed": torch.tensor([0, -1, 2, -1, 1, -1]),
    "none": None,
}
BASE = ["--base-components", "2", "--base-rank", "6"]


def random_base(num_classes: int, rank: int, seed: int = 0) -> tuple[MixtureBase, GaussianMixture]:
    """A base of M random Gaussians for each class, in fp64, and the same mixture by its covariances."""
    generator = torch.Generator().manual_seed(seed)
    num = M * num_classes

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    directions = torch.linalg.qr(draw(num, D, D)).Q[:, :rank]
    tensors = {
        "means": 2 * draw(num, D) - 1,
        "directions": directions,
        "variances": 0.3 + draw(num, rank),
        "rest": 0.05 + 0.1 * draw(num),
        "log_weights": draw(num).log().log_softmax(0),
    }
    base = MixtureBase(SCHEDULE.a, SCHEDULE.s, D, M, rank, num_classes).double()
    base.set(**tensors, temper=torch.tensor(0.7))
    excess = (tensors["variances"] - tensors["rest"][:, None])[:, :, None] * directions
    covariances = tensors["rest"][:, None, None] * torch.eye(D) + directions.transpose(1, 2) @ excess
    return base, GaussianMixture(tensors["log_weights"].exp(), tensors["means"], covariances)


def expected_logits(mixture: GaussianMixture, x: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The base's definition, from log-densities of full covariances: (B, N)."""
    each = mixture.components_log_prob(x, SCHEDULE.a, SCHEDULE.s)
    ratio = each - each[:, -1:]  # to pure noise
    fade = SCHEDULE.sigma[:-1] ** 4 / (SCHEDULE.sigma[:-1] ** 4 + FADE**4)
    parts = torch.zeros_like(ratio)
    for level in reversed(range(SCHEDULE.T + 1)):
        parts[:, level] = parts[:, level + 1] + fade[level] * (ratio[:, level] - ratio[:, level + 1])
    of_class = (parts + mixture.weights.log()).unflatten(2, (num_classes, M)).logsumexp(3)
    marginal = of_class.logsumexp(2)
    if num_classes == 1:
        return marginal
    variance = SCHEDULE.sigma[:-1] ** 2
    sharpness = (variance / (variance + 0.7))[:, None]
    joint = marginal[:, :-1, None] + (sharpness * of_class[:, :-1]).log_softmax(2)
    return torch.cat([joint.flatten(1), marginal[:, -1:]], 1)


@pytest.mark.parametrize("rank", [1, 3, D])
@pytest.mark.parametrize("num_classes", [1, K])
def test_logits_are_those_of_the_mixture(num_classes, rank):
    base, mixture = random_base(num_classes, rank)
    x = torch.randn(7, D, dtype=torch.float64)
    got = base.logits(base.read(x))
    torch.testing.assert_close(got, expected_logits(mixture, x, num_classes), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got[:, -1], torch.zeros(7).double(), rtol=0, atol=1e-6)


def test_far_above_the_fade_it_is_the_density_of_the_mixture():
    base, mixture = random_base(1, D)
    x, noisy = torch.randn(7, D, dtype=torch.float64), SCHEDULE.sigma > 3 * FADE
    exact = mixture.log_prob(x, SCHEDULE.a, SCHEDULE.s)
    error = (base.logits(base.read(x)) - (exact - exact[:, -1:]))[:, noisy]
    assert noisy.sum() > 4 and error.abs().max() < 0.02 * (exact - exact[:, -1:])[:, noisy].abs().max()


def with_base(conditioning: str, rank: int = 0) -> CDM:
    """An MLP with a base, in fp64; no weight is left where it starts."""
    classes = None if conditioning == "none" else K
    kind = "joint" if conditioning == "joint" else "embedding"
    network = MLP(
        D, SCHEDULE.num_levels, hidden=8, depth=1, num_classes=classes, conditioning=kind, head_rank=rank
    ).double()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3)
    network.base = random_base(K if kind == "joint" else 1, 3)[0]
    return CDM(network, SCHEDULE).double()


class Hidden(Opaque):
    """An opaque network that passes labels on."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.network(*inputs)


CASES = [("none", 0), ("embedding", 0), ("joint", 0), ("joint", 2)]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("conditioning", "rank"), CASES)
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_every_path_agrees_with_autograd(monkeypatch, conditioning, rank, labels, many):
    if many:
        monkeypatch.setattr(cdm, "MANY_CLASSES", 1 if conditioning == "joint" else 30)
    label = None if conditioning == "none" else LABELS[labels]
    fast = with_base(conditioning, rank)
    kind = {"class_prior": torch.ones(K), "conditioning": "joint"} if conditioning == "joint" else {}
    plain = CDM(Hidden(fast.network), SCHEDULE, input_shape=(D,), **kind).double()
    x = torch.randn(6, D, dtype=torch.float64)
    torch.testing.assert_close(fast.logits(x, label), plain.logits(x, label), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        fast.score(x, LEVEL, label), plain.score(x, LEVEL, label), rtol=1e-9, atol=1e-9
    )
    if conditioning == "joint":
        level = LEVEL.clamp(max=SCHEDULE.T)
        shift = fast.class_logits(x, level) - plain.class_logits(x, level)
        torch.testing.assert_close(shift, torch.zeros_like(shift), rtol=0, atol=1e-9)
        if labels == "labelled":
            got, expected = (model.guided_denoise(x, LEVEL, label, 1.5) for model in (fast, plain))
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        weight = torch.rand(6, K + 1, dtype=torch.float64)
        for got, expected in zip(
            *(model.log_prob_levels_each_and_pullback(x) for model in (fast, plain)), strict=True
        ):
            if callable(got):
                got, expected = got(level, weight), expected(level, weight)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    eps = torch.randn_like(x)
    gradients = []
    for model in (fast, plain):
        with use_backend("reference"):
            loss = cdm_loss(model, x, LEVEL, eps, label, class_weight=0.2 * (conditioning == "joint")).loss
        gradients.append(torch.autograd.grad(loss, list(fast.network.parameters())))
    for got, expected in zip(*gradients, strict=True):
        assert relative_error(got, expected) < 1e-9


def test_training_and_likelihood_are_one_graph():
    torch.compiler.reset()
    model, x = with_base("joint", 2), torch.randn(6, D, dtype=torch.float64)
    eps, label = torch.randn_like(x), LABELS["labelled"]
    for function in (
        lambda x: cdm_loss(model, x, LEVEL, eps, label).loss,
        lambda x: model.log_prob(x),
        lambda x: model.denoise(x, LEVEL, label),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), function(x)) < 1e-10


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("base") / "images.npz", count=240)


def begun(config, data):
    """The state of a run before its first step, and its config with everything resolved."""
    config = resolve(config, data, torch.device("cpu"))
    state = new_state(config, torch.device("cpu"))
    begin_from_base(config, state, data)
    return state, config


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_begins_at_its_base_and_denoises_better_than_without(images, rank):
    config = tiny_config(images)
    network = replace(config.network, conditioning="joint", head_rank=rank, base_components=2, base_rank=6)
    config = replace(config, network=network)
    data = run_data(config, "train")
    state, config = begun(config, data)
    label = data.labels[:64]
    x0 = (data.images[:64].float() + 0.5) * (2 / data.num_grey_levels) - 1
    for model in (state.model.eval(), state.ema.model):
        read = model.network.base.read(x0)
        levels = model.log_level_prior - model.log_level_prior[-1]
        shift = torch.cat([levels[:-1].repeat_interleave(CLASSES), levels[-1:]]).float()
        torch.testing.assert_close(model.logits(x0), model.network.base.logits(read) + shift)
    without = build_model(replace(config, network=replace(config.network, base_components=0)))
    for level in (5, 7, 8):
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(level))
        x = model.schedule.noise(x0, level, eps)
        errors = [(m.denoise(x, level, label) - eps).square().mean() for m in (model, without)]
        assert errors[0] < 0.5 * errors[1]


def test_the_fit_recovers_gaussians():
    """Two classes of 4 x 4 pixels: one is N(m, diag) along the axes, the other two tight groups."""
    rng = np.random.default_rng(0)
    wide = 128 + rng.normal(size=(4000, 16)) * np.array([40.0, 20.0] + [4.0] * 14)
    centres = np.where(rng.integers(0, 2, 4000)[:, None] == 0, 60, 200)
    pixels = np.stack([wide, centres + 3 * rng.normal(size=(4000, 16))], 1).reshape(-1, 4, 4)
    data = replace(
        load_images(np.clip(np.rint(pixels), 0, 255)), labels=torch.arange(8000) % 2, num_classes=2
    )
    config = tiny_config("unused")
    network = replace(config.network, conditioning="joint", base_components=2, base_rank=3)
    state, _ = begun(replace(config, network=network), data)
    base = state.model.network.base
    unit = 2 / 256
    tight = base.means[2:].mean(1).sort().values
    torch.testing.assert_close(tight, torch.tensor([60.5, 200.5]) * unit - 1, rtol=0, atol=0.01)
    torch.testing.assert_close(base.rest[2:].sqrt(), torch.full((2,), 3.0 * unit), rtol=0.05, atol=0)
    # The wide class is cut in two across its longest axis; within the groups the second axis is whole.
    second = base.variances[:2].sqrt().sort(1).values[:, 1:] / unit
    assert ((second - 20).abs().min(1).values < 1.5).all()
    torch.testing.assert_close(base.log_weights.exp()[2:], torch.tensor([0.25, 0.25]), rtol=0, atol=0.02)
    torch.testing.assert_close(base.log_weights.exp().sum(), torch.tensor(1.0))


def test_each_fold_is_fitted_without_its_rows():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(300) // 100
    x0 = label[:, None] + torch.rand(300, D, generator=generator)

    def fitted(rows: torch.Tensor, label: torch.Tensor, folds: int = 0) -> MixtureBase:
        model = with_base("joint").float()
        fit_base(model, rows, label, folds=folds)
        return model.network.base

    base = fitted(x0, label, folds=3)
    whole = base.tables()
    x = torch.randn(8, D)
    expected = base.logits(base.read(x))
    for fold in range(3):
        kept = torch.arange(300) % 3 != fold
        alone = fitted(x0[kept], label[kept])
        alone.set(temper=base.temper)
        base.use_fold(fold)
        assert not torch.equal(base.tables().coefficients, whole.coefficients)
        for own, other in zip(base.tables(), alone.tables(), strict=True):
            torch.testing.assert_close(own, other)
        torch.testing.assert_close(base.logits(base.read(x)), alone.logits(alone.read(x)))
    again = with_base("joint").float().network.base
    again.load_state_dict(base.state_dict())  # that of the base that was fitted to all rows
    base.use_fold(None)
    for own in (base, again):
        torch.testing.assert_close(own.logits(own.read(x)), expected)


def test_a_class_with_few_rows_is_in_the_base_of_every_fold():
    model = with_base("joint").float()
    label = torch.tensor([0] * 40 + [1] * 40 + [2] * 4)
    with pytest.warns(UserWarning, match="too few training images outside a fold, in class 2"):
        fit_base(model, torch.randn(84, D), label, folds=3)
    assert all(torch.isfinite(table).all() for fold in model.network.base.folds for table in fold)


def test_a_fold_tells_no_more_about_its_rows_than_about_others():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(480, D, generator=generator)
    model = with_base("none").float()
    fit_base(model, rows[:240], folds=4)
    base, level = model.network.base, 8

    def mean_logit(x: torch.Tensor) -> float:
        noised = SCHEDULE.noise(x, level, generator=torch.Generator().manual_seed(1))
        return float(base.logits(base.read(noised))[:, level].mean())

    own, new = mean_logit(rows[:240]), mean_logit(rows[240:])
    folds = []
    for fold in range(4):
        base.use_fold(fold)
        folds.append((mean_logit(rows[:240][fold::4]), mean_logit(rows[240:])))
    of_fold, of_others = np.mean(folds, axis=0)
    assert own - new > 0.02 and abs(of_fold - of_others) < 0.5 * (own - new)


def test_the_images_of_a_step_are_those_of_one_fold(images):
    config = tiny_config(images)
    assert torch.equal(step_indices(45, config, 3), batch_indices(45, config.train.batch_size, 0, 3))
    network = replace(config.network, base_components=2, base_rank=6)
    config = replace(config, network=network)
    steps = [step_indices(45, config, step) for step in range(40)]
    of_fold = [torch.cat(steps[fold::4]).unique().tolist() for fold in range(4)]
    assert sorted(sum(of_fold, [])) == list(range(45))
    assert max(map(len, of_fold)) - min(map(len, of_fold)) == 1


def test_a_step_is_taken_beside_the_base_without_its_images(images):
    config = tiny_config(images)
    network = replace(config.network, conditioning="joint", base_components=2, base_rank=6)
    data = run_data(config, "train")
    seen = step_indices(len(data), replace(config, network=network), 1)
    other = data.images.clone()
    other[seen] = data.num_grey_levels - 1 - other[seen]
    states = []
    for pixels in (data.images, other):
        state, _ = begun(replace(config, network=network), replace(data, images=pixels))
        use_base_of_step(state.model, 1)
        states.append(state)
    one, two = (state.model.network.base.tables() for state in states)
    for name in ("rows", "coefficients"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    one, two = (state.ema.model.network.base.tables() for state in states)
    assert not torch.equal(one.coefficients, two.coefficients)


def test_half_of_each_fold_is_mirrored(images):
    config = tiny_config(images)
    network = replace(config.network, base_components=1, base_rank=2)
    ramp = torch.arange(8, dtype=torch.uint8).expand(160, 1, 8, 8)
    data = ImageData(ramp.clone(), None, 17, None, "made", "train")
    config = replace(config, network=network, data=replace(config.data, flip=True))
    state, _ = begun(config, data)
    base = state.model.network.base
    mean = [tables.rows[2].view(8, 8)[0] for tables in (base.tables(), *base.folds)]
    for row in mean:
        torch.testing.assert_close(row, row.flip(0), rtol=0, atol=0.02)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_fewer_images_than_folds(images, count):
    config = tiny_config(images)
    network = replace(config.network, base_components=1, base_rank=2)
    config = replace(config, network=network)
    data = run_data(config, "train")
    data = replace(data, images=data.images[:count], labels=data.labels[:count])
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        state, config = begun(config, data)
    assert len(state.model.network.base.folds) == min(count, 4)
    seen = torch.cat([step_indices(count, config, step) for step in range(8)])
    assert sorted(seen.unique().tolist()) == list(range(count))


def test_equal_rows_and_large_seeds():
    model = with_base("joint").float()
    x0 = torch.cat([torch.zeros(40, D), torch.randn(80, D)])
    fit_base(model, x0, torch.arange(120) // 40, seed=2**63)
    assert all(torch.isfinite(value).all() for value in model.network.base.state_dict().values())
    with pytest.raises(UserError, match="folds is 1; give 2 or more"):
        fit_base(model, x0, torch.arange(120) // 40, folds=1)


def test_folds_follow_the_base():
    model = with_base("joint").float()
    with torch.inference_mode():
        fit_base(model, torch.randn(90, D), torch.arange(90) // 30, folds=2)
    model.network.base.use_fold(1)
    base = model.double().network.base
    assert all(table.dtype == torch.float64 for tables in base.folds for table in tables)
    assert all(table.is_meta for tables in copy.deepcopy(base).to("meta").folds for table in tables)


def test_a_run_with_a_base_is_not_tuned_to_other_classes(images, tmp_path):
    flags = [*FLAGS, *BASE, "--conditioning", "joint", "--device", "cpu", "--data", images]
    call_json("train", *flags, "--out", tmp_path / "run")
    with np.load(images) as members:
        few = members["labels"] < 2
        np.savez(tmp_path / "two.npz", images=members["images"][few], labels=members["labels"][few])
    tuned = ["--finetune", tmp_path / "run", "--data", tmp_path / "two.npz", "--out", tmp_path / "tuned"]
    status, _, error = call("train", *tuned, "--device", "cpu")
    assert status == 2 and f"has a base of {CLASSES} classes, and the data have 2" in error


def test_replay_uses_the_base_without_the_images_of_the_step(images, tmp_path):
    flags = [*FLAGS, *BASE, "--conditioning", "joint", "--device", "cpu", "--data", images]
    flags += ["--dropout", "0.2", "--dropout-until", "0.5", "--log-every", "1", "--save-every", "1"]
    call_json("train", *flags, "--out", tmp_path / "run", "--keep", "9")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in log if "loss" in row}
    for step in (3, 4):
        again = replay(tmp_path / "run", step, device="cpu")["loss"]
        assert again == pytest.approx(losses[step + 1], rel=1e-6)


def load_images(pixels):
    images = torch.from_numpy(pixels).to(torch.uint8)[:, None]
    return ImageData(images, None, 256, None, "made", "train")


def test_runs_with_a_base_resume_load_and_tune(images, tmp_path):
    flags = [*FLAGS, *BASE, "--conditioning", "joint", "--device", "cpu", "--data", images]
    call_json("train", *flags, "--out", tmp_path / "whole", "--save-every", "3")
    call_json("train", *flags, "--out", tmp_path / "parts", "--save-every", "3", "--max-time", "0")
    call_json("train", "--resume", tmp_path / "parts", "--device", "cpu")
    whole, parts = (load_checkpoint(tmp_path / name).tensors for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items())
    model = load(tmp_path / "whole")
    again = load(tmp_path / "parts")
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(model.log_prob(x), again.log_prob(x)) and model.network.base is not None
    assert not torch.equal(model.network.base.means, torch.zeros_like(model.network.base.means))
    tuned = ["--finetune", tmp_path / "whole", "--out", tmp_path / "tuned", "--lr", "0", "--steps", "2"]
    call_json("train", *tuned, "--data", images, "--device", "cpu")
    torch.testing.assert_close(load(tmp_path / "tuned").log_prob(x), model.log_prob(x), rtol=1e-5, atol=1e-3)


def test_a_base_that_cannot_be_fitted_is_refused(images, tmp_path):
    flags = [*FLAGS, "--device", "cpu", "--data", images, "--out", tmp_path / "run"]
    status, _, error = call("train", *flags, "--conditioning", "joint", "--base-components", "50")
    assert status == 2 and not (tmp_path / "run").exists()
    assert "a base of 50 Gaussians needs at least 100 training images of each class" in error


@pytest.mark.parametrize("objective", ["ddm", "classifier"])
def test_other_objectives_have_no_base(images, tmp_path, objective):
    flags = [*FLAGS, *BASE, "--device", "cpu", "--data", images, "--out", tmp_path / "run"]
    call_json("train", *flags, "--objective", objective, "--architecture", "unet", "--conditioning", "none")
    assert not any("base" in name for name in load_checkpoint(tmp_path / "run").tensors["model"])


def test_without_a_base_the_config_builds_none():
    assert build_model(RunConfig()).network.base is None
    with pytest.raises(UserError, match="base-components is 2000; give 1024 or less"):
        build_model(replace(RunConfig(), network=replace(RunConfig().network, base_components=2000)))
    with pytest.raises(UserError, match="of 10240 Gaussians would have .* give fewer --base-components"):
        network = replace(RunConfig().network, conditioning="joint", base_components=1024)
        build_model(replace(RunConfig(), network=network))
