"""The arguments of each command, as frozen dataclasses: their docstrings are its help."""

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
from cdm_fast.config.flags import FlagCreatePairsOff, Positional

Json = Annotated[bool, FlagCreatePairsOff]


@dataclass(frozen=True)
class Train:
    """Train a model, or continue a run.

    Ctrl-C saves and stops; a second one leaves at once.
    """

    preset: Preset = "digits-encoder"
    """Where the defaults of everything below come from."""
    out: Path | None = None
    """Run directory to make; by default runs/PRESET."""
    resume: Path | None = None
    """Continue this run directory instead, exactly where it stopped."""
    max_time: float | None = None
    """Stop after this many seconds, with everything saved."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    cache: str | None = None
    """Folder of prepared copies of data, or `off`; by default CDM_FAST_CACHE, or the user's cache folder."""
    parallel: Parallel = "ddp"
    """Under torchrun: `ddp`, every process holds the whole model; `fsdp`, each holds a part of it."""
    json: Json = False
    """Print the summary as one JSON object on stdout."""
    config: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained model."""

    run: Positional[Path]
    """Run directory; or diffusers:PATH or hf:OWNER/NAME, another program's model."""
    num: int = 64
    """Images to draw."""
    sampler: Sampler | CorrectedSampler = "ddim"
    """Sampling algorithm; `mala` and `smc` correct each level by moves that are accepted by log p(x)."""
    steps: int = 50
    """Steps of the sampler, at most T."""
    seed: int = 0
    """The same seed gives the same images."""
    eta: float = 0.0
    """Noise added back by ddim: 0 none, 1 as much as ddpm."""
    moves: int = 2
    """Moves at each level, of mala and smc."""
    leapfrog: int = 1
    """Steps of each move: one is a Langevin move, several a Hamiltonian one (HMC), accepted as a whole."""
    label: int | None = None
    """Class to draw; by default all in turn. Only for class-conditional runs."""
    guidance: float = 0.0
    """How much to overstate the class: w in (1+w) eps(x, class) - w eps(x). Class-conditional runs only."""
    between: int | None = None
    """Draw the way from --label to this class: a row of 9 images from the same noise for each of --num."""
    out: Path | None = None
    """A .png sheet, or an .npz of uint8 images (N,H,W,C); by default RUN/samples-SAMPLER-STEPS-SEED.png."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network: fp32 is IEEE single precision, not TF32; bf16 is faster where there is
    hardware for it."""
    compile: Compile = "auto"
    """torch.compile of the network: auto is `default` on a GPU and off on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Nll:
    """Bits per dimension of images under a trained model, and the audit of such a figure."""

    run: Positional[Path]
    """Run directory; or diffusers:PATH, a folder of diffusers' `save_pretrained`, or hf:OWNER/NAME."""
    data: str | None = None
    """Data source; by default the run's own."""
    split: Split = "test"
    """Which part of the data."""
    method: Literal["single", "ode", "elbo", "audit"] = "single"
    """`single`: one forward pass, unaudited; `ode`: probability-flow ODE; `elbo`: variational bound; `audit`:
    all three, log Z of the single pass, and RUN/audit.png; of a model that only denoises, ODE and bound."""
    given: Given | None = None
    """Of a class-conditional model: `label`, each image given its label; `all`, of all classes together;
    `none`, without a label. By default none, or label where none was never trained or --protocol is paper."""
    pixels: PixelMap | None = None
    """Where grey levels stand: `intervals`, [2u/N, 2(u+1)/N] - 1, or around `points`, 2u/(N-1) - 1. By
    default the run's own; points for other programs' models."""
    level: int = 0
    """Noise level at which to score; 0 is the data itself."""
    draws: int = 3
    """Dequantisation draws of the single pass; their spread is printed."""
    protocol: Literal["dequantized", "paper"] = "dequantized"
    """`paper` scores the points 2u/(N-1) - 1 without dequantisation, given their labels where the model has
    classes, as the paper's code does: lower, and not comparable."""
    out: Path | None = None
    """Also write the values of every image into this .npz or .csv."""
    ode_images: int = 32
    """Images to score by the ODE, drawn from the split."""
    tolerance: float = 1e-5
    """Relative and absolute tolerance of the ODE solver."""
    probes: int | None = None
    """Random probes of the ODE's divergence; 0 is exact, at the cost of one probe per value of an image; by
    default 4, or exact up to 16 dimensions."""
    elbo_images: int = 256
    """Images to score by the variational bound, drawn from the split."""
    particles: int = PARTICLES
    """Particles of each run that measures log Z."""
    runs: int = 3
    """Independent runs that measure log Z; their spread is the error bar."""
    moves: int = 1
    """Langevin moves of every particle at each level."""
    rungs: int | None = None
    """Levels that the particles visit, by default all of up to 256."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the single pass: fp32 is IEEE single precision, not TF32; bf16 is printed with what it
    costs in bits/dim."""
    compile: Compile = "auto"
    """torch.compile of the network: auto is `default` on a GPU and off on a CPU."""
    batch_size: int = 500
    """Images per forward pass."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Calibrate:
    """Measure log Z of the single pass at every level, or refit the logits' constants; likelihoods use them.

    The checkpoints stay as they are; RUN/calibration.json or RUN/constants.json holds the constants.
    """

    run: Positional[Path]
    """Run directory."""
    method: Literal["particles", "constants"] = "particles"
    """`particles` measures log Z by annealing; `constants` refits the constants of the logits, also those of
    classes, to noised training images."""
    undo: Annotated[bool, FlagCreatePairsOff] = False
    """Remove the calibration instead."""
    rows: int = 100_000
    """Noised training images of `--method constants`."""
    data: str | None = None
    """Data source; by default the run's own."""
    split: Split = "validation"
    """Images to score before and after, and from which walks back to noise begin."""
    particles: int = PARTICLES
    """Particles of each run that measures log Z."""
    runs: int = 3
    """Independent runs that measure log Z; their spread is the error bar."""
    moves: int = 1
    """Langevin moves of every particle at each level."""
    rungs: int | None = None
    """Levels that the particles visit, by default all of up to 256; the others are interpolated."""
    batch_size: int = 500
    """Images per forward pass."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Classify:
    """Classify images by every class's likelihood: accuracy, calibration, bits/dim."""

    run: Positional[Path]
    """Run directory of a class-conditional run; or diffusers:PATH or hf:OWNER/NAME."""
    data: str | None = None
    """Data source with labels; by default the run's own."""
    split: Split = "test"
    """Which part of the data."""
    method: ClassifyMethod | None = None
    """By default the run's own: `joint`, all classes in one pass, `embedding`, a pass per class, or the
    `discriminative` one of a classifier. Any other run with classes takes `denoising`, mean denoising error
    of each, and `ode`, probability-flow ODE of each."""
    draws: int | None = None
    """Dequantisation draws, averaged in log-probability; by default 3, or 1 for denoising and ode."""
    level: int = 0
    """Noise level at which to classify, joint and embedding: noise is added, anew in every draw."""
    images: int | None = None
    """Images to classify, drawn from the split; by default all, or 32 by ode."""
    trials: int = 50
    """Pairs of noise level and noise of `denoising`."""
    tolerance: float = 1e-5
    """Relative and absolute tolerance of the ODE solver."""
    probes: int | None = None
    """Random probes of the ODE's divergence; 0 is exact; by default 4, or exact up to 16 dimensions."""
    corruptions: Annotated[bool, FlagCreatePairsOff] = False
    """Also classify under the 15 standard corruptions at 5 severities each; draws RUN/corruptions.png."""
    attack: AttackName | None = None
    """Also attack the classifier with foolbox (extra: attacks), or by `square`, a random search that sees no
    gradient; draws RUN/attack.png. Joint, embedding and discriminative."""
    attack_norm: AttackNorm = "linf"
    """Norm of the perturbation; cw takes l2 alone, square linf."""
    attack_from: Path | None = None
    """Run directory to attack instead; its images are then shown to this run: a check of masked gradients."""
    budgets: tuple[float, ...] = ()
    """Largest norms of the perturbation, white being 1; by default the usual ones."""
    attack_steps: int | None = None
    """Steps of the attack; by default 40 for pgd, 50 for deepfool, 200 for cw, 1000 for square."""
    attack_images: int = 100
    """Images to attack, drawn from the split."""
    out: Path | None = None
    """Also write the prediction and every class's log-likelihood of each image into this .npz or .csv."""
    batch_size: int = 500
    """Network inputs per evaluation."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Score:
    """Rank images by how unusual they are: likelihood, typicality, level posterior, from one pass.

    Draws RUN/score.png, and a map of what is unusual in the least likely images into RUN/anomaly.png.
    """

    run: Positional[Path]
    """Run directory."""
    data: str | None = None
    """Data source; by default the run's own."""
    split: Split = "test"
    """Which part of the data, and of that of --against."""
    against: str | None = None
    """Other data to tell from the data, brought to its size and grey levels, or `corrupted`: the data itself
    under 15 corruptions at 5 severities."""
    level: int = 0
    """Noise level at which to score; 0 is the data itself."""
    draws: int = 1
    """Dequantisation draws, over which an image's scores are averaged."""
    images: int | None = None
    """Images to score, drawn from the split; by default all."""
    false_alarms: float = 0.05
    """Share of images like the run's validation split that may be flagged."""
    map_level: int | None = None
    """Noise level of the anomaly map; by default the one whose sigma is nearest to 0.5 of [-1, 1]."""
    noise: Annotated[bool, FlagCreatePairsOff] = False
    """Also add noise of known sigma and estimate it; draws RUN/sigma.png."""
    out: Path | None = None
    """Also write the scores of every image into this .npz or .csv, and those of other data beside it."""
    batch_size: int = 500
    """Images per forward pass."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Denoise:
    """Denoise image files of unknown noise: estimates its sigma, and removes it."""

    run: Positional[Path]
    """Run directory; or diffusers:PATH or hf:OWNER/NAME, another program's model."""
    images: Positional[tuple[Path, ...]]
    """Image files of the run's size."""
    out: Path | None = None
    """Folder for the results; by default RUN/denoised."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Restore:
    """Draw what an image may have been, given what was measured of it: the most probable candidate first."""

    run: Positional[Path]
    """Run directory."""
    image: Positional[Path]
    """Image file: of the run's size, or for super-resolution smaller by --factor."""
    task: RestoreTask
    """`inpaint`: fill in --mask or --box; `denoise`: remove noise of --sigma; `super-resolution`: enlarge."""
    mask: Path | None = None
    """Image file of the same size, bright (128 or more) where the image is to be filled in."""
    box: tuple[int, int, int, int] | None = None
    """Fill in this box instead: left, top, width and height in pixels."""
    factor: int | None = None
    """How much larger than IMAGE the result is to be along each side."""
    sigma: float | None = None
    """Noise of what was measured, in units of [-1, 1]; by default what rounding to grey levels leaves open.
    `denoise` needs it."""
    candidates: int = 8
    """How many to draw."""
    level: int = 0
    """Noise level at which candidates are ranked by log p; a higher one looks at the coarse alone."""
    steps: int = 50
    """Noise levels to visit, at most T."""
    moves: int = 4
    """Langevin moves at each of them."""
    seed: int = 0
    """The same seed gives the same candidates."""
    out: Path | None = None
    """A .png of the input, the mean and all candidates; by default RUN/restored-TASK.png."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Plot:
    """Draw loss curves, level confusion and denoising error per level into the run directory."""

    run: Positional[Path]
    """Run directory."""
    split: Split = "validation"
    """Images on which to measure confusion and error."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the paths as one JSON object on stdout."""


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of the paper's public code into a run directory."""

    file: Positional[Path]
    """The .pt file; a pickle that wants to run code is refused."""
    out: Path | None = None
    """Run directory to make; by default runs/FILE without its suffix."""
    schedule: Schedule | None = None
    """Noise schedule it was trained with: `linear` for the public code's training, `ot` for its FM_training.
    By default what 1002 or 1000 outputs, or the name that their code gave the file, tell."""
    beta_start: float | None = None
    """First beta of `linear`; by default 1e-4, at any number of levels, as in their code."""
    beta_end: float | None = None
    """Last beta of `linear`; by default 0.02."""
    image_size: int | None = None
    """Image size in pixels; by default the one at which the network attends at 16x16."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Doctor:
    """Tell versions, devices, the backend of every op and why, and what is missing."""

    json: Json = False
    """Print the findings as one JSON object on stdout."""


@dataclass(frozen=True)
class Replay:
    """Compute one training step again: its loss, gradient and worst images.

    Nothing in the run directory changes.
    """

    run: Positional[Path]
    """Run directory; it must hold a checkpoint of that step or before."""
    step: int
    """The step, counted from 0, as the log and the message of a diverged run name it."""
    out: Path | None = None
    """Also write the batch into this .npz: x_t, eps, level, label, index, loss."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Data:
    """Tell what a data source holds: kind, splits, shape, classes, size, and whether a copy is prepared."""

    source: Positional[str] = ""
    """As for `train --data`; not needed with --clear."""
    image_size: int | None = None
    """Resample to this many pixels a side, as in training."""
    crop: str = "centre"
    """`centre`, `none`, or LEFT,TOP,WIDTH,HEIGHT in pixels."""
    resample: Resample = "bicubic"
    """Filter of --image-size."""
    channels: int | None = None
    """1 makes all images grey, 3 colour."""
    split_seed: int = 0
    """Seed of the train/validation/test split of sources that come without one."""
    hf_column: str | None = None
    """Image column of hf:NAME, parquet or arrow files, where there are several."""
    hf_split: str | None = None
    """Split of hf:NAME to train on, where it is not called train."""
    prepare: Annotated[bool, FlagCreatePairsOff] = False
    """Make the prepared copy that training with these settings maps; one that is there is verified."""
    clear: Annotated[bool, FlagCreatePairsOff] = False
    """Remove the source's prepared copy; without a source, all."""
    sheet: Path | None = None
    """Also draw examples into this .png."""
    cache: str | None = None
    """Folder of prepared copies; by default CDM_FAST_CACHE, or the user's cache folder."""
    json: Json = False
    """Print the findings as one JSON object on stdout."""


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
    | Convert
    | Doctor
    | Data
)
Shared = Train | Sample | Nll | Classify  # many processes may share their work
