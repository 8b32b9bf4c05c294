"""Models of Hugging Face diffusers as denoisers: a network with its scheduler, or a folder with both.

Most schedulers number T noisy levels from 0 and preserve variance: their timestep i is level i + 1 here, and
there are only discrete timesteps. FlowMatch..., EDM... and ScoreSdeVe schedulers have a path in continuous
time.

# K classes
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cdm_fast.config.json import parse_json
from cdm_fast.errors import UserError
from cdm_fast.host import hub
from cdm_fast.host.reading import bad, error_text, read_bytes, shown
from cdm_fast.interop.denoisers import Foreign, LevelDenoiser, PathDenoiser, Predicts
from cdm_fast.interop.paths import sigma_path, straight_path, ve_path
from cdm_fast.interop.tensors import read_tensors
from cdm_fast.model.schedule import NoiseSchedule

Conditions = Callable[[Tensor | None], dict[str, Any]]  # label (B,) or None -> keyword arguments

_PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_NETWORKS = ("UNet2DModel", "DiTTransformer2DModel")  # supported in folders
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FILES = ("*.json", *(f"*{name}" for name in _WEIGHTS))  # what of a repository is fetched
MAX_JSON_BYTES = 2**20


def from_diffusers(
    network: nn.Module,
    scheduler: Any,
    *,
    conditions: Conditions | None = None,
    num_classes: int | None = None,
    null_label: int | None = None,
    levels: int = 1000,
) -> Foreign:
    """A diffusers network as a denoiser, on the noise levels that its scheduler describes.

    Only the training noise of the scheduler is used, not its timesteps or solver. The channels of a learned
    variance are ignored.

    Args:
        network: `UNet2DModel`, `DiTTransformer2DModel`, `UNet2DConditionModel` or one with their interface.
        scheduler: the scheduler with which the network was trained.
        conditions: maps a label (B,), or None, to further keyword arguments of the network, such as
            `encoder_hidden_states` of a conditional U-Net; by default `class_labels`, if it has classes.
        num_classes, null_label: K, and the label that stands for no class. By default those of a DiT; for a
            `UNet2DModel` all its classes, without a null class.
        levels: T of the grid, if the scheduler has a continuous path.

    Raises:
        UserError: an unknown scheduler or kind of prediction.

    Example, with stand-ins for `diffusers.UNet2DModel` and `diffusers.DDPMScheduler`:
        >>> from types import SimpleNamespace
        >>> class Half(nn.Module):  # predicts half of its input as the noise
        ...     def forward(self, y, timestep):
        ...         return SimpleNamespace(sample=y / 2)
        >>> class DDPM:
        ...     config = {"prediction_type": "epsilon"}
        ...     alphas_cumprod = torch.linspace(0.99, 0.01, 10)
        >>> model = from_diffusers(Half(), DDPM())
        >>> model.schedule.T, model.denoise(torch.ones(1, 1, 2, 2), 5).flatten().tolist()
        (10, [0.5, 0.5, 0.5, 0.5])
    """
    settings, kind = scheduler.config, type(scheduler).__name__
    options = _options(network, kind, conditions, num_classes, null_label)
    if kind.startswith("FlowMatch"):
        return _flow_matching(network, settings, levels, options)
    if kind == "ScoreSdeVeScheduler":
        return _variance_exploding(network, settings, levels, options)
    predicts = settings.get("prediction_type", "epsilon")
    if predicts not in _PREDICTS:
        raise UserError(f"{kind} predicts {predicts!r}: known are {', '.join(_PREDICTS)}")
    if kind.startswith("EDM"):
        return _edm(network, settings, predicts, levels, options)
    schedule, timesteps = _levels(scheduler, kind)
    options["call"] = partial(_call_at_levels, options["call"])
    return LevelDenoiser(network, schedule, _PREDICTS[predicts], conditions=timesteps, **options)


def _options(
    network: nn.Module,
    scheduler_kind: str,
    conditions: Conditions | None,
    num_classes: int | None,
    null_label: int | None,
) -> dict[str, Any]:
    """The arguments that all denoisers of a network share."""
    own = getattr(network, "config", {})
    if num_classes is None:
        num_classes = own.get("num_embeds_ada_norm") or own.get("num_class_embeds")
        null_label = own.get("num_embeds_ada_norm") if null_label is None else null_label
    return {
        "call": partial(_call, conditions),
        "num_classes": num_classes,
        "null_label": null_label,
        "input_shape": _input_shape(own),
        "description": f"{type(network).__name__} under {scheduler_kind}",
    }


def _flow_matching(network: nn.Module, settings: Any, levels: int, options: dict[str, Any]) -> PathDenoiser:
    """A velocity, whose time runs from 0 at the data to `num_train_timesteps` at noise."""
    steps = int(settings.get("num_train_timesteps", 1000))
    path = straight_path(data_first=True)
    return PathDenoiser(
        network, path, "velocity", condition=lambda time: steps * time, levels=levels, **options
    )


def _variance_exploding(
    network: nn.Module, settings: Any, levels: int, options: dict[str, Any]
) -> PathDenoiser:
    """A score, conditioned on sigma."""
    path = ve_path(settings["sigma_min"], settings["sigma_max"], settings["sampling_eps"])
    sigma = partial(_beta, path.amplitudes)
    return PathDenoiser(network, path, "score", condition=sigma, levels=levels, **options)


def _edm(
    network: nn.Module, settings: Any, predicts: str, levels: int, options: dict[str, Any]
) -> PathDenoiser:
    """The bare network of EDM: diffusers keeps the preconditioning in the scheduler."""
    call = partial(_call_edm, options["call"], settings["sigma_data"], predicts)
    path = sigma_path(settings["sigma_min"], settings["sigma_max"])
    return PathDenoiser(network, path, "x0", condition=torch.exp, levels=levels, **{**options, "call": call})


def _levels(scheduler: Any, kind: str) -> tuple[NoiseSchedule, Tensor]:
    """The schedule of `alphas_cumprod`, and the timestep of each level, excluding pure noise."""
    power = getattr(scheduler, "alphas_cumprod", None)
    if power is None:
        raise UserError(
            f"{kind} has no alphas_cumprod: known are the variance-preserving schedulers (DDPM, DDIM, DPM,"
            " Euler, ...), FlowMatch..., EDM... and ScoreSdeVe"
        )
    power = torch.as_tensor(power).double()
    if scheduler.config.get("rescale_betas_zero_snr"):
        power = power[:-1]  # the last is pure noise, which is level T+1 here
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    schedule = NoiseSchedule(
        kind, torch.cat([one, power.sqrt(), zero]), torch.cat([zero, (1 - power).sqrt(), one])
    )
    return schedule, torch.arange(len(power))


def _call(
    conditions: Conditions | None, network: Any, y: Tensor, timestep: Tensor, label: Tensor | None
) -> Tensor:
    given = {} if label is None else {"class_labels": label}
    return network(y, timestep, **(given if conditions is None else conditions(label))).sample


def _call_at_levels(
    call: Callable[..., Tensor], network: Any, y: Tensor, timestep: Tensor, label: Tensor | None
) -> Tensor:
    """`_call` with integer timesteps, which a learned time embedding needs."""
    return call(network, y, timestep.round().long(), label)


def _call_edm(
    call: Callable[..., Tensor],
    sigma_data: float,
    predicts: str,
    network: Any,
    y: Tensor,
    sigma: Tensor,
    label: Tensor | None,
) -> Tensor:
    """The denoised image from a bare network, by EDM's preconditioning (arXiv 2206.00364, eq. 7)."""
    column = sigma.to(y).view(-1, *[1] * (y.dim() - 1))
    total = column**2 + sigma_data**2
    out = call(network, y * total.rsqrt(), 0.25 * sigma.log(), label)
    sign = -1 if predicts == "v_prediction" else 1
    return sigma_data**2 / total * y + sign * column * sigma_data * total.rsqrt() * out[:, : y.shape[1]]


