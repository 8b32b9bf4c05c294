"""The settings of a run: a tree of frozen dataclasses.

The field docstrings are the command line's help, the field names its flags (`batch_size` is `--batch-size`),
and the tree as JSON is the `config.json` of a run directory. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cdm_fast.config.choices import Compile, Objective, Precision, Resample, Sampler
from cdm_fast.config.flags import Suppress, arg

Schedule = Literal["linear", "uniform", "ot", "cosine"]
# Where grey level u of N stands in [-1, 1]: over [2u/N - 1, 2(u+1)/N - 1), or around the point 2u/(N-1) - 1,
# as for models trained on u/(N-1) without noise; its interval is then 2/(N-1) wide.
PixelMap = Literal["intervals", "points"]

CE_WEIGHT = 1e-3  # default weight of the cross-entropy over levels, beside the mean squared error of eps_hat


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    source: Annotated[str, arg(name="data")] = "digits"
    """`digits`, a folder or zip of pictures, a .csv or .jsonl that names some, an .npz, a folder of the files
    of MNIST or CIFAR or of parquet or arrow, or hf:NAME."""
    image_size: int | None = None
    """Resample what --crop leaves to this many pixels a side; by default the images stay as they are."""
    crop: str = "centre"
    """`centre`, the central square; `none`, the whole picture; or LEFT,TOP,WIDTH,HEIGHT in pixels."""
    resample: Resample = "bicubic"
    """Filter of --image-size, antialiased."""
    channels: int | None = None
    """1 makes all images grey, 3 colour; by default they stay as the first one is."""
    hf_column: str | None = None
    """Image column of hf:NAME, parquet or arrow files, where there are several."""
    hf_split: str | None = None
    """Split of hf:NAME to train on, where it is not called train."""
    given: Suppress[str | None] = None
    """The source as it was given, where it was a relative path."""
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
    level_draws: Literal["independent", "stratified"] = "independent"
    """How a batch draws its noise levels: each by itself, or all by one randomly shifted grid through their
    distribution, so that every batch covers it evenly."""
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
    ce_weight: float = CE_WEIGHT
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
    """Steps between two validations (likelihood, classes, calibration of the levels); 0: only at the end, on
    the test split."""
    evaluate_images: int = 500
    """Validation images to score at those intervals; the test split is always scored whole."""
    keep_best: Literal["none", "bits_per_dim", "level_ce", "class_ce"] = "none"
    """Also keep the checkpoint with the lowest value of this validation figure, as a run directory of its
    own, RUN/best."""
    constants_rows: int = 0
    """Noised training images to which the constants of the logits are refitted after the last step, with all
    weights held (see `calibrate --method constants`); 0: they stay as trained."""
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
