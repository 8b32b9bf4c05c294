"""The settings of a run: a tree of frozen dataclasses.

The docstring of a field is its help on the command line, its name its flag (`batch_size` is `--batch-size`),
and the tree as JSON is the `config.json` of a run directory. `check` has the bounds. Nothing here imports
torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cdm_fast.config.choices import Architecture, Compile, Objective, Precision, Resample, Sampler
from cdm_fast.config.flags import ImageSizeFlag, Suppress, arg
from cdm_fast.config.size import Sides, plain_size

Schedule = Literal["linear", "uniform", "ot", "cosine"]
# Position of grey level u of N in [-1, 1]: the interval [2u/N - 1, 2(u+1)/N - 1), or the point 2u/(N-1) - 1
# for models trained on u/(N-1) without noise, whose interval is the one of width 2/(N-1) around it.
PixelMap = Literal["intervals", "points"]

CE_WEIGHT = 1e-3  # default weight of the cross-entropy over levels, beside the mean squared error of eps_hat


@dataclass(frozen=True)
class DataConfig:
    """The training data."""

    source: Annotated[str, arg(name="data")] = "digits"
    """`digits`, a folder or zip of pictures, a .csv or .jsonl of file names, an .npz, a folder of MNIST,
    CIFAR, parquet or arrow files, or hf:NAME."""
    image_size: ImageSizeFlag = None
    """Resample the cropped images to this size: 64 for a square, 48x64 for height by width. By default they
    keep their size."""
    crop: str = "centre"
    """`centre`, the largest central box with the proportions of --image-size; `none`, the whole picture; or
    LEFT,TOP,WIDTH,HEIGHT in pixels."""
    resample: Resample = "bicubic"
    """Filter of --image-size, antialiased."""
    channels: int | None = None
    """1 converts all images to grey, 3 to colour; by default they keep the channels of the first image."""
    hf_column: str | None = None
    """Image column of hf:NAME, parquet or arrow files, if there are several."""
    hf_split: str | None = None
    """Split of hf:NAME to train on, if it is not called train."""
    given: Suppress[str | None] = None
    """The source as given, if it was a relative path."""
    split_seed: int = 0
    """Seed, 0 or more, of the train/validation/test split of sources without splits."""
    flip: bool = False
    """Mirror a random half of the training images left to right."""
    pixels: PixelMap = "intervals"
    """Position of grey level u of N in [-1, 1]: `intervals` draws it from [2u/N, 2(u+1)/N] - 1 at each step,
    `points` is 2u/(N-1) - 1 without noise, as in the paper's code. Likelihoods use uniform noise over the
    interval in both cases."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            object.__setattr__(self, "image_size", plain_size(self.image_size))


