"""Run directories: what a training run leaves behind, and reading it back without trusting it.

    RUN/config.json                            the resolved RunConfig
    RUN/checkpoints/step-00001000/
        model.safetensors  ema.safetensors     weights, raw and averaged
        optimizer.safetensors                  one tensor per parameter and moment
        state.json                             step, counters, digest of the config
        manifest.json                          size and SHA-256 of each file above

There is no pickle anywhere. A directory appears under its name only when it is complete and on the disk: it
is written beside it, flushed, and renamed. Reading takes the newest checkpoint whose checksums hold.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cdm_fast.build import build_model
from cdm_fast.config import RunConfig, check
from cdm_fast.config_json import from_json, to_json
from cdm_fast.errors import UserError
from cdm_fast.files import write_atomically

if TYPE_CHECKING:
    from cdm_fast.model import CDM, DDM

PARTS = ("model", "ema", "optimizer")
_MAX_JSON_BYTES = 1 << 20  # config, state and manifest are a few kilobytes; more is not ours


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


def load(run: str | Path, weights: Literal["ema", "raw"] = "ema") -> "CDM | DDM":
    """The trained model of a run directory, in evaluation mode, on the CPU.

    weights: "ema", the moving average that sampling and scoring should use, or "raw", the optimizer's own.
    Raises UserError when `run` is no run directory, or holds no intact checkpoint of its architecture.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights is {weights!r}; give 'ema' or 'raw'")
    config = read_config(run)
    part = "ema" if weights == "ema" else "model"
    checkpoint = load_checkpoint(run, parts=(part,))
    model = build_model(config)
    restore_weights(model, checkpoint.tensors[part], str(run))
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
    check(config)
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
        with _directory_in_one_step(run) as unfinished:
            write_config(unfinished, config)
            save_checkpoint(unfinished, checkpoint, keep=1)


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes RUN/checkpoints/step-N and removes all but the newest `keep`; returns its path.

    Raises UserError, with everything saved earlier intact, when a weight is not finite or the disk refuses.
    """
    for part in ("model", "ema"):
        for name, tensor in checkpoint.tensors[part].items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{run}: weight {name} is not finite at step {checkpoint.step}, so nothing was saved;"
                    " continue from the checkpoint before with a lower --lr"
                )
    folder = run / "checkpoints"
    target = folder / f"step-{checkpoint.step:08d}"
    with saving(run):
        folder.mkdir(exist_ok=True)
        for abandoned in folder.glob(".*.unfinished-*"):  # by a process that was killed
            shutil.rmtree(abandoned)
        with _directory_in_one_step(target) as unfinished:
            _write_parts(unfinished, checkpoint)
        for old in checkpoint_folders(run)[keep:]:
            shutil.rmtree(old)
    return target


def load_checkpoint(run: str | Path, parts: Sequence[str] = PARTS) -> Checkpoint:
    """The newest intact checkpoint of a run; a damaged one is named in a warning and the one before it tried.

    Raises UserError when none is left.
    """
    folders = checkpoint_folders(Path(run))
    for folder in folders:
        try:
            return _read_parts(folder, parts)
        except (OSError, ValueError, SafetensorError) as error:
            warnings.warn(f"checkpoint {folder} is damaged ({error}); trying the one before", stacklevel=2)
    what = "no intact checkpoint" if folders else "no checkpoint"
    raise UserError(f"{run} holds {what}; restore its checkpoints folder, or train again into another --out")


def checkpoint_folders(run: Path) -> list[Path]:
    """The complete checkpoint folders of a run, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


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


def restore_weights(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Loads `tensors` into the module; UserError naming the first that does not fit its architecture."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        ours, theirs = expected.get(name), tensors.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise UserError(
                f"{where}: weights of another architecture: {name} is {_shape(theirs)} in the file and"
                f" {_shape(ours)} in the network of config.json; restore the config.json that belongs to them"
            )
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
    if not by_parameter.keys() <= parameters.keys():
        odd = sorted(by_parameter.keys() - parameters.keys())[0]
        raise UserError(
            f"{where}: optimizer state of another network ({odd}); restore the folder or train anew"
        )
    state = {
        i: {moment: _like_parameter(value, parameters[name]) for moment, value in by_parameter[name].items()}
        for i, name in enumerate(parameters)
        if name in by_parameter
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment in its parameter's memory layout: fused optimizers walk both in memory order."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "a scalar"


def _write_parts(folder: Path, checkpoint: Checkpoint) -> None:
    """The files of one checkpoint, each flushed to the disk, the manifest last."""
    manifest = {}

    def write(name: str, data: bytes) -> None:
        _write_flushed(folder / name, data)
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for part in PARTS:  # one at a time: serialised, each is as large as what it holds
        write(f"{part}.safetensors", safetensors.torch.save(dict(checkpoint.tensors[part])))
    write("state.json", json.dumps(dict(checkpoint.state), indent=2).encode())
    _write_flushed(folder / "manifest.json", json.dumps(manifest, indent=2).encode())


def _read_parts(folder: Path, parts: Sequence[str]) -> Checkpoint:
    """Reads and verifies the named parts; ValueError, OSError or SafetensorError says what is wrong."""
    manifest = _read_json(folder / "manifest.json")
    state = json.loads(_read_verified(folder / "state.json", manifest))
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError("state.json names no step")
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
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} does not match its checksum")
    return data


def _read_json(path: Path) -> Any:
    """The JSON value in a small file; UserError when it is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than any file of its kind; restore it")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from error


@contextlib.contextmanager
def saving(run: Path) -> Iterator[None]:
    """Turns what the disk refuses (no space, no permission) into a UserError that says nothing is lost."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {run}: {error.strerror}; make room or give another --out"
            " (what was saved before is intact)"
        ) from error


@contextlib.contextmanager
def _directory_in_one_step(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `target` when the block ends, or vanishes when it fails."""
    unfinished = target.parent / f".{target.name}.unfinished-{os.getpid()}"
    unfinished.mkdir()
    try:
        yield unfinished
        _flush_directory(unfinished)
        if target.is_dir() and any(target.iterdir()):  # a damaged checkpoint of the same step
            shutil.rmtree(target)
        os.replace(unfinished, target)
        _flush_directory(target.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_flushed(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
