"""The arguments of each command, as frozen dataclasses: their docstrings are its help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional

from cdm_fast.config import Compile, Preset, RunConfig, Sampler

Json = Annotated[bool, FlagCreatePairsOff]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Train:
    """Train a model, or continue a run.

    Ctrl-C saves and stops; a second one leaves at once.
    """

    preset: Preset = "digits"
    """Where the defaults of everything below come from."""
    out: Path | None = None
    """Run directory to make; by default runs/PRESET."""
    resume: Path | None = None
    """Continue this run directory instead, exactly where it stopped."""
    max_time: float | None = None
    """Stop after this many seconds, with everything saved."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the summary as one JSON object on stdout."""
    config: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained model."""

    run: Positional[Path]
    """Run directory."""
    num: int = 64
    """Images to draw."""
    sampler: Sampler = "ddim"
    """Sampling algorithm."""
    steps: int = 50
    """Steps of the sampler, at most T."""
    seed: int = 0
    """The same seed gives the same images."""
    eta: float = 0.0
    """Noise added back by ddim: 0 none, 1 as much as ddpm."""
    label: int | None = None
    """Class to draw; by default all in turn. Only for class-conditional runs."""
    guidance: float = 0.0
    """How much to overstate the class: w in (1+w) eps(x, class) - w eps(x). Class-conditional runs only."""
    out: Path | None = None
    """A .png sheet, or an .npz of uint8 images (N,H,W,C); by default RUN/samples-SAMPLER-STEPS-SEED.png."""
    compile: Compile = "auto"
    """torch.compile of the network: auto is `default` on a GPU and off on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Nll:
    """Bits per dimension of images under a trained model, from one forward pass each (unaudited)."""

    run: Positional[Path]
    """Run directory."""
    data: str | None = None
    """Data source; by default the run's own."""
    split: Split = "test"
    """Which part of the data."""
    level: int = 0
    """Noise level at which to score; 0 is the data itself."""
    draws: int = 3
    """Dequantisation draws; their spread is printed."""
    protocol: Literal["dequantized", "paper"] = "dequantized"
    """`paper` scores pixels without dequantisation, as the paper's code does: lower, and not comparable."""
    batch_size: int = 500
    """Images per forward pass."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Denoise:
    """Denoise image files of unknown noise: estimates its sigma, and removes it."""

    run: Positional[Path]
    """Run directory."""
    images: Positional[tuple[Path, ...]]
    """Image files of the run's size."""
    out: Path | None = None
    """Folder for the results; by default RUN/denoised."""
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
    schedule: Literal["linear", "uniform", "ot", "cosine"] = "linear"
    """Noise schedule it was trained with; the file does not tell."""
    image_size: int | None = None
    """Image size in pixels; by default the one at which the network attends at 16x16."""
    json: Json = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Doctor:
    """Tell versions, devices, the backend of every op and why, and what is missing."""

    json: Json = False
    """Print the findings as one JSON object on stdout."""


Command = Train | Sample | Nll | Denoise | Plot | Convert | Doctor
