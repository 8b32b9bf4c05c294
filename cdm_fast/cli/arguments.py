"""The arguments and flags of each command, as frozen dataclasses whose docstrings are its help.

Options of several commands are defined once, in a base class. `train` also has a flag for every field of the
run's settings (`config.settings`).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cdm_fast.config import Compile, PixelMap, Preset, RunConfig, Sampler, Schedule
from cdm_fast.config.choices import (
    PARTICLES,
    AttackName,
    AttackNorm,
    ClassifyMethod,
    CorrectedSampler,
    Given,
    Parallel,
    Resample,
    RestoreTask,
    Split,
)
from cdm_fast.config.flags import FlagCreatePairsOff, ImageSizeFlag, Positional

Switch = Annotated[bool, FlagCreatePairsOff]  # an option that is on when it is given


@dataclass(frozen=True, kw_only=True)
class WithJson:
    """The option of every command."""

    json: Switch = False
    """Print the result as one JSON object on standard output; everything else goes to standard error."""


@dataclass(frozen=True, kw_only=True)
class WithDevice(WithJson):
    """The options of commands that run a network."""

    device: str = "auto"
    """Device to compute on: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class WithCompile(WithDevice):
    """The options of commands that may compile the network."""

    compile: Compile = "auto"
    """Mode of torch.compile; auto is `default` on a GPU and off on a CPU."""


@dataclass(frozen=True, kw_only=True)
class WithSolver:
    """The options of the probability-flow ODE."""

    tolerance: float = 1e-5
    """Relative and absolute tolerance of the ODE solver."""
    probes: int | None = None
    """Random probes that estimate the divergence in the ODE, 2 or more; 0 computes it exactly, with one probe
    per dimension. By default 4, or exact up to 16 dimensions."""


@dataclass(frozen=True, kw_only=True)
class WithParticles:
    """The options of the measurement of log Z."""

    particles: int = PARTICLES
    """Particles in each run that measures log Z."""
    runs: int = 3
    """Independent runs that measure log Z; their spread gives the standard error."""
    moves: int = 1
    """Langevin moves of each particle at each level."""
    rungs: int | None = None
    """Number of levels that the particles visit, by default all of up to 256. log Z is interpolated at the
    levels between them."""


@dataclass(frozen=True, kw_only=True)
class WithBatches:
    """The options of commands that process many images."""

    batch_size: int = 500
    """Network inputs per forward pass; a smaller number needs less memory."""
    seed: int = 0
    """Seed of all random numbers."""


@dataclass(frozen=True)
class Train(WithDevice):
    """Train a model, or continue a run.

    Ctrl-C saves a checkpoint and stops; a second Ctrl-C stops at once.
    """

    preset: Preset = "digits-encoder"
    """Preset that sets the defaults of all options below."""
    out: Path | None = None
    """Run directory to create; by default runs/PRESET."""
    resume: Path | None = None
    """Continue the run in this directory from its newest checkpoint."""
    max_time: float | None = None
    """Save and stop after this many seconds."""
    cache: str | None = None
    """Folder of prepared copies of data, or `off`; by default CDM_FAST_CACHE, or the user's cache folder."""
    parallel: Parallel = "ddp"
    """Under torchrun: `ddp` keeps the whole model in every process, `fsdp` a part of it in each."""
    config: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Sample(WithCompile):
    """Draw images from a trained model.

    Ctrl-C stops and keeps the images drawn so far.
    """

    run: Positional[Path]
    """Run directory or hf:OWNER/NAME; or diffusers:PATH, another program's model."""
    num: int = 64
    """Number of images to draw."""
    sampler: Sampler | CorrectedSampler = "auto"
    """Sampling algorithm. `auto` is `blind` for a CDM and `ddim` for other models. `blind` finds the noise of
    each image by itself, where others suppose that of the step: cleaner images of a network that isn't
    perfect. `mala` and `smc` correct the images at each level by Metropolis-adjusted moves, which need
    log p(x)."""
    steps: int = 50
    """Number of noise levels to visit, at most T."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same images."""
    eta: float | None = None
    """Noise that ddim and blind add at each step: 0 for none, 1 for as much as ddpm. By default 0 for ddim
    and 1 for blind."""
    moves: int = 2
    """Moves at each level (mala and smc only)."""
    leapfrog: int = 1
    """Leapfrog steps in each move: 1 is a Langevin move, more are Hamiltonian Monte Carlo (mala and smc
    only)."""
    label: int | None = None
    """Class to draw (class-conditional runs only); by default all classes in turn."""
    guidance: float = 0.0
    """Strength w of classifier-free guidance, (1+w) eps(x, class) - w eps(x) (class-conditional runs
    only)."""
    between: int | None = None
    """Interpolate from --label to this class: for each of --num, a row of 9 images from the same noise."""
    out: Path | None = None
    """Where to write: a .png sheet, an .npz of uint8 images (N,H,W,C), or a folder for one PNG per image. The
    last two are written batch by batch, so any --num fits into memory. By default
    RUN/samples-SAMPLER-STEPS-SEED.png."""
    batch_size: int = 256
    """Images to draw at a time; a smaller number needs less memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network: fp32 is IEEE single precision, not TF32; bf16 is faster where the hardware
    supports it."""


