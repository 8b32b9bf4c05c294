"""Checks of the settings: bounds and combinations, with messages that say what to change."""

import math

from cdm_fast.config.settings import RunConfig, ScheduleConfig
from cdm_fast.config.size import (
    attended,
    attention_lengths,
    check_stem,
    nearest_divisible,
    patch_grid,
    plain_size,
    resolutions,
    size_text,
)
from cdm_fast.errors import UserError, require_at_least

MOST_COEFFICIENTS = 2**26  # of a base, in all levels: 256 MiB, and as much for each fold in training


def check(config: RunConfig) -> None:
    """Raises UserError, naming the flag and its value, for the first invalid setting."""
    _check_ranges(config)
    _check_objective(config)
    _check_labels(config)
    _check_adversarial(config)
    _check_schedule(config.schedule)
    _check_base(config)
    _check_sampler(config)
    _check_keep_best(config)
    if config.network.architecture == "transformer":
        _check_patches(config)
    else:
        _check_resolutions(config)


def _check_ranges(config: RunConfig) -> None:
    """The bounds of each number."""
    for flag, count, low in _lower_bounds(config):
        require_at_least(f"--{flag}", count, low)
    for flag, count, high in _upper_bounds(config):
        if count > high:
            raise UserError(f"--{flag} is {count}; give {high} or less")
    if (config.network.head_rank or 0) < 0:
        raise UserError(f"--head-rank is {config.network.head_rank}; give 0 (a full head) or more")
    for flag, value, below in _unit_interval(config):
        if not 0.0 <= value <= 1.0 or (below and value == 1.0):
            raise UserError(f"--{flag} is {value}; give a number from 0 to {'below 1' if below else '1'}")
    for flag, number in _nonnegative(config):
        if not 0.0 <= number < float("inf"):  # NaN fails too
            raise UserError(f"--{flag} is {number}; give a finite number, 0 or more")


def _check_objective(config: RunConfig) -> None:
    """Batch, loss and network must be compatible."""
    train, network = config.train, config.network
    if train.batch_size % train.accumulate:
        raise UserError(
            f"--accumulate {train.accumulate} does not divide --batch-size {train.batch_size};"
            " change one of them"
        )
    if train.objective == "cdm" and train.ce_weight == train.mse_weight == 0:
        raise UserError(
            "--ce-weight and --mse-weight are both 0, so neither levels nor denoiser are trained; raise one"
        )
    if network.architecture != "unet" and train.objective == "ddm":
        raise UserError(
            f"--architecture {network.architecture} has no way back up to the pixels, which --objective"
            " ddm needs; give --architecture unet"
        )


def _check_labels(config: RunConfig) -> None:
    """Conditioning and classifiers need labels."""
    objective, conditioning = config.train.objective, config.network.conditioning
    image, source = config.image, config.data.source
    if conditioning != "none" and image.num_classes is None:
        raise UserError(
            f"--conditioning {conditioning} needs labels, and {source} has none;"
            " give labelled data or --conditioning none"
        )
    if objective == "classifier" and conditioning != "none":
        raise UserError(
            f"--objective classifier predicts the label, so the network must not see it: give --conditioning"
            f" none, not {conditioning}"
        )
    if objective == "classifier" and image.num_classes is None:
        raise UserError(f"--objective classifier needs labels, and {source} has none; give labelled data")
    if config.train.classifier_noise and objective != "classifier":
        raise UserError(
            f"--classifier-noise {config.train.classifier_noise:g} is for --objective classifier only:"
            " leave it out, or give that objective"
        )
    if conditioning == "joint" and objective == "ddm":
        raise UserError(
            "--conditioning joint needs logits, and --objective ddm has none; give --conditioning embedding"
        )
    if conditioning == "joint" and 0 in (image.class_counts or ()):
        empty = (image.class_counts or ()).index(0)
        raise UserError(
            f"{source} holds no training image of class {empty}, and --conditioning joint learns the"
            " likelihood of each class from its images; number the classes without gaps"
        )


def _check_adversarial(config: RunConfig) -> None:
    """Adversarial training needs a budget, and class logits of clean images."""
    train, conditioning = config.train, config.network.conditioning
    if train.adversarial == "none":
        if train.budget:
            raise UserError(
                f"--budget {train.budget:g} belongs to --adversarial: give linf or l2, or leave it out"
            )
        return
    if not train.budget:
        raise UserError(f"--adversarial {train.adversarial} needs --budget, such as 0.1; white is 1")
    if train.objective == "ddm" or (train.objective == "cdm" and conditioning != "joint"):
        raise UserError(
            f"--adversarial {train.adversarial} needs the classes of an image from one pass: give"
            " --conditioning joint or --objective classifier"
        )
    if train.classifier_noise:
        raise UserError(
            f"--adversarial {train.adversarial} perturbs clean images, and --classifier-noise"
            f" {train.classifier_noise:g} trains on noisy ones: leave one of them out"
        )