@dataclass(frozen=True)
class ImageShape:
    """Size, channels and grey levels of the images, read from the data when a run starts."""

    height: int = 8
    """H in pixels, 1..1024; 1 for signals."""
    width: int = 8
    """W in pixels, 1..1024."""
    channels: int = 1
    """1 for grey, 3 for colour."""
    num_grey_levels: int = 17
    """N, 2..256: pixels are integers 0..N-1."""
    num_classes: int | None = 10
    """Number of classes, 1..65536; None for images without labels."""
    class_counts: tuple[int, ...] | None = None
    """Number of training images of each class, which gives the class prior; None without labels."""

    @property
    def sides(self) -> Sides:
        """(height, width)."""
        return self.height, self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule: x_t = a[t] x_0 + s[t] eps for t = 0..T+1."""

    schedule: Schedule = "uniform"
    """Shape of a[t] and s[t]."""
    T: int = 200
    """Number of noise levels between clean data and pure noise, 2..10^6; the network tells T+2 levels
    apart."""
    level_distribution: Literal["uniform", "log-snr"] = "uniform"
    """Distribution of the levels in training: uniform over levels, or over the log signal-to-noise ratio."""
    beta_start: float | None = None
    """First beta of `--schedule linear`, above 0; by default 1e-4 times 1000/T."""
    beta_end: float | None = None
    """Last beta of `--schedule linear`, at most 0.999; by default 0.02 times 1000/T."""
    sigma_min: float = 0.0
    """Noise that `--schedule ot` keeps near the data, from 0 to below 1: s[t] = 1 - (1 - sigma_min) a[t] for
    t > 0."""


@dataclass(frozen=True)
class NetworkConfig:
    """The network."""

    architecture: Architecture = "unet"
    """`unet` is the network of the paper; `encoder` is its downsampling path, whose gradient serves as
    the decoder; `transformer` reads patches, and has the sizes from --patch-size to --stem-channels in
    place of those from --base-channels to --attention-resolutions."""
    base_channels: int = 32
    """Channels at full resolution, 1..16384; a multiple of --num-groups."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels at each resolution as multiples (1..64) of --base-channels; each resolution halves height and
    width of the one before, but never a side of 1."""
    blocks_per_level: int = 2
    """Residual blocks at each resolution of the downsampling path, 1..64; upsampling has one more."""
    attention_resolutions: tuple[int | float, ...] = (4,)
    """Resolutions at which self-attention follows each block; the middle always has it. Whole numbers are
    heights in pixels (widths, if images are one pixel high); numbers with a decimal point are shares of the
    full size: 1.0, 0.5, 0.25, ..."""
    patch_size: int = 4
    """Side of a transformer's patch in pixels, 1..64; a divisor of height and width."""
    width: int = 128
    """Channels of a transformer's tokens, 4..16384; a multiple of 4, of --head-width and of --num-groups."""
    depth: int = 6
    """Blocks of a transformer, 1..256."""
    head_width: int = 32
    """Channels of a transformer's attention head, 4..1024; a multiple of 4."""
    stem_channels: int = 32
    """Channels of a transformer's convolutions at full resolution, up to 16384; 0 for patches of the image
    itself."""
    stem_resolutions: int = 1
    """Resolutions of a transformer's stem, 1..6: each after the first halves height and width and doubles the
    channels; --patch-size is a multiple of 2 to the power of their number minus one."""
    stem_blocks: int = 1
    """Residual blocks of each resolution of a transformer's stem, 1..64."""
    num_groups: int = 32
    """Groups of each GroupNorm, 1 or more."""
    dropout: float = 0.1
    """Dropout probability in residual blocks, from 0 to below 1."""
    conditioning: Literal["none", "embedding", "joint"] = "none"
    """`embedding` feeds the label to each block, and drops some labels to train the unconditional model too;
    `joint` has a logit for each pair of level and class, so one pass gives the likelihood of every class."""
    head_rank: int | None = None
    """Rank of the joint head over classes, up to 16384; 0 for full rank. By default full rank up to 2^25
    weights, 32 above (--conditioning joint only)."""
    base_components: int = 0
    """Gaussians of the base, 0..1024, for each class with --conditioning joint: a mixture that is fitted to
    the training images before the first step, and to whose densities at every noise level the network adds
    its own; 0 for no base (--objective cdm only)."""
    base_rank: int = 64
    """Principal directions of each Gaussian of the base, 1..4096."""