@dataclass(frozen=True)
class Nll(WithBatches, WithParticles, WithSolver, WithCompile):
    """Measure the likelihood of images under a trained model, in bits per dimension."""

    run: Positional[Path]
    """Run directory or hf:OWNER/NAME; or diffusers:PATH, a folder written by `save_pretrained`."""
    data: str | None = None
    """Data source; by default the data of the run."""
    split: Split = "test"
    """Part of the data to score."""
    method: Literal["single", "ode", "elbo", "audit"] = "single"
    """`single` is one forward pass, unaudited; `ode` the probability-flow ODE; `elbo` the variational bound.
    `audit` runs all three, measures log Z of the single pass, and draws RUN/audit.png (of other data, or of
    another split or level, RUN/audit-other.png); for a model that only denoises it runs the ODE and the
    bound."""
    given: Given | None = None
    """Likelihood of a class-conditional model: `label` conditions each image on its label, `all` averages
    over the classes, `none` uses no label. By default none; label where the model has no unconditional part
    or with --protocol paper."""
    pixels: PixelMap | None = None
    """Position of grey level u of N in [-1, 1]: `intervals` is [2u/N, 2(u+1)/N] - 1, `points` the interval of
    width 2/(N-1) around 2u/(N-1) - 1. By default as in the run; points for other programs' models."""
    level: int = 0
    """Noise level at which to score; 0 is clean data."""
    draws: int = 3
    """Dequantisation draws of the single pass; their spread is printed."""
    protocol: Literal["dequantized", "paper"] = "dequantized"
    """`paper` scores the points 2u/(N-1) - 1 without dequantisation, with labels if the model has classes, as
    the paper's code does. Its figures are lower and not comparable with dequantised ones."""
    out: Path | None = None
    """Write one row per image to this .npz or .csv, and the full report, with its values at each noise level,
    to a .json of the same name."""
    ode_images: int = 32
    """Images to score by the ODE, drawn at random from the split."""
    elbo_images: int = 256
    """Images to score by the variational bound, drawn at random from the split."""
    elbo_every: int = 1
    """Measure each noise level of the variational bound on every so many of the images: so many times as
    fast, with a larger standard error."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the single pass: fp32 is IEEE single precision, not TF32; for bf16 the difference from
    fp32 in bits/dim is printed too."""


@dataclass(frozen=True)
class Calibrate(WithBatches, WithParticles, WithDevice):
    """Measure log Z of the single pass at every level, or refit the constants of the logits.

    Likelihoods then use them. The checkpoints do not change: the constants are stored in
    RUN/calibration.json or RUN/constants.json.
    """

    run: Positional[Path]
    """Run directory or hf:OWNER/NAME."""
    method: Literal["particles", "constants"] = "particles"
    """`particles` measures log Z by annealing; `constants` refits the constants of the logits, including
    those of classes, to noised training images."""
    undo: Switch = False
    """Remove the stored constants of this method instead."""
    rows: int = 100_000
    """Number of noised training images for `--method constants`."""
    data: str | None = None
    """Data source; by default the data of the run."""
    split: Split = "validation"
    """Part of the data to score before and after; the walks from data to noise start from its images."""


