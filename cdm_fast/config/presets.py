"""The presets: named runs, with all their settings, such as the crop box of `celeba64`."""

from dataclasses import replace
from typing import Any, Literal

from cdm_fast.config.settings import (
    DataConfig,
    ImageShape,
    NetworkConfig,
    OutputConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from cdm_fast.errors import UserError

Preset = Literal[
    "digits",
    "fashion-mnist",
    "cifar10",
    "celeba64",
    "digits-encoder",
    "fashion-mnist-encoder",
    "cifar10-encoder",
    "digits-transformer",
    "fashion-mnist-transformer",
    "cifar10-transformer",
    "cifar10-paper",
    "celeba64-paper",
]


# Runs by name. Without a suffix the network is the paper's U-Net, with `-encoder` the encoder, with
# `-transformer` the transformer; `-paper` has all settings of the paper's public code.
PRESETS: dict[str, RunConfig] = {
    "digits": RunConfig(
        network=NetworkConfig(num_groups=8, dropout=0.2, conditioning="joint"),
        train=TrainConfig(
            optimizer="adamw",
            lr=2e-3,
            weight_decay=0.05,
            ema_decay=0.995,
            ce_weight=0.01,
            dropout_until=0.9,
        ),
        output=OutputConfig(evaluate_every=250, num_samples=80, sampling_steps=100),
    ),
    "fashion-mnist": RunConfig(
        data=DataConfig(source="data/fashion-mnist"),
        image=ImageShape(height=28, width=28, channels=1, num_grey_levels=256, num_classes=10),
        schedule=ScheduleConfig(T=500, level_distribution="log-snr"),
        network=NetworkConfig(
            base_channels=16,
            multipliers=(1, 2, 4),
            attention_resolutions=(7,),
            num_groups=8,
            dropout=0.0,
            conditioning="joint",
            head_rank=10,
        ),
        train=TrainConfig(
            steps=6500,
            batch_size=64,
            lr=2e-3,
            warmup=200,
            ema_decay=0.998,
            ce_weight=0.01,
            class_weight=0.1,
        ),
        output=OutputConfig(
            sample_every=2000,
            evaluate_every=1000,
            draws=1,
            num_samples=80,
            sampling_steps=100,
        ),
    ),
    "cifar10": RunConfig(
        data=DataConfig(source="data/cifar-10-batches-bin", flip=True),
        image=ImageShape(height=32, width=32, channels=3, num_grey_levels=256, num_classes=10),
        schedule=ScheduleConfig(T=1000),
        network=NetworkConfig(base_channels=128, multipliers=(1, 2, 2, 2), attention_resolutions=(16,)),
        train=TrainConfig(steps=500_000, lr=2e-4, warmup=5000, decay="none", ema_decay=0.9999),
        output=OutputConfig(log_every=100, save_every=5000, sample_every=5000, evaluate_every=25_000),
    ),
    "celeba64": RunConfig(
        # The CelebA crop of the public code, around the face, and its filter: CustomImageDataset.py.
        data=DataConfig(
            source="data/celeba", image_size=64, crop="25,57,128,128", resample="bilinear", flip=True
        ),
        image=ImageShape(height=64, width=64, channels=3, num_grey_levels=256, num_classes=None),
        schedule=ScheduleConfig(T=1000),
        network=NetworkConfig(base_channels=128, multipliers=(1, 2, 2, 2, 4), attention_resolutions=(16,)),
        train=TrainConfig(steps=500_000, lr=1e-4, warmup=5000, decay="none", ema_decay=0.9999),
        output=OutputConfig(log_every=100, save_every=5000, sample_every=5000, evaluate_every=25_000),
    ),
}


for _name in ("digits", "fashion-mnist", "cifar10"):
    _network = replace(PRESETS[_name].network, architecture="encoder")
    PRESETS[f"{_name}-encoder"] = replace(PRESETS[_name], network=_network)


# 2500 steps take as long as the 1000 of the U-Net. The other settings reduce overfitting to 1259 training
# images and keep the single pass close to the bound (docs/measurements/likelihood.md).
PRESETS["digits-encoder"] = replace(
    PRESETS["digits-encoder"],
    schedule=ScheduleConfig(T=400, level_distribution="log-snr"),
    train=replace(
        PRESETS["digits-encoder"].train,
        steps=2500,
        level_draws="stratified",
        weight_decay=0.3,
        dropout_until=0.7,
    ),
)


# Twice the U-Net's learning rate, and a base, by docs/measurements/likelihood.md and sampling.md.
PRESETS["fashion-mnist-encoder"] = replace(
    PRESETS["fashion-mnist-encoder"],
    network=replace(PRESETS["fashion-mnist-encoder"].network, base_components=3, base_rank=64),
    train=replace(PRESETS["fashion-mnist-encoder"].train, lr=4e-3, steps=7000),
)


# The transformers train as the encoders do and about as long, which are fewer steps, at the learning rate
# that was best in short trainings. It holds for every width (docs/measurements/transformer.md); the
# transformer of CIFAR-10 has not been trained.
_TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "digits": (
        {"patch_size": 2, "width": 128, "depth": 3, "head_width": 64, "stem_channels": 32},
        {"lr": 1e-3, "steps": 1500},
    ),
    "fashion-mnist": (
        {
            "patch_size": 4,
            "width": 64,
            "depth": 4,
            "head_width": 32,
            "stem_channels": 16,
            "stem_resolutions": 2,
            "stem_blocks": 2,
        },
        {"lr": 2e-3, "steps": 5400},
    ),
    "cifar10": (
        {"patch_size": 4, "width": 512, "depth": 9, "head_width": 64, "stem_channels": 64},
        {"lr": 5e-4, "decay": "cosine"},
    ),
}
for _name, (_sizes, _training) in _TRANSFORMERS.items():
    _encoder = PRESETS[f"{_name}-encoder"]
    PRESETS[f"{_name}-transformer"] = replace(
        _encoder,
        network=replace(_encoder.network, architecture="transformer", base_components=0, **_sizes),
        train=replace(_encoder.train, **_training),
    )


# The paper's own settings, from its public code, github.com/shaharYadin/CDM:
# config/config.yaml has T, betas, steps, lr, batch size, loss weights and the average's decay; cdm.py the
# warm-up over 5000 steps, a tenth of the rate after every 200,000, no clipping, and an average that is a copy
# of the weights for 5000 steps; main.py the networks, dropout, mirroring, and 2u/255 - 1 without noise.
_paper_training = TrainConfig(
    steps=500_000,
    lr=2e-4,
    warmup=5000,
    decay="step",
    decay_every=200_000,
    decay_factor=0.1,
    clip_norm=0.0,
    ema_decay=0.9999,
    ema_start=5000,
    ce_weight=1e-3,
    mse_weight=1.0,
    label_dropout=0.0,
)


for _name in ("cifar10", "celeba64"):
    _preset = PRESETS[_name]
    PRESETS[f"{_name}-paper"] = replace(
        _preset,
        data=replace(_preset.data, pixels="points"),
        schedule=ScheduleConfig(schedule="linear", T=1000, beta_start=1e-4, beta_end=0.02),
        train=_paper_training,
    )


def preset(name: str) -> RunConfig:
    """The preset called `name`, such as "digits-encoder".

    Raises UserError, which lists the presets, for any other name.

    >>> preset("digits").schedule.T
    200
    """
    if name not in PRESETS:
        raise UserError(f"unknown --preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
