"""The config tree: presets, bounds, JSON, and the settings that a resumed run must keep."""

import dataclasses
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch

from benchmarks.studies import likelihood_study
from cdm_fast.config import PRESETS, Preset, RunConfig, Sampler, ScheduleConfig, TrainConfig, check, preset
from cdm_fast.config.choices import CorrectedSampler
from cdm_fast.config.json import differences, fixed_part, from_json, to_json
from cdm_fast.errors import UserError
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.schedule import SCHEDULES, NoiseSchedule
from cdm_fast.runs.build import build_model, build_network, build_schedule, level_distribution
from cdm_fast.sampling import SAMPLERS
from cdm_fast.sampling.corrected import CORRECTED
from cdm_fast.training.step import learning_rate
from tests.tiny_run import CLASSES, tiny_config

SECTIONS = ("data", "schedule", "network", "train", "output")


def changed(section: str, **values: object) -> RunConfig:
    config = RunConfig()
    return replace(config, **{section: replace(getattr(config, section), **values)})


def transformer(**sizes: object) -> RunConfig:
    return changed("network", architecture="transformer", **sizes)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    check(PRESETS[name])
    assert from_json(RunConfig, to_json(PRESETS[name])) == PRESETS[name]


def test_choices_on_the_command_line_are_those_that_exist():
    assert get_args(Preset) == tuple(PRESETS)
    assert set(get_args(Sampler)) == {"auto", *SAMPLERS} - set(CORRECTED)
    assert set(get_args(CorrectedSampler)) == set(CORRECTED)
    assert set(get_args(ScheduleConfig.__annotations__["schedule"])) == set(SCHEDULES)


def test_flag_names_are_unique():
    names = [f.name for section in SECTIONS for f in dataclasses.fields(getattr(RunConfig(), section))]
    assert len(names) == len(set(names))


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(UserError, match="'mnist'.*digits, fashion-mnist, cifar10, celeba64"):
        preset("mnist")