@dataclass(frozen=True)
class Classify(WithBatches, WithSolver, WithDevice):
    """Classify images by the likelihood of each class: accuracy, calibration, bits/dim."""

    run: Positional[Path]
    """Directory of a class-conditional run, or hf:OWNER/NAME; or diffusers:PATH."""
    data: str | None = None
    """Data source with labels; by default the data of the run."""
    split: Split = "test"
    """Part of the data to classify."""
    method: ClassifyMethod | None = None
    """`joint`: all classes in one pass; `embedding`: one pass per class; `discriminative`: a classifier's
    logits; `denoising`: mean denoising error of each class; `ode`: probability-flow ODE of each class. By
    default the method that the run was trained for."""
    draws: int | None = None
    """Dequantisation draws, whose log-probabilities are averaged; by default 3, or 1 for denoising and
    ode."""
    level: int = 0
    """Noise level at which to classify (joint and embedding only); each draw adds new noise."""
    images: int | None = None
    """Number of images, drawn at random from the split; by default all of them, or 32 for ode."""
    trials: int = 50
    """Pairs of noise level and noise for each image (denoising only)."""
    corruptions: Switch = False
    """Also classify under 15 standard corruptions at 5 severities; draws RUN/corruptions.png."""
    attack: AttackName | None = None
    """Also attack the classifier; draws RUN/attack.png. `auto` is the strongest: apgd-ce, apgd-t and square
    in turn. `apgd-undetected` also keeps log p(x) high; `square` uses no gradients; fgsm, pgd, deepfool and
    cw are foolbox's (extra: attacks). For joint, embedding and discriminative."""
    attack_norm: AttackNorm = "linf"
    """Norm of the perturbation; cw needs l2, square needs linf."""
    attack_from: Path | None = None
    """Run directory whose gradients the attack uses, to check this run for masked gradients."""
    budgets: tuple[float, ...] = ()
    """Maximum norms of the perturbation, for pixels in [0, 1]; by default the usual ones."""
    attack_steps: int | None = None
    """Steps of the attack; by default 40 for pgd, 50 for deepfool, 200 for cw, 1000 for square, 100 for apgd
    and auto, whose square takes 50 times as many."""
    attack_draws: int = 0
    """Dequantisation draws over which the attacked classifier averages; 0 takes the centre of each grey
    level."""
    attack_images: int = 100
    """Images to attack, drawn at random from the split."""
    selective: Switch = False
    """Report what abstaining gains: accuracy on the most certain images, conformal prediction sets, rejection
    of the images that `score` flags as unusual. Draws RUN/selective.png."""
    set_coverage: float = 0.9
    """Fraction of images whose conformal prediction set holds their class (--selective)."""
    false_alarms: float = 0.05
    """Fraction of images like the validation split that --selective may reject as unusual, and of the clean
    images that a detector by log p(x) rejects (--attack)."""
    certify: Switch = False
    """Certify the classes against every perturbation up to an L2 radius, by randomized smoothing. Draws
    RUN/certified.png. For joint, embedding and discriminative."""
    sigma: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Standard deviations of the noise of --certify, for pixels from 0 (black) to 1 (white)."""
    certify_images: int = 100
    """Images to certify, drawn at random from the split."""
    certify_draws: int = 1000
    """Noise draws per image; more draws certify larger radii."""
    failure_probability: float = 0.001
    """Probability that the certified radius of an image is too large."""
    certify_precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks in --certify; the certificates hold for the classifier in this precision."""
    denoiser: Path | None = None
    """Run directory whose denoiser is applied before the classifier in --certify."""
    out: Path | None = None
    """Write the prediction and the log-likelihood of every class for each image to this .npz or .csv."""


