"""Converts checkpoints of the CDM paper's public code to run directories.

Such a file is a dict with `ema_model_state_dict` and `model_state_dict`, or one of them, or a bare
state_dict, also as safetensors. Its U-Net has the parameter names of `cdm_fast.nn.UNet`, possibly prefixed by
`module.` (data-parallel training) or `_orig_mod.` (torch.compile). The architecture is inferred from the
tensors' shapes. A pickle that would execute code is refused.

# L = T+2 noise levels, D pooled features, K classes
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_fast.config import PRESETS, ImageShape, NetworkConfig, RunConfig, Schedule, ScheduleConfig
from cdm_fast.config.size import ImageSize, plain_size, sides_of, size_text
from cdm_fast.errors import UserError
from cdm_fast.host.reading import shown
from cdm_fast.interop.tensors import read_any
from cdm_fast.runs.build import build_model, build_network
from cdm_fast.runs.checkpoint import Checkpoint, create_run, require_new
from cdm_fast.runs.weights import snapshot

State = Mapping[str, Tensor]

# The public code's settings, for any number of levels (its config/config.yaml).
PUBLIC_BETAS = (1e-4, 0.02)
PUBLIC_SIGMA_MIN = 1e-4  # of its flow matching (its cdm.py)
# Its networks have 1000 noise steps: levels 0..T+1 in `training`, 1000 times in `FM_training` (its main.py).
PUBLIC_OUTPUTS: dict[int, Schedule] = {1002: "linear", 1000: "ot"}
PUBLIC_NAMES: dict[str, Schedule] = {"mode=training_": "linear", "mode=FM_training_": "ot"}

PARTS = {"model": "model_state_dict", "ema": "ema_model_state_dict"}
_PREFIX = re.compile(r"(?:module\.|_orig_mod\.)+")

# The paper's networks have attention at this resolution.
USUAL_ATTENTION_RESOLUTION = 16


@dataclass(frozen=True)
class Converted:
    """The result of `convert`: the run directory, its config, and the assumptions that were made."""

    run: Path
    config: RunConfig
    num_parameters: int
    assumed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values, for `--json`."""
        return {
            "run": str(self.run),
            "num_parameters": self.num_parameters,
            "image_size": plain_size(self.config.image.sides),
            "channels": self.config.image.channels,
            "schedule": self.config.schedule.schedule,
            "T": self.config.schedule.T,
            "beta_start": self.config.schedule.beta_start,
            "beta_end": self.config.schedule.beta_end,
            "sigma_min": self.config.schedule.sigma_min,
            "base_channels": self.config.network.base_channels,
            "multipliers": list(self.config.network.multipliers),
            "attention_resolutions": list(self.config.network.attention_resolutions),
            "num_classes": self.config.image.num_classes,
            "assumed": list(self.assumed),
        }


def convert(
    file: str | Path,
    out: str | Path,
    *,
    schedule: Schedule | None = None,
    betas: tuple[float, float] | None = None,
    image_size: ImageSize | None = None,
) -> Converted:
    """Converts a checkpoint of the paper's public code to the run directory `out`.

    Args:
        file: a file written by torch.save or safetensors.
        out: a directory that does not exist yet.
        schedule: the schedule of its training; "ot" is the flow-matching variant, whose levels have the
            opposite order. By default inferred from the number of outputs or the name of the file.
        betas: first and last beta of "linear"; by default `PUBLIC_BETAS` for any number of levels.
        image_size: the side of a square, or (height, width), in pixels; by default the square for which the
            attention is at 16x16, as in the paper's networks.

    Raises:
        UserError: the file is missing, damaged, would execute code, or holds another network; the schedule or
            the image size is neither known nor given, or does not fit; `out` exists.
    """
    require_new(out)
    weights, notes = read_public(file)
    _require_network(weights, image_size, str(file))
    chosen, reason = choose_schedule(weights["ema"], schedule, file)
    if betas is not None and chosen != "linear":
        raise UserError(
            f"--beta-start and --beta-end go with --schedule linear, not {chosen}; leave them out"
        )
    config, assumed = infer_config(weights["ema"], chosen, image_size, str(file), betas)
    assumed = (reason, *assumed, *notes)
    # build_model draws weights; the caller's generator keeps its state.
    with torch.random.fork_rng(devices=[]):
        model = build_model(config)
    tensors: dict[str, State] = {"optimizer": {}}
    for part, state in weights.items():
        model.network.load_state_dict(_with_levels_from_data(state, chosen))
        tensors[part] = snapshot(model)
    create_run(out, config, Checkpoint(tensors, {"step": 0}))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Converted(Path(out), config, num_parameters, assumed)


def _require_network(weights: Mapping[str, State], image_size: ImageSize | None, file: str) -> None:
    """UserError unless the tensors are those of one network, whatever its schedule."""
    config, _ = infer_config(weights["ema"], "uniform", image_size, file)
    try:
        with torch.device("meta"):  # shapes are checked before memory is allocated
            expected = build_network(config).state_dict()
    except UserError as error:
        raise UserError(f"{file} does not describe a valid network: {error}") from None
    for state in weights.values():
        _require_match(state, expected, file)


