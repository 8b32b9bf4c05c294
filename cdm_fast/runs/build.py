"""Builds the objects that a config describes: noise schedule, level distribution, network and model.

Legend: L = T+2 noise levels, K classes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from cdm_fast.config import RunConfig, ScheduleConfig, check
from cdm_fast.config.choices import Architecture
from cdm_fast.data.pixels import noise_of_inputs
from cdm_fast.model import CDM, DDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.schedule import NoiseSchedule
from cdm_fast.nn import AdjointNetwork, Encoder, Transformer, UNet, UNetDenoiser, as_classifier
from cdm_fast.nn.base import MixtureBase
from cdm_fast.nn.transformer import TransformerOptions
from cdm_fast.nn.trunk import TrunkOptions

# A full joint head has L K D weights; training holds eight tensors of that size: 1 GiB at 2^25.
FULL_HEAD_WEIGHTS, DEFAULT_RANK = 2**25, 32

# The networks of each architecture, and the settings that are their sizes.
_CLASSIFIERS: dict[Architecture, type[UNet | Encoder | Transformer]] = {
    "unet": UNet,
    "encoder": Encoder,
    "transformer": Transformer,
}
_SIZES: dict[Architecture, tuple[str, ...]] = {
    "unet": tuple(TrunkOptions.__annotations__),
    "encoder": tuple(TrunkOptions.__annotations__),
    "transformer": tuple(TransformerOptions.__annotations__),
}


def build_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The noise schedule of a run."""
    if config.schedule == "linear" and config.beta_start is not None and config.beta_end is not None:
        return NoiseSchedule.linear(config.T, (config.beta_start, config.beta_end))
    if config.schedule == "ot":
        return NoiseSchedule.ot(config.T, config.sigma_min)
    return NoiseSchedule.by_name(config.schedule, config.T)


def level_distribution(config: ScheduleConfig, schedule: NoiseSchedule) -> Tensor:
    """p(t), (L,) float64, up to a factor: the distribution of levels in training.

    `uniform`: all equal. `log-snr`: proportional to the step in log-SNR around the level; the first and the
    last level, whose log-SNR is infinite, and their neighbours use the nearest finite step.
    """
    if config.level_distribution == "uniform":
        return torch.ones(schedule.num_levels, dtype=torch.float64)
    steps = -schedule.log_snr[1:-1].diff()  # between levels 1..T
    around = torch.cat([steps[:1], (steps[:-1] + steps[1:]) / 2, steps[-1:]])
    return torch.cat([around[:1], around, around[-1:]])


def build_network(config: RunConfig) -> AdjointNetwork | UNetDenoiser:
    """The untrained network of a run, with weights drawn from torch's global generator.

    Raises UserError for an inconsistent config.
    """
    check(config)
    network = config.network
    shape: dict[str, Any] = {
        "image_size": config.image.sides,
        "channels": config.image.channels,
        "num_classes": config.image.num_classes if network.conditioning != "none" else None,
        **{name: getattr(network, name) for name in _SIZES[network.architecture]},
    }
    if config.train.objective == "classifier":
        return as_classifier(
            _CLASSIFIERS[network.architecture](num_levels=config.image.num_classes or 0, **shape)
        )
    if config.train.objective == "ddm":
        return UNetDenoiser(**shape)
    if network.conditioning == "joint":
        shape |= {"conditioning": "joint", "head_rank": head_rank(config)}
    built = _CLASSIFIERS[network.architecture](num_levels=config.schedule.T + 2, **shape)
    if network.base_components:
        built.base = build_base(config)
    return built


def build_base(config: RunConfig) -> MixtureBase:
    """The base of a run's network, before it is fitted."""
    network = config.network
    with torch.device("cpu"):  # the amplitudes are numbers even where the weights are only shapes
        schedule = build_schedule(config.schedule)
    return MixtureBase(
        schedule.a,
        schedule.s,
        math.prod(config.image.shape),
        network.base_components,
        network.base_rank,
        (config.image.num_classes or 1) if network.conditioning == "joint" else 1,
    )


def build_model(config: RunConfig) -> CDM | DDM | Classifier:
    """The untrained model of a run, on the CPU; see `build_network`."""
    network, schedule = build_network(config), build_schedule(config.schedule)
    if config.train.objective == "classifier":
        return Classifier(network, schedule, _classifier_level(config, schedule))
    if isinstance(network, UNetDenoiser):
        return DDM(network, schedule)
    return CDM(
        network,
        schedule,
        level_prior=level_distribution(config.schedule, schedule),
        class_prior=class_prior(config),
    )


def _classifier_level(config: RunConfig, schedule: NoiseSchedule) -> int:
    """The level whose noise is `--classifier-noise`; 0 without this option."""
    sigma = config.train.classifier_noise
    if not sigma:
        return 0
    noise = noise_of_inputs(sigma, config.image.num_grey_levels, config.data.pixels)
    return schedule.nearest_to_noise(noise)


def head_rank(config: RunConfig) -> int:
    """The rank of a joint head, 0 for a full head: from the config, or the default for its size."""
    if config.network.head_rank is not None:
        return config.network.head_rank
    network = config.network
    features = 2 * (network.width if network.architecture == "transformer" else network.base_channels)
    weights = (config.schedule.T + 1) * (config.image.num_classes or 1) * features
    return 0 if weights <= FULL_HEAD_WEIGHTS else DEFAULT_RANK


def class_prior(config: RunConfig) -> Tensor | None:
    """p(c), (K,), up to a factor: each class's share of the training images; None if there are no classes.

    A class without images, which an embedding allows, counts as one image.
    """
    counts = config.image.class_counts
    if config.network.conditioning == "none" or counts is None:
        return None
    return torch.tensor(counts).clamp(min=1)


def class_labels(config: RunConfig, num: int, first: int = 0) -> Tensor | None:
    """(num,) int64 labels that cycle through the classes, from image `first`; None without classes."""
    if config.network.conditioning == "none" or config.image.num_classes is None:
        return None
    return torch.arange(first, first + num) % config.image.num_classes