def _beta(amplitudes: Callable[[Tensor], tuple[Tensor, Tensor]], time: Tensor) -> Tensor:
    return amplitudes(time)[1]


def _input_shape(own: Any) -> tuple[int, ...] | None:
    size, channels = own.get("sample_size"), own.get("in_channels")
    if size is None or channels is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


class Folder(NamedTuple):
    """The parts of a saved pipeline or model."""

    network: Path
    scheduler: Path


def load_diffusers(folder: str | Path) -> Foreign:
    """The denoiser in a folder that diffusers' `save_pretrained` wrote, in evaluation mode, on the CPU.

    folder: a pipeline (with `unet/` or `transformer/`, and `scheduler/`), or a network with
    `scheduler_config.json` beside its `config.json`. Nothing is downloaded, and no code in it is run: weights
    are read as plain tensors.
    Raises UserError for another folder, an unsupported network (including one for latents, in a pipeline with
    `vae/`), and weights that do not fit the network.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError(
            "models of diffusers need the package diffusers; pip install 'cdm_fast[diffusers]'"
        ) from None
    parts = _parts(Path(folder))
    settings = _read_json(parts.network / "config.json")
    name = settings.get("_class_name")
    if name not in _NETWORKS:
        raise bad(parts.network, f"holds a {shown(str(name), 60)}; known are {' and '.join(_NETWORKS)}")
    scheduler_settings = _read_json(parts.scheduler / "scheduler_config.json")
    scheduler_kind = _scheduler_kind(diffusers, scheduler_settings, parts.scheduler)
    try:
        network = getattr(diffusers, name).from_config(settings)
        scheduler = scheduler_kind.from_config(scheduler_settings)
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise bad(folder, f"describes no model that diffusers can build ({error_text(error)})") from None
    _load_weights(network, parts.network)
    return from_diffusers(network, scheduler).eval()


def fetch(repo: str) -> Path:
    """The folder of a model of the Hugging Face hub, downloaded once and cached by `huggingface_hub`.

    repo: "OWNER/NAME" or "OWNER/NAME@REVISION". Raises UserError if the package is missing or the model
    cannot be downloaded.
    """
    return hub.fetch(hub.parse_hub_name(repo), FILES)


def _parts(folder: Path) -> Folder:
    if not folder.is_dir():
        raise bad(folder, "no such folder; give one that save_pretrained of diffusers wrote")
    if (folder / "vae").is_dir():
        raise bad(folder, "is a pipeline of latents, which has no density of images; give one of pixels")
    if (folder / "config.json").is_file():
        beside = folder if (folder / "scheduler_config.json").is_file() else folder.parent / "scheduler"
        found = Folder(folder, beside)
    else:
        inside = next((folder / name for name in ("unet", "transformer") if (folder / name).is_dir()), None)
        if inside is None:
            raise bad(folder, "holds neither config.json nor unet/ or transformer/; give a diffusers folder")
        found = Folder(inside, folder / "scheduler")
    if not (found.scheduler / "scheduler_config.json").is_file():
        raise bad(
            folder,
            "holds no scheduler_config.json, which defines the noise levels of its training; save the"
            " scheduler beside it",
        )
    return found


def _scheduler_kind(diffusers: Any, settings: dict[str, Any], where: Path) -> Any:
    name = str(settings.get("_class_name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise bad(where, f"names the scheduler {shown(name, 60)}, which diffusers does not have")
    return kind


def _load_weights(network: nn.Module, folder: Path) -> None:
    """Loads a state_dict strictly; UserError for a missing, unexpected or misshapen tensor."""
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise bad(folder, f"holds no {' or '.join(_WEIGHTS)}; save the network in one file")
    tensors = read_tensors(file)
    expected = network.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        ours, theirs = (tuple(side[name].shape) if name in side else "absent" for side in (expected, tensors))
        if ours != theirs:
            raise bad(file, f"{shown(name, 100)} is {theirs}, and {ours} in the network of its config.json")
    network.load_state_dict(tensors)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_bytes(path, MAX_JSON_BYTES))
    except (ValueError, json.JSONDecodeError) as error:
        raise bad(path, f"cannot be read ({error}); restore it") from None
    if not isinstance(found, dict):
        raise bad(path, "is not a JSON object; restore it")
    return found
