"""The bounds of the settings: which runs cannot work, and what to change."""

from cdm_fast.config.settings import RunConfig, ScheduleConfig
from cdm_fast.errors import UserError


def check(config: RunConfig) -> None:
    """Raise UserError, naming the flag and its value, for the first setting that cannot work."""
    for flag, whole, low in _lower_bounds(config):
        if whole < low:
            raise UserError(f"--{flag} is {whole}; give {low} or more")
    for flag, whole, high in _upper_bounds(config):
        if whole > high:
            raise UserError(f"--{flag} is {whole}; give {high} or less")
    if (config.network.head_rank or 0) < 0:
        raise UserError(f"--head-rank is {config.network.head_rank}; give 0 (a full head) or more")
    for flag, value, below in _unit_interval(config):
        if not 0.0 <= value <= 1.0 or (below and value == 1.0):
            raise UserError(f"--{flag} is {value}; give a number from 0 to {'below 1' if below else '1'}")
    for flag, number in _nonnegative(config):
        if not 0.0 <= number < float("inf"):  # NaN fails too
            raise UserError(f"--{flag} is {number}; give a finite number, 0 or more")
    train, output, source = config.train, config.output, config.data.source
    if train.batch_size % train.accumulate:
        raise UserError(
            f"--accumulate {train.accumulate} does not divide --batch-size {train.batch_size};"
            " change one of them"
        )
    if train.objective == "cdm" and train.ce_weight == train.mse_weight == 0:
        raise UserError(
            "--ce-weight and --mse-weight are both 0, so neither levels nor denoiser are trained; raise one"
        )
    if config.network.conditioning != "none" and config.image.num_classes is None:
        raise UserError(
            f"--conditioning {config.network.conditioning} needs labels, and {source} has none;"
            " give labelled data or --conditioning none"
        )
    if config.network.architecture == "encoder" and train.objective != "cdm":
        raise UserError(
            f"--architecture encoder classifies noise levels, which --objective {train.objective} does not;"
            " give --architecture unet"
        )
    if train.objective == "classifier" and config.network.conditioning != "none":
        raise UserError(
            f"--objective classifier predicts the label and is not told it: give --conditioning none, not"
            f" {config.network.conditioning}"
        )
    if train.objective == "classifier" and config.image.num_classes is None:
        raise UserError(f"--objective classifier needs labels, and {source} has none; give labelled data")
    if config.network.conditioning == "joint" and train.objective == "ddm":
        raise UserError(
            "--conditioning joint needs logits, and --objective ddm has none; give --conditioning embedding"
        )
    if config.network.conditioning == "joint" and 0 in (config.image.class_counts or ()):
        empty = (config.image.class_counts or ()).index(0)
        raise UserError(
            f"{source} holds no training image of class {empty}, and --conditioning joint reads every class's"
            " likelihood off its images; number the classes without gaps"
        )
    _check_schedule(config.schedule)
    if output.sampling_steps > config.schedule.T:
        raise UserError(
            f"--sampling-steps is {output.sampling_steps}, more than the levels of --T {config.schedule.T};"
            " give fewer"
        )
    if output.sampler == "euler_ot" and (config.schedule.schedule != "ot" or config.schedule.sigma_min):
        raise UserError(
            f"--sampler euler_ot needs --schedule ot without --sigma-min, not {config.schedule.schedule} with"
            f" {config.schedule.sigma_min:g}; give ddim"
        )
    _check_keep_best(config)
    _check_resolutions(config)


def _check_schedule(schedule: ScheduleConfig) -> None:
    """The numbers of one schedule alone, and such as leave signal at every level."""
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
    train, output, network = config.train, config.output, config.network
    return [
        ("T", config.schedule.T, 2),
        ("image-size", config.image.size, 1),
        ("channels", config.image.channels, 1),
        ("num-grey-levels", config.image.num_grey_levels, 2),
        *(("num-classes", classes, 1) for classes in (config.image.num_classes,) if classes is not None),
        *(("class-counts", count, 0) for count in config.image.class_counts or ()),
        ("base-channels", network.base_channels, 1),
        ("blocks-per-level", network.blocks_per_level, 1),
        ("num-groups", network.num_groups, 1),
        *(("multipliers", multiplier, 1) for multiplier in network.multipliers or (0,)),
        ("steps", train.steps, 1),
        ("batch-size", train.batch_size, 1),
        ("accumulate", train.accumulate, 1),
        ("warmup", train.warmup, 0),
        ("ema-start", train.ema_start, 0),
        ("decay-every", train.decay_every, 1),
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
    """Far above any use; below what overflows a size or takes minutes to build."""
    image, network = config.image, config.network
    return [
        ("T", config.schedule.T, 10**6),
        ("image-size", image.size, 1024),
        ("channels", image.channels, 1024),
        ("num-grey-levels", image.num_grey_levels, 256),
        ("num-classes", image.num_classes or 1, 2**16),
        ("base-channels", network.base_channels, 2**14),
        ("blocks-per-level", network.blocks_per_level, 64),
        ("head-rank", network.head_rank or 0, 2**14),
        *(("multipliers", multiplier, 64) for multiplier in network.multipliers),
    ]


def _unit_interval(config: RunConfig) -> list[tuple[str, float, bool]]:
    return [
        ("dropout", config.network.dropout, True),
        ("dropout-until", config.train.dropout_until, False),
        ("label-dropout", config.train.label_dropout, False),
        ("ema-decay", config.train.ema_decay, True),
        ("decay-factor", config.train.decay_factor, False),
    ]


def _nonnegative(config: RunConfig) -> list[tuple[str, float]]:
    names = ("lr", "weight_decay", "clip_norm", "ce_weight", "mse_weight", "class_weight")
    of_training = [(name.replace("_", "-"), getattr(config.train, name)) for name in names]
    return [*of_training, ("guidance", config.output.guidance)]


def _check_resolutions(config: RunConfig) -> None:
    """Each halving must be exact, and attention can only stand where the network passes."""
    size, halvings = config.image.size, len(config.network.multipliers) - 1
    if size % 2**halvings:
        raise UserError(
            f"images of {size}x{size} cannot be halved {halvings} times, as {halvings + 1} --multipliers ask;"
            f" give fewer multipliers, or --image-size {max(size // 2**halvings, 1) * 2**halvings}"
        )
    resolutions = [size // 2**i for i in range(halvings + 1)]
    for wanted in config.network.attention_resolutions:
        if wanted not in resolutions:
            raise UserError(
                f"--attention-resolutions {wanted}: this network works at {', '.join(map(str, resolutions))};"
                " choose among these, or give none"
            )