def read_public(file: str | Path) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """The `model` and `ema` weights of a public checkpoint, on the CPU, without prefixes; and notes on them.

    A file with only one of them, or a bare state_dict, is used for both.
    Raises UserError that names the file when it is missing, damaged, not plain tensors, or of another format.
    """
    content = read_any(Path(file))
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file} holds {_kind(content)}; convert takes the CDM paper's public format")
    found = {part: key for part, key in PARTS.items() if key in content}
    if found:
        states = {part: _plain_state(content[key], f"{file}: {key}") for part, key in found.items()}
    elif all(isinstance(value, Tensor) for value in content.values()):
        states = {"ema": _plain_state(content, str(file))}
    else:
        names = ", ".join(shown(str(name), 40) for name in list(content)[:6])
        raise UserError(
            f"{file} holds {names}: neither {' nor '.join(PARTS.values())} nor a bare state_dict; convert"
            " takes the CDM paper's public format"
        )
    if len(states) == len(PARTS):
        return states, ()
    (only,) = states.values()
    missing = next(key for part, key in PARTS.items() if part not in states)
    note = f"no {missing}: {found.get('model') or found.get('ema') or 'its state_dict'} stands for both"
    return {part: only for part in PARTS}, (note,)


def _kind(content: Any) -> str:
    return "an empty dict" if isinstance(content, dict) else f"a {type(content).__name__}"


def choose_schedule(state: State, asked: Schedule | None, file: str | Path) -> tuple[Schedule, str]:
    """The schedule and how it was chosen: given, or inferred from the outputs or the name of the file.

    Raises UserError if nothing determines it.
    """
    outputs = _shape(state, "linear_layer.weight", 2, str(file))[0]
    named = next((kind for words, kind in PUBLIC_NAMES.items() if words in Path(file).name), None)
    known = PUBLIC_OUTPUTS.get(outputs) or named
    if asked is not None:
        against = "" if known in (None, asked) else f", though its {outputs} outputs or its name say {known}"
        return asked, f"schedule {asked}{against}"
    if known is None:
        raise UserError(
            f"{file}: {outputs} outputs are {outputs - 2} noise levels of --schedule linear, or {outputs}"
            " times of flow matching, whose levels have the opposite order, --schedule ot, and nothing in the"
            " file tells which; give --schedule"
        )
    why = f"from its {outputs} outputs" if outputs in PUBLIC_OUTPUTS else "from the name of the file"
    return known, f"schedule {known} ({why})"


def infer_config(
    state: State,
    schedule: Schedule,
    image_size: ImageSize | None,
    where: str,
    betas: tuple[float, float] | None = None,
) -> tuple[RunConfig, tuple[str, ...]]:
    """The config inferred from the tensors' shapes, and the assumptions made where shapes do not tell.

    Raises UserError that begins with `where` if a tensor of every such network is missing, or if the image
    size is neither given nor inferable.
    """
    inferred, assumed = _infer_network(state, where), ["256 grey levels at 2u/255 - 1"]
    classes = _shape(state, "label_emb.weight", 2, where)[0] - 1 if "label_emb.weight" in state else None
    attention = _attention(state, where)
    if image_size is None:
        image_size = _usual_image_size(attention, where)
        assumed.append(f"image size {size_text(image_size)}")
    height, width = sides_of(image_size)
    paper = PRESETS["celeba64-paper" if (height, width) == (64, 64) else "cifar10-paper"]
    network = replace(
        inferred,
        attention_resolutions=tuple((height if height > 1 else width) >> i for i in attention),
        dropout=paper.network.dropout,
        conditioning="none" if classes is None else "embedding",
    )
    channels = _shape(state, "conv_in.weight", 4, where)[1]
    image = ImageShape(
        height=height, width=width, channels=channels, num_grey_levels=256, num_classes=classes
    )
    levels, assumed_levels = _infer_schedule(state, schedule, where, betas)
    assumed += assumed_levels
    if classes is not None:
        assumed.append("a null class that the public code never trains: score with --given label or all")
    output = replace(paper.output, sampling_steps=min(paper.output.sampling_steps, levels.T))
    config = replace(paper, image=image, network=network, schedule=levels, output=output)
    return config, tuple(assumed)


def _attention(state: State, where: str) -> list[int]:
    """The resolutions with attention, as numbers of halvings."""
    num_resolutions = _count(state, r"down\.(\d+)\.", where)
    return [i for i in range(num_resolutions) if f"down.{i}.attn.0.q.weight" in state]


