"""Run directories: what a training run leaves behind, and reading it back without trusting it.

    RUN/config.json                            the resolved RunConfig
    RUN/checkpoints/step-00001000/
        model.safetensors  ema.safetensors     weights, raw and averaged
        optimizer.safetensors                  one tensor per parameter and moment
        state.json                             step, counters, the settings trained with
        manifest.json                          size and SHA-256 of each file above

There is no pickle anywhere. A directory appears under its name only when it is complete and on the disk: it
is written beside it, flushed, and renamed; it leaves its name in one step, too. Reading takes the newest
checkpoint whose checksums hold.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cdm_fast.build import build_model, build_network
from cdm_fast.calibration import apply_calibration
from cdm_fast.config import RunConfig, check
from cdm_fast.config.json import from_json, parse_json, to_json
from cdm_fast.errors import UserError
from cdm_fast.host.distributed import whole
from cdm_fast.host.files import directory_in_one_step, remove, remove_unfinished, saving, write_atomically
from cdm_fast.host.reading import read_bytes, shown
from cdm_fast.tensor_file import HashedFile, write_tensors

if TYPE_CHECKING:
    from cdm_fast.model import CDM, DDM
    from cdm_fast.model.classifier import Classifier

PARTS = ("model", "ema", "optimizer")
_MAX_JSON_BYTES = 1 << 20  # config, state and manifest are a few kilobytes; more is not ours
_FOLDER = re.compile(r"step-(\d{8,15})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in host memory.

    tensors: per part ("model", "ema", "optimizer"), tensors by name; state: JSON values, among them `step`.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state["step"])


def load(
    run: str | Path, weights: Literal["ema", "raw"] = "ema", calibrated: bool = True
) -> "CDM | DDM | Classifier":
    """The trained model of a run directory, in evaluation mode, on the CPU.

    weights: "ema", the moving average that sampling and scoring should use, or "raw", the optimizer's own.
    calibrated: fold in the calibration of the average, if the run has one (`cdm-fast calibrate`).
    Raises UserError when `run` is no run directory, or holds no intact checkpoint of its architecture.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights is {weights!r}; give 'ema' or 'raw'")
    config = read_config(run)
    part = "ema" if weights == "ema" else "model"
    checkpoint = load_checkpoint(run, parts=(part,))
    require_network(config, checkpoint.tensors[part], str(run))
    model = build_model(config)
    restore_weights(model, checkpoint.tensors[part], str(run))
    if calibrated and weights == "ema":
        apply_calibration(model, run)
    return model.eval()


def read_config(run: str | Path) -> RunConfig:
    """The config of a run directory; UserError when there is none, or it is not one that `save` writes."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"no run directory {run}; give the --out of a training run")
    if not (run / "config.json").is_file():
        raise UserError(
            f"{run} is no run directory (it has no config.json); give the --out of a training run"
        )
    config = from_json(RunConfig, _read_json(run / "config.json"), str(run / "config.json"))
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{run / 'config.json'}: {error}") from None
    return config


def write_config(run: Path, config: RunConfig) -> None:
    """Replaces RUN/config.json in one step."""
    write_json(run / "config.json", to_json(config))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, complete or not at all; UserError if the disk refuses."""
    write_atomically(path, json.dumps(value, indent=2).encode())


def require_new(run: str | Path) -> None:
    """Raises UserError unless `run` can become a run directory: it must not exist, or be empty."""
    run = Path(run)
    if run.is_file() or (run.is_dir() and any(run.iterdir())):
        raise UserError(f"{run} exists already; continue it with --resume {run}, or give another --out")


def create_run(run: str | Path, config: RunConfig, checkpoint: Checkpoint) -> None:
    """Makes a new run directory with its config and first checkpoint, complete or not at all.

    Raises UserError when `run` holds something already, when weights are not finite, or the disk refuses.
    """
    run = Path(run)
    require_new(run)
    with saving(run):
        run.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(run.parent, run.name)
        with directory_in_one_step(run) as unfinished:
            write_config(unfinished, config)
            save_checkpoint(unfinished, checkpoint, keep=1)


