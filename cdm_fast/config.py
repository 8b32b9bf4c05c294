"""The one description of a run: a tree of frozen dataclasses, and the presets as values of it.

The field docstrings are the command line's help, the field names its flags (`batch_size` is `--batch-size`),
and the tree as JSON is the `config.json` of a run directory. Nothing here imports torch.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from tyro.conf import Suppress, arg

from cdm_fast.errors import UserError

Sampler = Literal["ddpm", "ddim", "dpm_solver_pp_2m", "heun", "euler_ot"]
Preset = Literal[
    "digits",
    "fashion-mnist",
    "cifar10",
    "celeba64",
    "digits-encoder",
    "fashion-mnist-encoder",
    "cifar10-encoder",
    "cifar10-paper",
    "celeba64-paper",
]
Objective = Literal["cdm", "ddm", "classifier"]
Schedule = Literal["linear", "uniform", "ot", "cosine"]
# Where grey level u of N stands in [-1, 1]: over [2u/N - 1, 2(u+1)/N - 1), or around the point 2u/(N-1) - 1,
# as for models trained on u/(N-1) without noise; its interval is then 2/(N-1) wide.
PixelMap = Literal["intervals", "points"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "off", "default", "reduce-overhead"]


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    source: Annotated[str, arg(name="data")] = "digits"
    """`digits`, a folder of IDX files (MNIST family), a CIFAR binary folder, an image folder or zip, an .npz,
    or hf:NAME."""
    image_size: int | None = None
    """Crop the centre and resize it to this many pixels; by default the images stay as they are."""
    split_seed: int = 0
    """Seed of the train/validation/test split of sources that come without one."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    pixels: PixelMap = "intervals"
    """Where grey level u of N stands: `intervals`, anywhere in [2u/N, 2(u+1)/N] - 1, drawn anew at each step;
    `points`, at 2u/(N-1) - 1 without noise, as in the paper's code. Scores spread it over the interval around
    either."""


@dataclass(frozen=True)
class ImageShape:
    """What the images are; filled in from the data when a run starts."""

    size: int = 8
    """Height and width in pixels."""
    channels: int = 1
    """1 for grey, 3 for colour."""
    num_grey_levels: int = 17
    """Pixels are integers 0..num_grey_levels-1."""
    num_classes: int | None = 10
    """Number of classes, or null when the images carry no labels."""
    class_counts: tuple[int, ...] | None = None
    """Training images of each class: the class prior that likelihoods given a class are read with."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise levels: x_t = a[t] x_0 + s[t] eps, t = 0..T+1."""

    schedule: Schedule = "uniform"
    """Shape of a[t] and s[t]."""
    T: int = 200
    """Noise levels between clean data and pure noise; the network tells T+2 levels apart."""
    level_distribution: Literal["uniform", "log-snr"] = "uniform"
    """How training draws levels: all alike, or evenly in log signal-to-noise ratio."""
    beta_start: float | None = None
    """First beta of `--schedule linear`; by default 1e-4 times 1000/T."""
    beta_end: float | None = None
    """Last beta of `--schedule linear`; by default 0.02 times 1000/T."""
    sigma_min: float = 0.0
    """Noise that `--schedule ot` leaves at its data's end: s[t] = 1 - (1 - sigma_min) a[t] for t > 0."""