@dataclass(frozen=True)
class Score(WithBatches, WithDevice):
    """Rank images by how unusual they are: by likelihood, typicality and noise level, from a single pass.

    Draws RUN/score.png, and anomaly maps of the least likely images in RUN/anomaly.png.
    """

    run: Positional[Path]
    """Run directory or hf:OWNER/NAME."""
    data: str | None = None
    """Data source; by default the data of the run."""
    split: Split = "test"
    """Part of the data, and of the data of --against, to score."""
    against: str | None = None
    """Out-of-distribution data, converted to the size and grey levels of the run, or `corrupted`: the data
    itself under 15 corruptions at 5 severities."""
    level: int = 0
    """Noise level at which to score; 0 is clean data."""
    draws: int = 1
    """Dequantisation draws, over which the scores of an image are averaged."""
    images: int | None = None
    """Number of images, drawn at random from the split; by default all of them."""
    false_alarms: float = 0.05
    """Fraction of images like the validation split that may be flagged, 0..1."""
    map_level: int | None = None
    """Noise level of the anomaly map; by default the one with sigma nearest to 0.5, for data in [-1, 1]."""
    noise: Switch = False
    """Also add noise of known sigma and estimate it; draws RUN/sigma.png."""
    out: Path | None = None
    """Write the scores of each image to this .npz or .csv, and those of --against to a second file beside
    it."""


@dataclass(frozen=True)
class Denoise(WithDevice):
    """Estimate the noise in image files and remove it."""

    run: Positional[Path]
    """Run directory or hf:OWNER/NAME; or diffusers:PATH, another program's model."""
    images: Positional[tuple[Path, ...]]
    """Image files of the model's image size."""
    out: Path | None = None
    """Folder for the results; by default RUN/denoised."""


@dataclass(frozen=True)
class Restore(WithDevice):
    """Draw images that are consistent with a measurement: inpainting, denoising, super-resolution.

    The candidates are sorted by log p, the most probable first.
    """

    run: Positional[Path]
    """Run directory or hf:OWNER/NAME."""
    image: Positional[Path]
    """Image file of the model's image size, or smaller by --factor for super-resolution."""
    task: RestoreTask
    """`inpaint`: fill in --mask or --box; `denoise`: remove noise of --sigma; `super-resolution`: enlarge."""
    mask: Path | None = None
    """Image file of the same size, bright (128 or more) where pixels are to be filled in."""
    box: tuple[int, int, int, int] | None = None
    """Box to fill in instead: left, top, width and height in pixels."""
    factor: int | None = None
    """Enlargement along each side (super-resolution only)."""
    sigma: float | None = None
    """Standard deviation of the noise in the measurement, for pixels in [-1, 1]; by default the error of
    rounding to grey levels. Required for denoise."""
    candidates: int = 8
    """Number of candidates to draw."""
    level: int = 0
    """Noise level at which candidates are ranked by log p; higher levels compare only coarse structure."""
    steps: int = 50
    """Number of noise levels to visit, at most T."""
    moves: int = 4
    """Langevin moves at each level."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same candidates."""
    out: Path | None = None
    """A .png of the input, the mean and all candidates; by default RUN/restored-TASK.png."""


@dataclass(frozen=True)
class Plot(WithDevice):
    """Draw loss curves, confusion of noise levels and denoising error per level into the run directory."""

    run: Positional[Path]
    """Run directory or hf:OWNER/NAME."""
    split: Split = "validation"
    """Part of the data on which to measure confusion and error."""


@dataclass(frozen=True)
class Report(WithDevice):
    """Show runs side by side on one HTML page, which needs no server and no other file.

    The page shows the files that a run keeps, computes what is cheap, and names the command for the rest.
    """

    runs: Positional[tuple[Path, ...]]
    """Run directories, or hf:OWNER/NAME."""
    data: str | None = None
    """Data source of what is computed; by default the data of each run. Kept scores are shown as they are."""
    out: Path | None = None
    """File to write, which ends in .html; by default report.html in the directory of the first run."""
    playground: Switch = False
    """Add the network of the first run, which the browser applies to your drawings. Needs the extra onnx, and
    npm or --onnxruntime-web."""
    onnxruntime_web: Path | None = None
    """Folder with the files of onnxruntime-web, instead of fetching them by npm."""