def _check_sampler(config: RunConfig) -> None:
    """The sampler of the sample grid must suit the schedule."""
    output, schedule = config.output, config.schedule
    if output.sampling_steps > schedule.T:
        raise UserError(
            f"--sampling-steps is {output.sampling_steps}, more than the levels of --T {schedule.T};"
            " give fewer"
        )
    if output.sampler == "blind" and config.train.objective != "cdm":
        raise UserError(f"--sampler blind needs --objective cdm, not {config.train.objective}; give ddpm")
    if output.sampler == "euler_ot" and (schedule.schedule != "ot" or schedule.sigma_min):
        raise UserError(
            f"--sampler euler_ot needs --schedule ot without --sigma-min, not {schedule.schedule} with"
            f" {schedule.sigma_min:g}; give ddim"
        )


def _check_schedule(schedule: ScheduleConfig) -> None:
    """Betas and sigma_min must belong to the schedule and leave signal at every level."""
    start, end = schedule.beta_start, schedule.beta_end
    if (start is None) != (end is None):
        raise UserError("--beta-start and --beta-end go together; give both or neither")
    if start is not None and end is not None:
        if schedule.schedule != "linear":
            raise UserError(f"--beta-start {start} goes with --schedule linear, not {schedule.schedule}")
        if not 0 < start <= end <= 0.999:
            raise UserError(f"--beta-start {start} --beta-end {end}: give 0 < start <= end <= 0.999")
    if not 0 <= schedule.sigma_min < 1:
        raise UserError(f"--sigma-min is {schedule.sigma_min}; give a number from 0 to below 1")
    if schedule.sigma_min and schedule.schedule != "ot":
        raise UserError(
            f"--sigma-min {schedule.sigma_min} goes with --schedule ot, not {schedule.schedule}; leave it out"
        )


def _check_base(config: RunConfig) -> None:
    """The coefficients of the base, some for each level and Gaussian, must fit into memory."""
    network, image = config.network, config.image
    classes = (image.num_classes or 1) if network.conditioning == "joint" else 1
    gaussians, rank = network.base_components * classes, min(network.base_rank, math.prod(image.shape))
    values = (config.schedule.T + 2) * gaussians * (2 * rank + 3)
    if values > MOST_COEFFICIENTS:
        raise UserError(
            f"the base of {gaussians} Gaussians would have {values:,} coefficients, more than"
            f" {MOST_COEFFICIENTS:,}: give fewer --base-components, or a smaller --base-rank or --T"
        )


def _check_keep_best(config: RunConfig) -> None:
    """The criterion must be measured, at intervals."""
    output, objective = config.output, config.train.objective
    if output.keep_best == "none":
        return
    if not output.evaluate_every:
        raise UserError(f"--keep-best {output.keep_best} needs validations; give --evaluate-every")
    if output.keep_best == "class_ce":
        if objective == "ddm" or (objective == "cdm" and config.network.conditioning == "none"):
            raise UserError("--keep-best class_ce needs a model of classes; give --conditioning joint")
    elif objective != "cdm":
        raise UserError(f"--keep-best {output.keep_best} needs a likelihood; give --objective cdm")


def _lower_bounds(config: RunConfig) -> list[tuple[str, int, int]]:
    """(flag, value, smallest value) of every integer."""
    train, output, network = config.train, config.output, config.network
    return [
        ("T", config.schedule.T, 2),
        *(("image-size", side, 1) for side in config.image.sides),
        ("channels", config.image.channels, 1),
        ("num-grey-levels", config.image.num_grey_levels, 2),
        *(("num-classes", classes, 1) for classes in (config.image.num_classes,) if classes is not None),
        *(("class-counts", count, 0) for count in config.image.class_counts or ()),
        ("base-channels", network.base_channels, 1),
        ("blocks-per-level", network.blocks_per_level, 1),
        ("patch-size", network.patch_size, 1),
        ("width", network.width, 4),
        ("depth", network.depth, 1),
        ("head-width", network.head_width, 4),
        ("stem-channels", network.stem_channels, 0),
        ("stem-resolutions", network.stem_resolutions, 1),
        ("stem-blocks", network.stem_blocks, 1),
        ("num-groups", network.num_groups, 1),
        ("base-components", network.base_components, 0),
        ("base-rank", network.base_rank, 1),
        *(("multipliers", multiplier, 1) for multiplier in network.multipliers or (0,)),
        ("steps", train.steps, 1),
        ("batch-size", train.batch_size, 1),
        ("accumulate", train.accumulate, 1),
        ("warmup", train.warmup, 0),
        ("ema-start", train.ema_start, 0),
        ("decay-every", train.decay_every, 1),
        ("adversarial-steps", train.adversarial_steps, 1),
        ("seed", train.seed, 0),
        ("split-seed", config.data.split_seed, 0),
        ("max-bad-steps", train.max_bad_steps, 1),
        ("log-every", output.log_every, 1),
        ("save-every", output.save_every, 1),
        ("keep", output.keep, 1),
        ("sample-every", output.sample_every, 0),
        ("evaluate-every", output.evaluate_every, 0),
        ("evaluate-images", output.evaluate_images, 1),
        ("constants-rows", output.constants_rows, 0),
        ("draws", output.draws, 1),
        ("num-samples", output.num_samples, 1),
        ("sampling-steps", output.sampling_steps, 1),
    ]