@dataclass(frozen=True)
class TrainConfig:
    """The objective and the optimizer."""

    objective: Objective = "cdm"
    """`cdm`: classify the noise level, and denoise by the gradient; `ddm`: the plain denoising baseline;
    `classifier`: the discriminative baseline, cross-entropy over the classes of images."""
    steps: int = 1000
    """Total number of optimizer steps, 1 or more."""
    batch_size: int = 128
    """Images per optimizer step, over all processes."""
    level_draws: Literal["independent", "stratified"] = "independent"
    """How the noise levels of a batch are drawn: independently, or stratified by one randomly shifted grid,
    so that every batch covers their distribution evenly."""
    accumulate: int = 1
    """Number of parts into which each batch is split to save memory; a divisor of --batch-size."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Optimizer, in its fused form."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay (adamw only)."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["none", "step", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, multiplied by --decay-factor every --decay-every steps, or a
    half cosine down to 0 at the last step."""
    decay_every: int = 50000
    """Steps between two drops of `--decay step`."""
    decay_factor: float = 0.5
    """Factor of each drop of `--decay step`, 0..1."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down to it. 0 turns clipping off."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, from 0 to below 1. Sampling and scoring use the
    average."""
    ema_start: int = 0
    """Steps during which the average is a copy of the weights, after which its decay is constant; with 0 its
    decay rises gradually from the first step."""
    finetune: str | None = None
    """Run directory, trained or converted, or hf:OWNER/NAME, whose averaged weights start the new run."""
    ce_weight: float = CE_WEIGHT
    """Weight of the cross-entropy over noise levels (cdm only)."""
    mse_weight: float = 1.0
    """Weight of the denoising error (cdm only)."""
    class_weight: float = 0.0
    """Weight of an additional cross-entropy over classes at the level of the input; with --conditioning
    embedding over the class of the image and one other, drawn at random, which takes a second evaluation."""
    classifier_noise: float = 0.0
    """Standard deviation of the Gaussian noise under which a classifier is trained, for pixels from 0 (black)
    to 1 (white), rounded to the nearest level of the schedule (--objective classifier only)."""
    adversarial: Literal["none", "linf", "l2"] = "none"
    """Also train the classes of images that a few gradient steps have perturbed so that they are
    misclassified, up to --budget in this norm (--conditioning joint, or --objective classifier)."""
    budget: float = 0.0
    """Largest norm of these perturbations, for pixels from 0 (black) to 1 (white) (--adversarial only)."""
    adversarial_steps: int = 3
    """Gradient steps that find each perturbation, 1 or more; each costs a forward and a backward pass."""
    adversarial_weight: float | None = None
    """Weight of the cross-entropy over the classes of perturbed images; by default 0.01 for a CDM, where a
    larger one costs likelihood, and 1 for a classifier."""
    dropout_until: float = 1.0
    """Fraction of the steps, 0..1, after which dropout is turned off. Single-pass likelihoods are too good if
    it stays on until the end."""
    deform: float = 0.0
    """Fraction of the training images, 0..1, that are rotated, sheared, scaled and shifted a little at
    random: for training sets so small that the network memorises them."""
    deform_until: float = 1.0
    """Fraction of the steps, 0..1, after which images are no longer deformed, so that the likelihood learned
    last is that of the original images."""
    label_dropout: float = 0.1
    """Fraction of the labels that are left out, 0..1 (class-conditional networks only)."""
    precision: Precision = "auto"
    """Arithmetic of the network in training: fp32 is IEEE single precision, not TF32; auto is bf16 on
    hardware where it is faster, otherwise fp32."""
    compile: Compile = "auto"
    """Mode of torch.compile for the loss: auto is `default` on a GPU and off on a CPU; `reduce-overhead` also
    records CUDA graphs."""
    checkpoint_blocks: bool = False
    """Recompute activations in the backward pass (gradient checkpointing): saves memory and takes 1.8 times
    the time."""
    channels_last: bool = True
    """Keep images and weights in channels-last memory format."""
    seed: int = 0
    """Seed of all random numbers, 0 or more; each draw is a function of the seed and the step."""
    max_bad_steps: int = 20
    """Number of consecutive steps with a non-finite loss or gradient after which training stops; each such
    step is skipped."""


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, and how often."""

    log_every: int = 50
    """Steps between two lines of log.jsonl; each line has means over these steps."""
    save_every: int = 500
    """Maximum number of steps lost if the process dies; checkpoints are written twice as often."""
    keep: int = 2
    """Number of checkpoints to keep, the newest ones."""
    sample_every: int = 500
    """Steps between two sample grids and loss curves; 0 draws them at the end only."""
    evaluate_every: int = 500
    """Steps between two validations (likelihood, classes, calibration of the levels); 0 scores the test split
    at the end only."""
    evaluate_images: int = 500
    """Validation images to score each time; the test split is always scored whole."""
    keep_best: Literal["none", "bits_per_dim", "level_ce", "class_ce"] = "none"
    """Also keep the checkpoint with the lowest value of this validation figure, in RUN/best, which is a run
    directory itself."""
    constants_rows: int = 0
    """Noised training images to which the constants of the logits are refitted after the last step, with all
    weights fixed (see `calibrate --method constants`); 0 leaves them as trained."""
    draws: int = 3
    """Dequantisation draws of the final likelihood."""
    num_samples: int = 64
    """Number of images in the sample grid."""
    sampler: Sampler = "auto"
    """Sampler of the sample grid: `auto` is `blind` for a CDM, which finds the noise of each image by itself,
    and `ddim` for a DDM."""
    sampling_steps: int = 50
    """Number of noise levels that this sampler visits, at most T."""
    guidance: float = 1.0
    """Strength of classifier-free guidance in the sample grid of a class-conditional run, which has a row for
    each class."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run directory (extra: tensorboard)."""
    wandb: bool = False
    """Also send the log to Weights & Biases (extra: wandb)."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines what a run computes and writes; the content of `config.json`.

    Fields:
        data: the training data.
        image: size, channels and grey levels of the images, read from the data.
        schedule: the noise schedule.
        network: the network.
        train: the objective and the optimizer.
        output: what is written, and how often.
    """

    data: DataConfig = field(default_factory=DataConfig)
    image: Suppress[ImageShape] = field(default_factory=ImageShape)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