def test_cifar10_preset_is_the_papers_network():
    model = build_model(PRESETS["cifar10"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(33.4e6, rel=2e-3)


def test_cifar10_transformer_is_as_large_as_the_papers_network():
    with torch.device("meta"):
        network = build_network(PRESETS["cifar10-transformer"])
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(34e6, rel=0.02)


@pytest.mark.parametrize("name", ["cifar10-paper", "celeba64-paper"])
def test_the_papers_presets_are_the_public_configuration(name):
    """Its config/config.yaml and cdm.py: lr_lambda of the scheduler, betas, average, loss weights."""
    config = PRESETS[name]
    train = config.train
    for step in (0, 100, 4999, 5000, 199_999, 200_000, 450_000):
        theirs = 2e-4 * min((step + 1) / 5000, 1) * 0.1 ** (step // 200_000)
        assert learning_rate(train, step) == pytest.approx(theirs, rel=1e-12)
    found = (train.steps, train.batch_size, train.ce_weight, train.mse_weight, train.clip_norm)
    assert found == (500_000, 128, 1e-3, 1.0, 0.0)
    assert (train.ema_decay, train.ema_start, train.optimizer) == (0.9999, 5000, "adam")
    beta = 1 - (build_schedule(config.schedule).a[1:-1] ** 2)
    assert float(beta[0]) == pytest.approx(1e-4) and config.schedule.beta_end == 0.02
    assert (config.data.pixels, config.data.flip, config.network.dropout) == ("points", True, 0.1)
    widths = {"cifar10-paper": (1, 2, 2, 2), "celeba64-paper": (1, 2, 2, 2, 4)}
    assert config.network.multipliers == widths[name] and config.network.attention_resolutions == (16,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("schedule", T=1), "--T is 1"),
        (changed("network", base_channels=0), "--base-channels is 0"),
        (changed("schedule", beta_start=1e-4), "--beta-start and --beta-end go together"),
        (changed("schedule", beta_start=1e-4, beta_end=0.02), "goes with --schedule linear, not uniform"),
        (changed("schedule", schedule="linear", beta_start=0.1, beta_end=0.02), "0 < start <= end"),
        (changed("schedule", schedule="linear", beta_start=float("nan"), beta_end=0.02), "0 < start <= end"),
        (changed("schedule", sigma_min=1e-4), "goes with --schedule ot, not uniform"),
        (changed("schedule", schedule="ot", sigma_min=1.0), "--sigma-min is 1.0"),
        (changed("train", ema_start=-1), "--ema-start is -1"),
        (changed("network", multipliers=()), "--multipliers is 0"),
        (changed("network", multipliers=(1, 2, 2, 2, 2)), "8x8 cannot be halved 4 times"),
        (changed("network", attention_resolutions=(16,)), "--attention-resolutions 16: .*8, 4"),
        (changed("network", dropout=1.0), "--dropout is 1.0"),
        (changed("network", dropout=float("nan")), "--dropout is nan"),
        (
            transformer(patch_size=3),
            "image size 8 does not consist of whole patches of side 3; use a size such as 6",
        ),
        (transformer(patch_size=0), "--patch-size is 0"),
        (transformer(width=2), "--width is 2"),
        (transformer(width=96, head_width=64), "--width is 96; give a multiple of --head-width 64"),
        (transformer(width=96, num_groups=64), "--width is 96; give a multiple of --num-groups 64"),
        (transformer(head_width=6), "--head-width is 6; give a multiple of 4"),
        (transformer(stem_channels=40), "--stem-channels is 40; give a multiple of --num-groups 32"),
        (transformer(depth=0), "--depth is 0"),
        (transformer(stem_resolutions=4), "patch size 4 with 4 resolutions of the stem"),
        (transformer(stem_resolutions=0), "--stem-resolutions is 0"),
        (transformer(stem_blocks=0), "--stem-blocks is 0"),
        (changed("train", steps=0), "--steps is 0"),
        (changed("train", batch_size=0), "--batch-size is 0"),
        (changed("train", lr=-1.0), "--lr is -1.0"),
        (changed("train", lr=float("inf")), "--lr is inf"),
        (changed("train", ema_decay=1.0), "--ema-decay is 1.0"),
        (changed("train", seed=-1), "--seed is -1"),
        (changed("train", accumulate=3), "--accumulate 3 does not divide --batch-size 128"),
        (changed("train", ce_weight=0.0, mse_weight=0.0), "both 0"),
        (changed("train", class_weight=-1.0), "--class-weight is -1.0"),
        (changed("train", class_weight=float("nan")), "--class-weight is nan"),
        (changed("network", head_rank=-1), "--head-rank is -1"),
        (changed("output", keep=0), "--keep is 0"),
        (changed("output", sampling_steps=201), "--sampling-steps is 201, more than the levels of --T 200"),
        (
            replace(changed("output", sampler="blind"), train=TrainConfig(objective="ddm")),
            "--sampler blind needs --objective cdm, not ddm; give ddpm",
        ),
        (changed("output", sampler="euler_ot"), "--sampler euler_ot needs --schedule ot"),
    ],
    ids=lambda value: None if isinstance(value, RunConfig) else value[:30],
)
def test_settings_that_cannot_work_are_named(config, message):
    with pytest.raises(UserError, match=message):
        check(config)


def test_joint_logits_need_a_cdm_and_images_of_every_class():
    config = changed("network", conditioning="joint")
    check(config)
    with pytest.raises(UserError, match="--objective ddm has none"):
        check(replace(config, train=replace(config.train, objective="ddm")))
    with pytest.raises(UserError, match="no training image of class 1"):
        check(replace(config, image=replace(config.image, num_classes=3, class_counts=(5, 0, 2))))


@pytest.mark.parametrize(
    ("conditioning", "objective"),
    [("none", "cdm"), ("embedding", "cdm"), ("none", "classifier"), ("embedding", "ddm"), ("none", "ddm")],
)
def test_what_a_preset_says_of_joint_heads_is_left_aside_by_others(conditioning, objective):
    config = preset("fashion-mnist")
    assert config.network.head_rank and config.train.class_weight
    network = replace(config.network, conditioning=conditioning)
    build_model(replace(config, network=network, train=replace(config.train, objective=objective)))


@pytest.mark.parametrize("architecture", ["unet", "encoder", "transformer"])
def test_an_ordinary_classifier_has_the_trunk_of_its_architecture(architecture):
    config = tiny_config("digits", objective="classifier")
    config = replace(config, network=replace(config.network, architecture=architecture))
    model = build_model(config).eval()
    levels = build_network(replace(config, train=TrainConfig(objective="cdm")))
    assert isinstance(model, Classifier)
    sizes = [{name: p.shape for name, p in network.named_parameters()} for network in (model.network, levels)]
    for found in sizes:
        del found["linear_layer.weight"], found["linear_layer.bias"]
    assert sizes[0] == sizes[1]
    x, head = torch.randn(3, *config.image.shape), model.network.linear_layer
    assert head.weight.shape == (CLASSES, model.features(x).shape[1])
    torch.testing.assert_close(model.logits(x), model.features(x) @ head.weight.t() + head.bias)


@pytest.mark.parametrize("architecture", ["encoder", "transformer"])
def test_a_plain_diffusion_model_needs_the_u_net(architecture):
    config = changed("network", architecture=architecture)
    with pytest.raises(
        UserError, match=f"--architecture {architecture} has no way back up .* give --architecture unet"
    ):
        check(replace(config, train=replace(config.train, objective="ddm")))


def test_conditioning_needs_labels():
    config = changed("network", conditioning="embedding")
    with pytest.raises(UserError, match="needs labels"):
        check(replace(config, image=replace(config.image, num_classes=None)))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("train", "steps"), "many", "config: train: steps is 'many'"),
        (("train", "steps"), True, "config: train: steps is True"),
        (("train", "lr"), None, "config: train: lr is None"),
        (("network", "multipliers"), [1, "2"], "config: network: multipliers is '2'"),
        (("network", "multipliers"), 1, "config: network: multipliers is 1"),
        (("schedule", "schedule"), "sine", "config: schedule: schedule is 'sine'"),
        (("train",), [], r"config: train: unexpected or missing \[\]"),
        (("train", "surprise"), 1, "config: train: unexpected or missing surprise"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_foreign_json_is_refused_by_name(path, value, message):
    tree = to_json(RunConfig())
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UserError, match=message):
        from_json(RunConfig, tree)