@dataclass(frozen=True)
class Convert(WithJson):
    """Convert a checkpoint of the paper's public code to a run directory."""

    file: Positional[Path]
    """The .pt file. A pickle that would run code is refused."""
    out: Path | None = None
    """Run directory to create; by default runs/FILE without its suffix."""
    schedule: Schedule | None = None
    """Noise schedule of the training: `linear`, or `ot` for FM_training. By default inferred from the number
    of outputs (1002 or 1000) or from the file name."""
    beta_start: float | None = None
    """First beta of `linear`; by default 1e-4 for any number of levels, as in the public code."""
    beta_end: float | None = None
    """Last beta of `linear`; by default 0.02."""
    image_size: ImageSizeFlag = None
    """Size of its images, 64 for a square or 48x64 for height by width; by default the square for which the
    attention is at 16x16."""


@dataclass(frozen=True)
class Push(WithJson):
    """Publish a run on the Hugging Face hub: averaged weights, config, pictures, scores and a card.

    `hf:OWNER/NAME` then stands for the run, here and in `load`. Pushing needs a token: HF_TOKEN, or
    `hf auth login`.
    """

    run: Positional[Path]
    """Run directory; RUN/best for its best checkpoint."""
    repo: Positional[str]
    """Repository OWNER/NAME; created if it does not exist."""
    private: Switch = False
    """Make a new repository private."""
    optimizer: Switch = False
    """Also publish the raw weights and the optimizer state. Others can then download the folder and continue
    the training with `train --resume FOLDER`."""
    edited_card: Literal["refuse", "keep", "replace"] = "refuse"
    """What to do if the text of the repository's card has been edited. Metadata that push does not write,
    such as a licence, are always kept."""
    dry_run: Path | None = None
    """Write what would be published into this folder, and upload nothing."""


@dataclass(frozen=True)
class Doctor(WithJson):
    """Show versions, devices, the backend of each op with the reason for it, and what is missing."""


@dataclass(frozen=True)
class Replay(WithDevice):
    """Repeat one training step: its loss, its gradient, and the images with the largest loss.

    The run directory does not change.
    """

    run: Positional[Path]
    """Run directory with a checkpoint of that step or an earlier one."""
    step: int
    """Step to repeat, counted from 0 as in the log and in the message of a run that diverged."""
    out: Path | None = None
    """Write the batch to this .npz: x_t, eps, level, label, index, loss."""


@dataclass(frozen=True)
class Data(WithJson):
    """Show the contents of a data source: kind, splits, shape, classes, size, and its prepared copy."""

    source: Positional[str] = ""
    """Data source, as for `train --data`; optional with --clear."""
    image_size: ImageSizeFlag = None
    """Resample to this size, as in training: 64 for a square, 48x64 for height by width."""
    crop: str = "centre"
    """Crop before resampling: `centre`, `none`, or LEFT,TOP,WIDTH,HEIGHT in pixels."""
    resample: Resample = "bicubic"
    """Filter of --image-size."""
    channels: int | None = None
    """1 converts all images to grey, 3 to colour."""
    split_seed: int = 0
    """Seed of the train/validation/test split of sources without splits."""
    hf_column: str | None = None
    """Image column of hf:NAME, parquet or arrow files, if there are several."""
    hf_split: str | None = None
    """Split of hf:NAME to train on, if it is not called train."""
    prepare: Switch = False
    """Make the prepared copy for training with these settings, or verify an existing one."""
    clear: Switch = False
    """Remove the source's prepared copy; without a source, all copies."""
    sheet: Path | None = None
    """Also draw examples into this .png."""
    cache: str | None = None
    """Folder of prepared copies; by default CDM_FAST_CACHE, or the user's cache folder."""


Command = (
    Train
    | Replay
    | Sample
    | Nll
    | Calibrate
    | Classify
    | Score
    | Denoise
    | Restore
    | Plot
    | Report
    | Convert
    | Push
    | Doctor
    | Data
)
Shared = Train | Sample | Nll | Classify  # several processes may share their work