def save_checkpoint(
    run: Path, checkpoint: Checkpoint, keep: int, proceed: Callable[[], None] = lambda: None
) -> Path:
    """Writes RUN/checkpoints/step-N and removes all but the newest `keep`; returns its path.

    proceed: called every few megabytes; may raise to give the save up.
    Raises UserError, with everything saved earlier intact, when a value is not finite; DiskError when the
    disk refuses.
    """
    folder = run / "checkpoints"
    target = folder / f"step-{checkpoint.step:08d}"
    with saving(run):
        folder.mkdir(exist_ok=True)
        remove_unfinished(folder)
        with directory_in_one_step(target) as unfinished:
            _write_parts(unfinished, checkpoint, run, proceed)
    for old in checkpoint_folders(run)[keep:]:
        if old != target:
            remove(old)
    return target


def load_checkpoint(run: str | Path, parts: Sequence[str] = PARTS, at_most: int | None = None) -> Checkpoint:
    """The newest intact checkpoint of a run; a damaged one is named in a warning and the one before it tried.

    at_most: pass over checkpoints of later steps. Raises UserError when none is left.
    """
    tried: set[Path] = set()
    while left := [
        folder
        for folder in checkpoint_folders(Path(run))
        if folder not in tried and (at_most is None or _step_of(folder) <= at_most)
    ]:
        folder = left[0]
        tried.add(folder)
        try:
            return _read_parts(folder, parts)
        except (OSError, ValueError, SafetensorError) as error:
            if folder.exists():  # else a training run has replaced it meanwhile by a newer one
                warnings.warn(
                    f"checkpoint {folder} is damaged ({shown(str(error), 300)}); trying the one before",
                    stacklevel=2,
                )
    if at_most is not None:
        raise UserError(
            f"{run} holds no intact checkpoint of step {at_most} or before; give a later step"
            " (--keep sets how many checkpoints a run keeps)"
        )
    what = "no intact checkpoint" if tried else "no checkpoint"
    raise UserError(f"{run} holds {what}; restore its checkpoints folder, or train again into another --out")


def checkpoint_folders(run: Path) -> list[Path]:
    """The complete checkpoint folders of a run, newest first."""
    found = [(_FOLDER.fullmatch(path.name), path) for path in (run / "checkpoints").glob("step-*")]
    steps = {path: int(match[1]) for match, path in found if match}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def make_ready(run: Path, step: int) -> None:
    """Tidies a run that is about to continue from its checkpoint of `step`.

    Removes what killed processes left half-written, and renames damaged newer checkpoints to damaged-N, where
    they are neither taken for the newest nor counted among those kept. Raises DiskError.
    """
    with saving(run):
        remove_unfinished(run)
        remove_unfinished(run / "checkpoints")
        for folder in checkpoint_folders(run):
            if _step_of(folder) > step:
                aside = folder.with_name(folder.name.replace("step", "damaged"))
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's weights and buffers in host memory; training may go on while it is written."""
    return {name: _host_copy(tensor) for name, tensor in module.state_dict().items()}