def test_field_that_is_missing_has_its_default():
    """A run is older than a field that was added since."""
    config = changed("train", lr=0.5, clip_norm=7.0)
    tree = to_json(config)
    del tree["train"]["clip_norm"], tree["output"]
    expected = replace(config, train=replace(config.train, clip_norm=RunConfig().train.clip_norm))
    assert from_json(RunConfig, tree) == replace(expected, output=RunConfig().output)


def test_missing_field_without_a_default_is_named():
    @dataclass(frozen=True)
    class Needs:
        step: int
        text: str = ""

    assert from_json(Needs, {"step": 3}) == Needs(3)
    with pytest.raises(UserError, match="missing step; restore"):
        from_json(Needs, {"text": "x"})


def test_whole_numbers_in_json_are_accepted_as_floats():
    tree = to_json(RunConfig())
    tree["train"]["lr"] = 1
    assert from_json(RunConfig, tree).train.lr == 1.0


def test_length_and_output_alone_may_change():
    config = RunConfig()
    longer = changed("train", steps=9)
    assert fixed_part(config) == fixed_part(longer) == fixed_part(changed("output", keep=5))
    assert differences(config, from_json(RunConfig, fixed_part(longer))) == []
    assert differences(config, longer) == []
    assert differences(config, changed("train", lr=0.5)) == ["lr: 0.001 -> 0.5"]


def test_uniform_level_distribution():
    schedule = NoiseSchedule.uniform(10)
    assert torch.equal(
        level_distribution(ScheduleConfig(T=10), schedule), torch.ones(12, dtype=torch.float64)
    )


def test_log_snr_level_distribution_follows_its_steps():
    config = ScheduleConfig(T=10, level_distribution="log-snr")
    schedule = NoiseSchedule.uniform(10)
    p = level_distribution(config, schedule)
    log_snr = schedule.log_snr
    assert p.shape == (12,) and bool((p > 0).all())
    torch.testing.assert_close(p[5], (log_snr[4] - log_snr[6]) / 2)
    torch.testing.assert_close(p[:2], (log_snr[1] - log_snr[2]).expand(2))
    torch.testing.assert_close(p[-2:], (log_snr[9] - log_snr[10]).expand(2))


def test_level_prior_of_the_model_is_the_sampling_distribution():
    config = changed("schedule", T=60, level_distribution="log-snr")
    model = build_model(config)
    p = level_distribution(config.schedule, model.schedule)
    torch.testing.assert_close(model.log_level_prior.exp(), p / p.sum())
    count = torch.bincount(model.draw_levels(20_000), minlength=62) / 20_000
    assert (count - p / p.sum()).abs().max() < 0.02


def test_the_digits_preset_is_the_configuration_whose_figures_the_documents_show():
    row = likelihood_study.configured(likelihood_study.VARIANTS["even, T 400, regularised"])
    config = preset("digits-encoder")
    assert (row.data, row.schedule, row.network, row.train) == (
        config.data, config.schedule, config.network, config.train,
    )  # fmt: skip
