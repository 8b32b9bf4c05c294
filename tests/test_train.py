"""The training step, its parts, and runs that are interrupted, resumed, or diverge."""

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from cdm_fast import CDM, MLP, NoiseSchedule
from cdm_fast.config import NetworkConfig, TrainConfig
from cdm_fast.data import load_data
from cdm_fast.errors import DiskError, UserError
from cdm_fast.model.losses import Noised, draw_other_classes, noised_cdm_loss
from cdm_fast.runs.build import build_model
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.load import load
from cdm_fast.training import finish as module
from cdm_fast.training.ema import Ema
from cdm_fast.training.prepare import resolve
from cdm_fast.training.state import new_state
from cdm_fast.training.step import (
    derived_seed,
    draw_batch,
    learning_rate,
    make_loss,
    set_dropout,
    training_step,
)
from cdm_fast.training.stop import Stopper
from cdm_fast.training.train import resume, train
from tests.accuracy import TOLERANCE, relative_error
from tests.opaque import Opaque
from tests.tiny_run import GREY_LEVELS, tiny_config, write_images

CPU = torch.device("cpu")
TIMINGS = {"seconds", "images_per_second"}


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images.npz")


@pytest.fixture
def config(images):
    return tiny_config(images)


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the final pictures and score, which cost more than the training."""
    monkeypatch.setattr(module, "write_final", lambda *_: {})


def without_dropout(config):
    return replace(config, network=replace(config.network, dropout=0.0))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step_once(config, state, batch, **options):
    return training_step(
        state.model, state.optimizer, state.ema, batch, make_loss(config.train), step=state.step, **options
    )


def test_step_is_plain_adam_on_the_loss(config):
    config = without_dropout(config)
    state, plain = new_state(config, CPU), new_state(config, CPU).model
    batch = draw_batch(load_data(config.data.source), state.model, config, 0)
    result = step_once(config, state, batch)
    optimizer = torch.optim.Adam(plain.parameters(), lr=config.train.lr)
    terms = noised_cdm_loss(plain, batch)
    terms.loss.backward()
    norm = gradient(plain).norm()
    optimizer.step()
    torch.testing.assert_close(weights(state.model), weights(plain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(result[:4]), torch.stack([terms.loss, terms.ce, terms.mse, norm]))
    assert not result.bad


@pytest.mark.parametrize("rank", [0, 2])
def test_class_weight_adds_the_cross_entropy_of_classes(config, rank):
    network = replace(config.network, conditioning="joint", head_rank=rank, dropout=0.0)
    config = replace(config, network=network)
    model = new_state(resolve(config, load_data(config.data.source), CPU), CPU).model
    for parameter in model.network.linear_layer.parameters():
        torch.nn.init.normal_(parameter)
    batch = draw_batch(load_data(config.data.source), model, config, 0)
    classes = model.num_classes
    expected = 0.0
    for z, level, label in zip(model.logits(batch.x_t).detach(), batch.level, batch.label, strict=True):
        if label >= 0 and level <= config.schedule.T:
            of_level = z[level * classes : (level + 1) * classes]
            expected += float(of_level.logsumexp(0) - of_level[label]) / len(batch.x_t)
    plain = make_loss(replace(config.train, class_weight=0.0))(model, batch).loss
    weighted = make_loss(replace(config.train, class_weight=0.5))(model, batch).loss
    assert expected > 0.1
    assert float((weighted - plain).detach()) == pytest.approx(0.5 * expected, rel=1e-3)


def test_class_weight_of_an_embedding_compares_two_classes(config):
    network = replace(config.network, conditioning="embedding", dropout=0.0)
    config = replace(config, network=network, train=replace(config.train, class_weight=0.5))
    data = load_data(config.data.source)
    model = new_state(resolve(config, data, CPU), CPU).model
    for parameter in model.network.linear_layer.parameters():
        torch.nn.init.normal_(parameter)
    batch = draw_batch(data, model, config, 0)
    log_prior, expected = model.log_class_prior, 0.0
    for x, level, label, other in zip(batch.x_t, batch.level, batch.label, batch.other, strict=True):
        assert label == other == -1 or 0 <= other < model.num_classes and other != label
        if label >= 0 and level <= config.schedule.T:
            ratio = [
                float(model.log_prob_levels(x[None], label=c[None]).detach()[0, level] + log_prior[c])
                for c in (label, other)
            ]
            expected += math.log1p(math.exp(ratio[1] - ratio[0])) / len(batch.x_t)
    plain = make_loss(replace(config.train, class_weight=0.0))(model, batch).loss
    weighted = make_loss(config.train)(model, batch).loss
    assert expected > 0.1
    assert float((weighted - plain).detach()) == pytest.approx(0.5 * expected, rel=1e-3)
    assert (draw_batch(data, model, config, 1).other != batch.other).any()


def embedding_of(num_classes):
    schedule = NoiseSchedule.uniform(T=10)
    torch.manual_seed(0)
    return CDM(MLP(3, schedule.num_levels, hidden=8, num_classes=num_classes).double(), schedule)


def test_other_classes_are_equally_likely():
    label = torch.arange(4).repeat(6000)
    other = draw_other_classes(embedding_of(4), label, 0.1, torch.Generator().manual_seed(0))
    counts = torch.zeros(4, 4).index_put_((label, other), torch.ones(()), accumulate=True)
    assert (counts.diagonal() == 0).all()
    apart = counts[~torch.eye(4, dtype=torch.bool)]
    assert (apart - 2000).abs().max() < 5 * (6000 * 2 / 9) ** 0.5
    assert draw_other_classes(embedding_of(2), torch.tensor([-1, 1]), 0.1).tolist() == [-1, 0]
    assert draw_other_classes(embedding_of(1), torch.zeros(2).long(), 0.1) is None
    assert draw_other_classes(embedding_of(2), torch.zeros(2).long(), 0.0) is None


def test_two_classes_are_compared_alike_without_an_adjoint():
    model, level = embedding_of(3), torch.tensor([0, 3, 10, 11])
    general = CDM(OpaqueOfClasses(model.network), model.schedule, class_prior=torch.tensor([1.0, 2.0, 3.0]))
    model = CDM(model.network, model.schedule, class_prior=torch.tensor([1.0, 2.0, 3.0]))
    label, other = torch.tensor([2, -1, 0, 1]), torch.tensor([1, -1, 2, 2])
    batch = Noised(torch.randn(4, 3).double(), torch.randn(4, 3).double(), level, label, other=other)
    found = []
    for each in (model, general):
        loss = noised_cdm_loss(each, batch, class_weight=0.5).loss
        parameters = list(model.network.parameters())
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    assert relative_error(found[0], found[1]) < 1e-9


class OpaqueOfClasses(Opaque):
    """Takes a label."""

    def forward(self, x, label=None):
        return self.network(x, label)


def test_parts_add_up_to_the_whole_batch(config):
    config = without_dropout(config)
    whole, parts = new_state(config, CPU), new_state(config, CPU)
    batch = draw_batch(load_data(config.data.source), whole.model, config, 0)
    one, four = step_once(config, whole, batch), step_once(config, parts, batch, parts=4)
    torch.testing.assert_close(torch.stack(one[:4]), torch.stack(four[:4]))
    assert relative_error(gradient(parts.model), gradient(whole.model)) < TOLERANCE[torch.float32]


def test_clipping_shortens_the_gradient(config):
    state = new_state(without_dropout(config), CPU)
    batch = draw_batch(load_data(config.data.source), state.model, config, 0)
    result = step_once(config, state, batch, clip_norm=0.001)
    norm = gradient(state.model).norm()
    assert result.grad_norm > 0.001
    assert norm == pytest.approx(0.001, rel=1e-3)


def test_step_that_is_not_finite_changes_nothing_but_the_count(config):
    state = new_state(config, CPU)
    batch = draw_batch(load_data(config.data.source), state.model, config, 0)
    state.record(step_once(config, state, batch))
    before = weights(state.model)
    moments = [value.clone() for s in state.optimizer.state.values() for value in s.values()]
    state.record(step_once(config, state, batch._replace(x_t=batch.x_t * float("nan"))))
    assert torch.equal(weights(state.model), before)
    after = [value for s in state.optimizer.state.values() for value in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert torch.isfinite(weights(state.ema.model)).all()
    assert state.bad.tolist() == [1, 1, 1]
    assert math.isfinite(state.numbers(config)["loss"])
    state.record(step_once(config, state, batch))
    assert state.bad.tolist() == [1, 0, 1]


def test_bf16_step_is_close_to_fp32(config):
    config = without_dropout(config)
    fp32, bf16 = new_state(config, CPU), new_state(config, CPU)
    batch = draw_batch(load_data(config.data.source), fp32.model, config, 0)
    exact = step_once(config, fp32, batch)
    rounded = step_once(config, bf16, batch, precision="bf16")
    torch.testing.assert_close(torch.stack(rounded[:4]), torch.stack(exact[:4]), rtol=3e-2, atol=1e-3)
    assert {p.dtype for p in bf16.model.parameters()} == {torch.float32}


def test_average_warms_up_then_decays():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    ema, expected = Ema(model, decay=0.5), 0.0
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5]):
        torch.nn.init.constant_(model.weight, step + 1.0)
        ema.update(step)
        expected = decay * expected + (1 - decay) * (step + 1.0)
        assert float(ema.model.weight) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({"decay": "none", "warmup": 4}, 0, 0.25),
        ({"decay": "none", "warmup": 4}, 3, 1.0),
        ({"decay": "none", "warmup": 0}, 0, 1.0),
        ({"decay": "none"}, 999, 1.0),
        ({"decay": "step", "decay_every": 10, "decay_factor": 0.1}, 9, 1.0),
        ({"decay": "step", "decay_every": 10, "decay_factor": 0.1}, 25, 0.01),
        ({"decay": "cosine", "steps": 1000}, 500, 0.5),
        ({"decay": "cosine", "steps": 1000}, 1000, 0.0),
    ],
    ids=str,
)
def test_learning_rate(settings, step, expected):
    config = TrainConfig(**{"lr": 1.0, "warmup": 1, **settings})
    assert learning_rate(config, step) == pytest.approx(expected)


def test_derived_seeds_differ_by_every_argument():
    seeds = {derived_seed(a, b, c) for a in range(5) for b in range(5) for c in ("x", "y")}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_batch_is_a_function_of_seed_and_step(config):
    config = replace(config, data=replace(config.data, flip=True))
    config = replace(config, network=replace(config.network, conditioning="embedding"))
    data, model = load_data(config.data.source), build_model(config)
    first = draw_batch(data, model, config, 3)
    torch.rand(7)
    again = draw_batch(data, model, config, 3)
    assert first.attacked is again.attacked is None
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    other_step = draw_batch(data, model, config, 4)
    other_seed = draw_batch(data, model, replace(config, train=replace(config.train, seed=1)), 3)
    assert not torch.equal(first.eps, other_step.eps)
    assert not torch.equal(first.eps, other_seed.eps)


def test_batch_is_what_the_config_says(config):
    config = replace(config, train=replace(config.train, batch_size=4000, label_dropout=0.25))
    config = replace(config, network=replace(config.network, conditioning="embedding"))
    model = build_model(config)
    batch = draw_batch(load_data(config.data.source), model, config, 0)
    assert batch.x_t.shape == batch.eps.shape == (4000, 1, 8, 8)
    clean = batch.x_t[batch.level == 0]
    assert -1 <= clean.min() and clean.max() < 1
    assert clean.unique().numel() > 10 * GREY_LEVELS  # dequantised
    a, s = model.amplitudes(batch.level, batch.eps)
    x0 = ((batch.x_t - s * batch.eps) / a)[batch.level < 9]
    assert -1 - 1e-5 <= x0.min() and x0.max() < 1 + 1e-5
    assert set(batch.level.tolist()) == set(range(10))
    assert float((batch.label == -1).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert abs(float(batch.eps.mean())) < 0.01 and float(batch.eps.std()) == pytest.approx(1, abs=0.01)


def test_points_are_trained_on_without_noise(config):
    config = replace(
        config,
        data=replace(config.data, pixels="points", flip=True),
        train=replace(config.train, batch_size=256),
        schedule=replace(config.schedule, T=4),
    )
    model = build_model(config)
    batch = draw_batch(load_data(config.data.source), model, config, 0)
    clean = batch.x_t[batch.level == 0]
    assert len(clean) > 10 and float(clean.min()) == -1 and float(clean.max()) == 1
    grey = (clean + 1) * 8  # 17 levels
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=1e-5)


def test_training_lowers_the_loss(quick, tmp_path, config):
    config = replace(config, train=replace(config.train, steps=60, lr=2e-3, batch_size=16))
    config = replace(config, output=replace(config.output, log_every=20))
    train(config, tmp_path / "run", device="cpu")
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert len(losses) == 3
    assert losses[2] < 0.8 * losses[0]


def log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def stop_after(monkeypatch, steps):
    """Makes the next training stop as if by a signal once it has taken so many more steps."""
    asked = iter(range(10**6))
    reason = property(lambda self: "signal" if next(asked) >= steps else None)
    monkeypatch.setattr(Stopper, "reason", reason)


def resumable(images, precision, conditioning):
    """A run with everything that could break exactness: dropout, flips, classes, parts, mid-epoch stops, and
    attacks on joint logits."""
    settings = {"accumulate": 2, "clip_norm": 0.5, "optimizer": "adamw", "weight_decay": 0.01}
    if conditioning == "joint":
        settings |= {"adversarial": "linf", "budget": 0.2, "adversarial_steps": 2}
    config = tiny_config(images, precision=precision, **settings)
    return replace(
        config,
        data=replace(config.data, flip=True),
        network=replace(config.network, conditioning=conditioning),
        output=replace(config.output, evaluate_every=4, sample_every=5),
    )


@pytest.mark.parametrize(
    ("steps_before", "precision", "conditioning"),
    [(0, "fp32", "embedding"), (1, "bf16", "embedding"), (3, "fp32", "joint"), (5, "bf16", "joint")],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    quick, tmp_path, images, monkeypatch, steps_before, precision, conditioning
):
    config = resumable(images, precision, conditioning)
    train(config, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patched:
        stop_after(patched, steps_before)
        assert train(config, tmp_path / "parts", device="cpu")["stopped"] == "signal"
    assert load_checkpoint(tmp_path / "parts").step == steps_before
    assert resume(tmp_path / "parts", device="cpu")["stopped"] == "finished"
    whole, parts = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    for part, tensors in whole.tensors.items():
        assert tensors.keys() == parts.tensors[part].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts.tensors[part][name]), (part, name)
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    for name in ("samples.png", "loss.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


def test_resume_after_a_crash_repeats_no_log_line(quick, tmp_path, config):
    run = tmp_path / "run"
    train(config, run, device="cpu")
    before = log(run)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "ema.safetensors").write_bytes(b"torn")
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # torn by the crash
    with pytest.warns(UserWarning, match="step-00000006 is damaged"):
        resume(run, device="cpu")
    assert log(run) == before


def test_resume_can_lengthen_a_run(quick, tmp_path, config):
    run = tmp_path / "run"
    train(config, run, device="cpu")
    longer = replace(read_config(run), train=replace(read_config(run).train, steps=8))
    assert resume(run, longer, device="cpu")["step"] == 8
    assert read_config(run).train.steps == 8


def test_resume_refuses_what_would_change_the_numbers(quick, tmp_path, config):
    run = tmp_path / "run"
    train(config, run, device="cpu")
    stored = read_config(run)
    with pytest.raises(UserError, match="cannot change lr: 0.001 -> 0.5"):
        resume(run, replace(stored, train=replace(stored.train, lr=0.5)))


def test_resume_refuses_other_data(quick, tmp_path, config, images):
    run = tmp_path / "run"
    train(config, run, device="cpu")
    write_images(images, num_grey_levels=GREY_LEVELS + 3)
    with pytest.raises(UserError, match="images.npz is not what .* was trained on"):
        resume(run)


def test_resume_refuses_other_images_of_the_same_kind(quick, tmp_path, config, images):
    run = tmp_path / "run"
    train(config, run, device="cpu")
    with np.load(images) as arrays:
        changed = dict(arrays)
    changed["images"][:, 0, 0] = 5
    np.savez(images, **changed)
    with pytest.raises(UserError, match="images.npz has changed since .*run began"):
        resume(run, device="cpu")


def test_resume_with_other_threads_is_told(quick, tmp_path, config):
    run = tmp_path / "run"
    threads = torch.get_num_threads()
    train(config, run, device="cpu")
    try:
        torch.set_num_threads(threads + 1)
        with pytest.warns(UserWarning, match=f"with {threads + 1} threads a run of {threads}"):
            resume(run, device="cpu")
    finally:
        torch.set_num_threads(threads)


def raise_signals_at(monkeypatch, step, *numbers):
    def draw(data, model, config, at):
        for number in numbers if at == step else ():
            os.kill(os.getpid(), number)
        return draw_batch(data, model, config, at)

    monkeypatch.setattr("cdm_fast.training.loop.draw_batch", draw)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_finishes_the_step_and_saves(tmp_path, config, monkeypatch, number):
    raise_signals_at(monkeypatch, 1, number)
    handler = signal.getsignal(number)
    summary = train(config, tmp_path / "run", device="cpu")
    assert (summary["stopped"], summary["step"]) == ("signal", 2)
    assert load_checkpoint(tmp_path / "run").step == 2
    assert signal.getsignal(number) is handler


def test_second_interrupt_leaves_at_once(tmp_path, config, monkeypatch):
    raise_signals_at(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", device="cpu")
    assert load_checkpoint(tmp_path / "run").step == 0


def test_second_sigterm_waits_for_the_save(quick, tmp_path, config, monkeypatch):
    """Launchers and queues send several."""
    raise_signals_at(monkeypatch, 1, signal.SIGINT, signal.SIGTERM, signal.SIGTERM)
    assert train(config, tmp_path / "run", device="cpu")["stopped"] == "signal"
    assert load_checkpoint(tmp_path / "run").step == 2


def test_signal_during_the_final_pictures_ends_well(tmp_path, config, monkeypatch):
    monkeypatch.setattr(module, "write_final", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train(config, tmp_path / "run", device="cpu")["stopped"] == "signal"
    assert load_checkpoint(tmp_path / "run").step == 6


def test_time_limit_saves_scores_and_stops(tmp_path, config):
    summary = train(config, tmp_path / "run", max_time=0.0, device="cpu")
    assert (summary["stopped"], summary["step"]) == ("max_time", 0)
    assert summary["bits_per_dim"] > 0
    assert load_checkpoint(tmp_path / "run").step == 0


def test_finished_run_leaves_pictures_score_and_log(tmp_path, config):
    config = replace(config, output=replace(config.output, evaluate_every=2))
    summary = train(config, tmp_path / "run", device="cpu")
    assert (summary["stopped"], summary["step"], summary["skipped_steps"]) == ("finished", 6, 0)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pictures = {"samples.png", "loss.png", "confusion.png", "mse.png", "calibration.png"}
    assert names == pictures | {"config.json", "log.jsonl", "nll.json", "checkpoints"}
    score = json.loads((tmp_path / "run" / "nll.json").read_text())
    assert score["bits_per_dim"] == summary["bits_per_dim"]
    assert score["split"] == "test" and score["ratio_check"]["worst"] >= 0
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6]
    assert [line["step"] for line in lines if line.get("split") == "validation"] == [2, 4]
    assert all(math.isfinite(line["ce"]) for line in lines if "ce" in line)


def test_diverged_run_names_the_step_to_replay(quick, tmp_path, config, monkeypatch):
    def poisoned(data, model, config, step):
        batch = draw_batch(data, model, config, step)
        return batch._replace(x_t=batch.x_t * (math.nan if step >= 1 else 1.0))

    monkeypatch.setattr("cdm_fast.training.loop.draw_batch", poisoned)
    config = replace(config, train=replace(config.train, max_bad_steps=3))
    with pytest.raises(UserError, match=r"3 steps in a row .*\(seed 0, step 1\) to \(seed 0, step 3\).*--lr"):
        train(config, tmp_path / "run", device="cpu")
    assert torch.isfinite(weights(load(tmp_path / "run"))).all()


def test_skipped_steps_are_counted_in_the_log(quick, tmp_path, config, monkeypatch):
    def poisoned(data, model, config, step):
        batch = draw_batch(data, model, config, step)
        return batch._replace(x_t=batch.x_t * (math.nan if step in (0, 1, 4) else 1.0))

    monkeypatch.setattr("cdm_fast.training.loop.draw_batch", poisoned)
    summary = train(config, tmp_path / "run", device="cpu")
    assert summary["skipped_steps"] == 3
    assert [line["skipped_steps"] for line in log(tmp_path / "run")] == [2, 2, 3]
    assert [line.get("skipped_step") for line in log(tmp_path / "run")] == [1, None, 4]
    assert log(tmp_path / "run")[0]["loss"] is None


def test_loss_spikes_are_logged(quick, tmp_path, config, monkeypatch, capsys):
    def spiked(data, model, config, step):
        batch = draw_batch(data, model, config, step)
        return batch._replace(eps=batch.eps * (10 if step in (50, 52) else 1))

    monkeypatch.setattr("cdm_fast.training.loop.draw_batch", spiked)
    config = replace(
        config, train=replace(config.train, steps=56), output=replace(config.output, log_every=4)
    )
    train(config, tmp_path / "run", device="cpu")
    line = {line["step"]: line for line in log(tmp_path / "run")}
    assert [line[step]["loss_spikes"] for step in (48, 52, 56)] == [0, 1, 2]
    assert (line[52]["spike_step"], line[56]["spike_step"]) == (50, 52)
    assert line[52]["spike_loss"] > 30 and line[52]["spike_medians"] > 10
    assert "spike_step" not in line[48]
    assert f"the loss jumped to {line[52]['spike_loss']:.4g} at step 50" in capsys.readouterr().err


def test_picture_that_finds_no_room_does_not_stop_the_run(quick, tmp_path, config, monkeypatch):
    def refused(*_):
        raise DiskError("cannot write samples.png: No space left on device")

    monkeypatch.setattr("cdm_fast.training.loop.write_samples", refused)
    config = replace(config, output=replace(config.output, sample_every=5))
    with pytest.warns(UserWarning, match="samples.png: No space left on device; training goes on"):
        assert train(config, tmp_path / "run", device="cpu")["stopped"] == "finished"


def test_ddm_trains_without_likelihood(tmp_path, config):
    config = replace(config, train=replace(config.train, objective="ddm"))
    summary = train(config, tmp_path / "run", device="cpu")
    assert "bits_per_dim" not in summary
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"samples.png", "mse.png"} <= names and not {"nll.json", "confusion.png"} & names
    assert all("ce" not in line for line in log(tmp_path / "run"))


def test_training_leaves_the_callers_random_numbers_alone(quick, tmp_path, config):
    before = torch.random.get_rng_state()
    train(config, tmp_path / "run", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_config_is_resolved_from_the_data(quick, tmp_path, config):
    config = replace(config, train=replace(config.train, precision="auto"))
    train(
        replace(config, image=replace(config.image, height=4, width=4, num_classes=None)),
        tmp_path / "run",
        device="cpu",
    )
    stored = read_config(tmp_path / "run")
    assert stored.image == replace(config.image, class_counts=(12, 11, 12))
    assert stored.train.precision in ("fp32", "bf16")


def test_bad_settings_leave_no_directory(tmp_path, config):
    deep = replace(config, network=NetworkConfig(multipliers=(1, 1, 1, 1, 1), attention_resolutions=()))
    with pytest.raises(UserError, match="cannot be halved 4 times"):
        train(deep, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", ["tensorboard", "wandb"])
def test_missing_extra_is_told_before_anything_is_written(tmp_path, config, monkeypatch, extra):
    monkeypatch.setattr("cdm_fast.training.log.find_spec", lambda name: None)
    config = replace(config, output=replace(config.output, **{extra: True}))
    with pytest.raises(UserError, match=rf"--{extra} needs .*pip install 'cdm_fast\[{extra}\]'"):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_last_part_trains_without_dropout(config):
    config = replace(config, network=replace(config.network, dropout=0.5))
    config = replace(config, train=replace(config.train, steps=10, dropout_until=0.7))
    model = build_model(config)
    batch = draw_batch(load_data(config.data.source), model, config, 0)
    used = model.eval()(batch.x_t)

    def differs(step):
        set_dropout(model, config, step)
        return not torch.equal(model.train()(batch.x_t), used)

    assert [differs(step) for step in (0, 6, 7, 9)] == [True, True, False, False]