def _upper_bounds(config: RunConfig) -> list[tuple[str, int, int]]:
    """(flag, value, largest value): far above any use, but small enough to be built without overflow."""
    image, network = config.image, config.network
    return [
        ("T", config.schedule.T, 10**6),
        *(("image-size", side, 1024) for side in image.sides),
        ("channels", image.channels, 1024),
        ("num-grey-levels", image.num_grey_levels, 256),
        ("num-classes", image.num_classes or 1, 2**16),
        ("base-channels", network.base_channels, 2**14),
        ("blocks-per-level", network.blocks_per_level, 64),
        ("patch-size", network.patch_size, 64),
        ("width", network.width, 2**14),
        ("depth", network.depth, 256),
        ("head-width", network.head_width, 1024),
        ("stem-channels", network.stem_channels, 2**14),
        ("stem-resolutions", network.stem_resolutions, 6),
        ("stem-blocks", network.stem_blocks, 64),
        ("head-rank", network.head_rank or 0, 2**14),
        ("base-components", network.base_components, 1024),
        ("base-rank", network.base_rank, 4096),
        *(("multipliers", multiplier, 64) for multiplier in network.multipliers),
    ]


def _unit_interval(config: RunConfig) -> list[tuple[str, float, bool]]:
    """(flag, value, whether 1 is excluded) of every number in [0, 1]."""
    return [
        ("dropout", config.network.dropout, True),
        ("dropout-until", config.train.dropout_until, False),
        ("deform", config.train.deform, False),
        ("deform-until", config.train.deform_until, False),
        ("label-dropout", config.train.label_dropout, False),
        ("ema-decay", config.train.ema_decay, True),
        ("decay-factor", config.train.decay_factor, False),
    ]


def _nonnegative(config: RunConfig) -> list[tuple[str, float]]:
    """(flag, value) of every finite number of at least 0."""
    names = (
        "lr", "weight_decay", "clip_norm", "ce_weight", "mse_weight", "class_weight", "classifier_noise",
        "budget",
    )  # fmt: skip
    weights = [(name.replace("_", "-"), getattr(config.train, name)) for name in names]
    return [
        *weights,
        ("adversarial-weight", config.train.adversarial_weight or 0.0),
        ("guidance", config.output.guidance),
    ]


def _check_resolutions(config: RunConfig) -> None:
    """Each halving must be exact, and attention needs a resolution that the network has."""
    sides, halvings = config.image.sides, len(config.network.multipliers) - 1
    sizes = resolutions(sides, halvings)
    if sizes is None:
        raise UserError(
            f"images of {size_text(sides)} cannot be halved {halvings} times, as {halvings + 1} --multipliers"
            " ask; give fewer multipliers, or --image-size"
            f" {size_text(plain_size(nearest_divisible(sides, halvings)))}"
        )
    for wanted in config.network.attention_resolutions:
        if not any(attended(sizes, [wanted])):
            known = ", ".join(map(str, dict.fromkeys(attention_lengths(sizes))))
            shares = ", ".join(str(2.0**-i) for i in range(halvings + 1))
            raise UserError(
                f"--attention-resolutions {wanted}: this network works at {known}, or by their share of the"
                f" full size {shares}; choose among these, or give none"
            )


def _check_patches(config: RunConfig) -> None:
    """An image consists of whole patches, a token of whole heads and groups."""
    network = config.network
    patch_grid(config.image.sides, network.patch_size)
    check_stem(network.patch_size, network.stem_channels, network.stem_resolutions)
    for flag, value, unit_flag, unit in (
        ("head-width", network.head_width, None, 4),
        ("width", network.width, None, 4),
        ("width", network.width, "head-width", network.head_width),
        ("width", network.width, "num-groups", network.num_groups),
        ("stem-channels", network.stem_channels, "num-groups", network.num_groups),
    ):
        if value % unit:
            of = unit if unit_flag is None else f"--{unit_flag} {unit}"
            raise UserError(f"--{flag} is {value}; give a multiple of {of}")