@dataclass(frozen=True)
class NetworkConfig:
    """The network."""

    architecture: Literal["unet", "encoder"] = "unet"
    """`unet`: the paper's; `encoder`: its way down alone, whose adjoint takes the part of the way up."""
    base_channels: int = 32
    """Channels at full resolution; a multiple of the number of groups."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels at each resolution, in units of the base; every further entry halves the image."""
    blocks_per_level: int = 2
    """Residual blocks per resolution on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (4,)
    """Image sizes at which every block is followed by self-attention; the middle always has it."""
    num_groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.1
    """Probability of dropping an activation inside a residual block."""
    conditioning: Literal["none", "embedding", "joint"] = "none"
    """`embedding` feeds the label to every block, and label dropout also trains the unconditional model;
    `joint` has a logit for every pair of level and class: all classes in one pass."""
    head_rank: int | None = None
    """Rank of the head over classes: 0 for a full head, which is the default up to 2^25 weights; beyond them
    32 (--conditioning joint only)."""


@dataclass(frozen=True)
class TrainConfig:
    """The objective and the optimizer."""

    objective: Objective = "cdm"
    """`cdm`: classify the noise level and denoise by its gradient; `ddm`: the plain denoising baseline;
    `classifier`: the discriminative one, cross-entropy over the classes of clean images."""
    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 128
    """Images per optimizer step."""
    accumulate: int = 1
    """Split each batch into this many parts, one after the other, to save memory."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Both in their fused form."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly from zero."""
    decay: Literal["none", "step", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, times --decay-factor every --decay-every steps, or a half
    cosine down to zero at the last step."""
    decay_every: int = 50000
    """Steps between two drops of `--decay step`."""
    decay_factor: float = 0.5
    """Factor of each drop of `--decay step`."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; longer ones are shortened to it. 0 turns clipping off."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which sampling and scoring use."""
    ema_start: int = 0
    """Steps during which the average is a copy of the weights, its decay constant after them; 0: the decay
    rises from the first step on."""
    finetune: str | None = None
    """Begin from the averaged weights of this run directory, trained or converted, in a new run."""
    ce_weight: float = 1e-3
    """Weight of the cross-entropy over noise levels (cdm only)."""
    mse_weight: float = 1.0
    """Weight of the denoising error (cdm only)."""
    class_weight: float = 0.0
    """Weight of the cross-entropy over classes at the input's level, on top of its part in the one over noise
    levels (--conditioning joint only)."""
    dropout_until: float = 1.0
    """Share of the steps, from the first, that drop activations; the rest trains the network as it is used
    afterwards, whose likelihoods are off otherwise."""
    label_dropout: float = 0.1
    """Share of the labels left out (class-conditional networks only)."""
    precision: Precision = "auto"
    """Arithmetic of the network in training: fp32 is IEEE single precision, not TF32; auto is bf16 where the
    hardware gains by it, or fp32."""
    compile: Compile = "auto"
    """torch.compile of the loss: auto is `default` on a GPU and off on a CPU; `reduce-overhead` records CUDA
    graphs too."""
    checkpoint_blocks: bool = False
    """Keep only the inputs of the network's stages and compute the rest again: saves memory where batches are
    large, at 1.8 times the time."""
    channels_last: bool = True
    """Keep images and weights channels-last in memory."""
    seed: int = 0
    """Seed of everything random: each draw is a function of (seed, step)."""
    max_bad_steps: int = 20
    """Stop after this many steps in a row whose loss or gradient is not finite; each such step is skipped."""


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, and how often."""

    log_every: int = 50
    """Steps between two lines of log.jsonl; each holds means over the steps since the one before."""
    save_every: int = 500
    """Steps that may be lost, whatever ends the run: a checkpoint is begun after every half of so many."""
    keep: int = 2
    """Newest checkpoints to keep."""
    sample_every: int = 500
    """Steps between two sample grids and loss curves; 0: only at the end."""
    evaluate_every: int = 500
    """Steps between two validation likelihoods; 0: only at the end, on the test split."""
    evaluate_images: int = 500
    """Validation images to score at those intervals; the test split is always scored whole."""
    draws: int = 3
    """Dequantisation draws of the final likelihood."""
    num_samples: int = 64
    """Images in the sample grid."""
    sampler: Sampler = "ddim"
    """Sampler of the sample grid."""
    sampling_steps: int = 50
    """Steps of that sampler."""
    guidance: float = 1.0
    """How much the sample grid overstates the class; a class-conditional run's has a row for each class."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run directory (extra: tensorboard)."""
    wandb: bool = False
    """Also send the log to Weights & Biases (extra: wandb)."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes and writes."""

    data: DataConfig = field(default_factory=DataConfig)
    image: Suppress[ImageShape] = field(default_factory=ImageShape)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


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
        output=OutputConfig(evaluate_every=250, num_samples=80, sampler="ddpm", sampling_steps=100),
    ),
    "fashion-mnist": RunConfig(
        data=DataConfig(source="data/fashion-mnist"),
        image=ImageShape(size=28, channels=1, num_grey_levels=256, num_classes=10),
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
            sampler="ddpm",
            sampling_steps=100,
        ),
    ),
    "cifar10": RunConfig(
        data=DataConfig(source="data/cifar-10-batches-bin", flip=True),
        image=ImageShape(size=32, channels=3, num_grey_levels=256, num_classes=10),
        schedule=ScheduleConfig(T=1000),
        network=NetworkConfig(base_channels=128, multipliers=(1, 2, 2, 2), attention_resolutions=(16,)),
        train=TrainConfig(steps=500_000, lr=2e-4, warmup=5000, decay="none", ema_decay=0.9999),
        output=OutputConfig(log_every=100, save_every=5000, sample_every=5000, evaluate_every=25_000),
    ),
    "celeba64": RunConfig(
        data=DataConfig(source="data/celeba", image_size=64, flip=True),
        image=ImageShape(size=64, channels=3, num_grey_levels=256, num_classes=None),
        schedule=ScheduleConfig(T=1000),
        network=NetworkConfig(base_channels=128, multipliers=(1, 2, 2, 2, 4), attention_resolutions=(16,)),
        train=TrainConfig(steps=500_000, lr=1e-4, warmup=5000, decay="none", ema_decay=0.9999),
        output=OutputConfig(log_every=100, save_every=5000, sample_every=5000, evaluate_every=25_000),
    ),
}

for _name in ("digits", "fashion-mnist", "cifar10"):
    _network = replace(PRESETS[_name].network, architecture="encoder")
    PRESETS[f"{_name}-encoder"] = replace(PRESETS[_name], network=_network)
# As long as the U-Net's 1000 steps.
_train = replace(PRESETS["digits-encoder"].train, steps=2500)
PRESETS["digits-encoder"] = replace(PRESETS["digits-encoder"], train=_train)


# The paper's own settings, from its public code, github.com/shaharYadin/CDM:
# config/config.yaml has T, betas, steps, lr, batch size, loss weights and the average's decay; cdm.py the
# warm-up over 5000 steps, a tenth of the rate after every 200,000, no clipping, and an average that is a copy
# of the weights for 5000 steps; main.py the networks, dropout, mirroring, and 2u/255 - 1 without noise.
# Its CelebA is cropped to rows 57..184 and columns 25..152 before it is resized (CustomImageDataset.py): give
# images that are.
_theirs = TrainConfig(
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
    _ours = PRESETS[_name]
    PRESETS[f"{_name}-paper"] = replace(
        _ours,
        data=replace(_ours.data, pixels="points"),
        schedule=ScheduleConfig(schedule="linear", T=1000, beta_start=1e-4, beta_end=0.02),
        train=_theirs,
    )


def preset(name: str) -> RunConfig:
    """The preset called `name`; raises UserError naming the known ones."""
    if name not in PRESETS:
        raise UserError(f"unknown --preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


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