def _infer_network(state: State, where: str) -> NetworkConfig:
    """Widths and depth of the U-Net."""
    base_channels = _shape(state, "conv_in.weight", 4, where)[0]
    num_resolutions = _count(state, r"down\.(\d+)\.", where)
    widths = [_shape(state, f"down.{i}.block.0.conv1.weight", 4, where)[0] for i in range(num_resolutions)]
    num_levels = _shape(state, "linear_layer.weight", 2, where)[0]
    if any(width % base_channels for width in widths) or num_levels < 3:
        raise UserError(
            f"{where}: widths {widths} over {base_channels} and {num_levels} levels are not those of a CDM;"
            " convert takes the CDM paper's U-Net only"
        )
    return NetworkConfig(
        base_channels=base_channels,
        multipliers=tuple(width // base_channels for width in widths),
        blocks_per_level=_count(state, r"down\.0\.block\.(\d+)\.", where),
        num_groups=32,
    )


def _infer_schedule(
    state: State, schedule: Schedule, where: str, betas: tuple[float, float] | None
) -> tuple[ScheduleConfig, list[str]]:
    """The noise levels, and the assumptions made about them."""
    T = _shape(state, "linear_layer.weight", 2, where)[0] - 2
    if schedule == "linear":
        start, end = betas or PUBLIC_BETAS
        note = f"beta {start:g} to {end:g}{'' if betas else ', as in the public code at any T'}"
        return ScheduleConfig(schedule=schedule, T=T, beta_start=start, beta_end=end), [note]
    if schedule == "ot":
        return ScheduleConfig(schedule=schedule, T=T, sigma_min=PUBLIC_SIGMA_MIN), [
            f"sigma_min {PUBLIC_SIGMA_MIN:g}"
        ]
    return ScheduleConfig(schedule=schedule, T=T), []


def _usual_image_size(attention: list[int], where: str) -> int:
    """The image size for which the only resolution with attention (0 is the full resolution) is 16x16."""
    if len(attention) != 1:
        raise UserError(
            f"{where}: the network attends at {len(attention)} resolutions, so the size of its images cannot"
            " be guessed; give --image-size"
        )
    return USUAL_ATTENTION_RESOLUTION << attention[0]


def _with_levels_from_data(state: State, schedule: str) -> State:
    """The weights with outputs in this library's order of levels, data first.

    The flow-matching checkpoints count levels from noise to data: with N outputs, logit i is the level at
    time i/(N-1), `x = (i/(N-1)) x_0 + (1 - (1 - sigma_min) i/(N-1)) eps`, which is our `ot` level t = N-1-i
    with T = N-2 and their sigma_min (except at level 0, where theirs keeps noise of 1e-4 and ours none). The
    head cumulates its outputs, f_i = r_0 + ... + r_i, so reversing f needs r'_0 = r_0 + ... + r_{N-1} (the
    former last logit) and r'_t = -r_{N-t}.
    """
    if schedule != "ot":
        return state
    names = [name for name in ("linear_layer.weight", "linear_layer.bias") if name in state]
    return {**state, **{name: _reversed_increments(state[name]) for name in names}}


def _reversed_increments(r: Tensor) -> Tensor:
    """Increments (L, ...) whose cumulative sum is that of `r` in reversed order."""
    total = r.sum(dim=0, keepdim=True, dtype=torch.float64).to(r.dtype)
    return torch.cat([total, -r[1:].flip(0)])


def _plain_state(state: Any, where: str) -> dict[str, Tensor]:
    """A state_dict of finite fp32 tensors under names without `module.`."""
    if not isinstance(state, dict) or not all(_is_plain(name, value) for name, value in state.items()):
        raise UserError(
            f"{where} is not a dict of names and dense tensors; convert takes the CDM paper's public format"
        )
    plain = {
        _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name: value
        for name, value in state.items()
    }
    if len(plain) < len(state):
        raise UserError(f"{where} holds tensors whose names differ only in `module.`; save one network")
    plain = {name: value.detach().float() for name, value in plain.items()}
    for name, value in plain.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"{where}: {name} holds NaN or infinity; the file is damaged or its training diverged"
            )
    return plain


def _is_plain(name: Any, value: Any) -> bool:
    """True for a printable name with a dense real tensor that has memory for each of its numbers."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and len(name) < 200
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _require_match(state: State, expected: State, where: str) -> None:
    """Raises UserError for the first tensor that does not belong to the inferred network."""
    for name in sorted(expected.keys() | state.keys()):
        ours, theirs = (tuple(side[name].shape) if name in side else "absent" for side in (expected, state))
        if ours != theirs:
            raise UserError(
                f"{where}: {name} is {theirs}, and {ours} in the network that its other tensors describe;"
                " convert takes the CDM paper's U-Net only"
            )


def _shape(state: State, name: str, rank: int, where: str) -> torch.Size:
    """The shape of a tensor with `rank` axes, none of them empty."""
    if name not in state or state[name].dim() != rank or state[name].numel() == 0:
        raise UserError(f"{where}: no tensor {name} of {rank} axes; convert takes the CDM paper's U-Net only")
    return state[name].shape


def _count(state: State, pattern: str, where: str) -> int:
    """The number of indices 0, 1, ... in the names that match `pattern`."""
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    if found != set(range(len(found))) or not found:
        raise UserError(
            f"{where}: no complete set of tensors {pattern}; convert takes the CDM paper's U-Net only"
        )
    return len(found)