def snapshot_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """A copy of the optimizer's state in host memory, as `PARAMETER.MOMENT` -> tensor."""
    return {
        f"{name}.{moment}": _host_copy(value)
        for name, parameter in module.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def require_network(config: RunConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """UserError unless `tensors` hold the network of `config`: to be asked before memory is taken for it."""
    try:
        with torch.device("meta"):
            network = build_network(config)
    except UserError as error:
        raise UserError(f"{where}/config.json: {error}") from None
    _require_shapes(
        {f"network.{name}": value for name, value in network.state_dict().items()}, tensors, where
    )


def _require_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    for name, ours in sorted(expected.items()):
        theirs = tensors.get(name)
        if theirs is None or ours.shape != theirs.shape:
            raise UserError(
                f"{where}: weights of another architecture: {name} is {_shape(theirs)} in the file and"
                f" {_shape(ours)} in the network of config.json; restore the config.json that belongs to them"
            )


def restore_weights(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Loads `tensors` into the module; UserError naming the first that does not fit its architecture."""
    expected = module.state_dict()
    _require_shapes(expected, tensors, where)
    for name, value in tensors.items():
        if name not in expected:
            raise UserError(
                f"{where}: weights of another architecture: {shown(name, 100)} is not in the network of"
                " config.json; restore the config.json that belongs to them"
            )
        _require_numbers(name, value, where)
    module.load_state_dict(dict(tensors))


def restore_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Loads what `snapshot_optimizer` took; UserError when it belongs to another network or optimizer."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        by_parameter.setdefault(name, {})[moment] = tensor
    parameters = dict(module.named_parameters())
    for name, moments in by_parameter.items():
        shapes = {key: value.shape for key, value in moments.items()}
        whole = parameters[name].shape if name in parameters else None
        if shapes != {"step": torch.Size(), "exp_avg": whole, "exp_avg_sq": whole}:
            raise UserError(
                f"{where}: optimizer state of another network ({shown(name, 100)});"
                " restore the folder or train anew"
            )
        for moment, value in moments.items():
            _require_numbers(f"{name}.{moment}", value, where)
    state = {
        i: {moment: _like_parameter(value, parameters[name]) for moment, value in by_parameter[name].items()}
        for i, name in enumerate(parameters)
        if name in by_parameter
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _require_numbers(name: str, value: Tensor, where: str) -> None:
    """UserError unless a tensor holds finite floating-point numbers."""
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"{where}: {name} holds {value.dtype}, not floating-point numbers; restore the file")
    if not torch.isfinite(value).all():
        raise UserError(f"{where}: {name} holds NaN or infinity; restore the file, or an older checkpoint")


def _like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment in its parameter's memory layout: fused optimizers walk both in memory order."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy in the memory layout of the original: the quickest, and training waits for it."""
    return whole(tensor.detach()).to("cpu", copy=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "a scalar"


def _write_parts(folder: Path, checkpoint: Checkpoint, run: Path, proceed: Callable[[], None]) -> None:
    """The files of one checkpoint, each flushed to the disk, the manifest last."""
    manifest = {}

    def write(name: str, fill: Callable[[HashedFile], None]) -> None:
        with HashedFile(folder / name, proceed) as file:
            fill(file)
        manifest[name] = {"bytes": file.bytes, "sha256": file.sha256}

    for part in PARTS:
        tensors = checkpoint.tensors[part]
        try:
            write(f"{part}.safetensors", partial(write_tensors, tensors=tensors))
        except ValueError as error:
            raise UserError(
                f"{run}: {part}: {error} at step {checkpoint.step}, so nothing was saved;"
                " train into another --out with a lower --lr"
            ) from error
    for name, value in (("state.json", dict(checkpoint.state)), ("manifest.json", manifest)):
        text = json.dumps(value, indent=2).encode()
        write(name, partial(HashedFile.write, data=text))


def _read_parts(folder: Path, parts: Sequence[str]) -> Checkpoint:
    """Reads and verifies the named parts; ValueError, OSError or SafetensorError says what is wrong."""
    manifest = _read_json(folder / "manifest.json")
    state = parse_json(_read_verified(folder / "state.json", manifest))
    if not isinstance(state, dict) or type(state.get("step")) is not int or not 0 <= state["step"] < 2**53:
        raise ValueError("state.json names no step")
    if state["step"] != _step_of(folder):
        raise ValueError(f"it holds step {state['step']}")
    tensors = {
        part: safetensors.torch.load(_read_verified(folder / f"{part}.safetensors", manifest))
        for part in parts
    }
    return Checkpoint(tensors, state)


def _read_verified(path: Path, manifest: Any) -> bytes:
    """The bytes of a file, if they are those that the manifest promises."""
    entry = manifest.get(path.name) if isinstance(manifest, dict) else None
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
        raise ValueError(f"manifest.json does not list {path.name}")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not those that manifest.json lists")
    data = read_bytes(path, path.stat().st_size, path.parent)
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} does not match its checksum")
    return data


def _read_json(path: Path) -> Any:
    """The JSON value in a small file; UserError when it is none."""
    content = read_bytes(path, _MAX_JSON_BYTES, path.parent)
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from None
