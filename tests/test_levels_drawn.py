"""Stratified levels: exact counts in a batch, exact marginals, the same for any number of processes."""

from dataclasses import replace

import pytest
import torch

from cdm_fast.config import ScheduleConfig
from cdm_fast.data import load_data
from cdm_fast.host.processes import Process, join
from cdm_fast.runs.build import build_schedule, level_distribution
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.training.levels import stratified_levels
from cdm_fast.training.state import new_state
from cdm_fast.training.step import draw_batch
from cdm_fast.training.train import resume, train
from tests.tiny_run import tiny_config, write_images

CPU = torch.device("cpu")


def log_snr_levels(T):
    config = ScheduleConfig(T=T, level_distribution="log-snr")
    p = level_distribution(config, build_schedule(config))
    return p / p.sum()


@pytest.fixture
def config(tmp_path):
    images = write_images(tmp_path / "images.npz")
    return tiny_config(images, level_draws="stratified", batch_size=12)


@pytest.mark.parametrize("num", [1, 7, 64, 1000])
def test_a_level_occurs_as_often_as_its_probability_says_up_to_one(num):
    p = log_snr_levels(40)
    for seed in range(20):
        count = stratified_levels(p, num, torch.Generator().manual_seed(seed)).bincount(minlength=len(p))
        assert int(count.sum()) == num
        assert ((count - num * p).abs() < 1).all()


def test_a_level_of_probability_zero_is_never_drawn():
    p = torch.tensor([0, 1, 0, 2, 0], dtype=torch.float64)
    drawn = torch.cat([stratified_levels(p, 3, torch.Generator().manual_seed(s)) for s in range(200)])
    assert drawn.bincount(minlength=5).tolist() == [0, 200, 0, 400, 0]


def test_every_position_has_the_distribution():
    p, draws, num = log_snr_levels(6), 8000, 5
    levels = torch.stack(
        [stratified_levels(p, num, torch.Generator().manual_seed(seed)) for seed in range(draws)]
    )
    for position in levels.T:
        found = position.bincount(minlength=len(p)) / draws
        assert ((found - p).abs() < 4.5 * (p * (1 - p) / draws).sqrt()).all()


def test_a_batch_mean_varies_less_than_with_independent_draws():
    p, value = log_snr_levels(40), torch.linspace(0, 1, 42, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    stratified = torch.stack([value[stratified_levels(p, 64, generator)].mean() for _ in range(500)])
    independent = (p @ value**2 - (p @ value) ** 2) / 64  # variance of the mean
    assert stratified.var() < independent / 50
    assert abs(stratified.mean() - p @ value) < 5 * (independent / 50 / 500) ** 0.5


def test_the_setting_changes_levels_and_nothing_else(config):
    data, model = load_data(config.data.source), new_state(config, CPU).model
    independent = replace(config, train=replace(config.train, level_draws="independent"))
    one, other = (draw_batch(data, model, c, 3) for c in (config, independent))
    assert not torch.equal(one.level, other.level)
    count = one.level.bincount(minlength=10)
    assert count.max() <= 2 and count.min() >= 1  # 12 draws of 10 levels
    expected = model.draw_levels(12, torch.Generator())
    assert expected.shape == other.level.shape


def test_processes_and_parts_take_the_levels_of_one(config):
    data, model = load_data(config.data.source), new_state(config, CPU).model
    alone = draw_batch(data, model, config, 1).level
    parts = replace(config, train=replace(config.train, accumulate=2))
    rows = []
    try:
        for rank in range(3):
            join(Process(rank, 3, rank, 3))
            rows.append(draw_batch(data, model, parts, 1).level.view(2, 2))
    finally:
        join(Process())
    assert torch.equal(torch.stack(rows, 1).flatten(), alone)  # parts of pieces in the order of ranks


def test_a_ddm_draws_its_noisy_levels(config):
    config = replace(config, train=replace(config.train, objective="ddm", batch_size=16))
    data, model = load_data(config.data.source), new_state(config, CPU).model
    assert draw_batch(data, model, config, 0).level.bincount(minlength=10).tolist() == [0, *[2] * 8, 0]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, config, monkeypatch):
    monkeypatch.setattr("cdm_fast.training.finish.write_final", lambda *_: {})
    config = replace(config, train=replace(config.train, decay="none"))
    train(config, tmp_path / "whole", device="cpu")
    short = replace(config, train=replace(config.train, steps=3))
    train(short, tmp_path / "parts", device="cpu")
    stored = read_config(tmp_path / "parts")
    resume(tmp_path / "parts", replace(stored, train=replace(stored.train, steps=6)), device="cpu")
    whole, parts = (load_checkpoint(tmp_path / name).tensors["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
