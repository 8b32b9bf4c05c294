"""Hostile run directories: config, manifest, state and safetensors files, with checksums made right again."""

import copy
import hashlib
import json
import struct
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from cdm_fast.config import RunConfig
from cdm_fast.config.json import fixed_part, from_json
from cdm_fast.errors import UserError
from cdm_fast.runs.checkpoint import create_run
from cdm_fast.training.state import new_state, to_checkpoint
from tests.fuzz.case import Case, unusual_files
from tests.fuzz.mutate import NUMBERS, chance, damage, number, pick
from tests.tiny_run import tiny_config

_VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(10**400, -(10**400), 0.5, -1.0, 1e308, float("nan"), float("inf"), float("-inf"), 1e-320),
    *(None, True, False, "", "x", "none", "joint", "\x1b[31m", "\ud800", "a\nb", "x" * 10_000),
    *([], [1], [0], [-1], [[1]], [1] * 12, [2] * 300, [10**9] * 3, [None], {}, {"a": 1}),
)
_DTYPES = "F32 F64 F16 BF16 I64 I32 I8 U8 BOOL C64 F8_E4M3 F4 X".split()


@cache
def sample_run() -> dict[str, bytes]:
    """The files of a small run with optimizer state, by relative name."""
    config = tiny_config(Path("images.npz"))
    config = replace(config, network=replace(config.network, base_channels=4, num_groups=2))
    torch.manual_seed(0)
    state = new_state(config, torch.device("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.step = 1
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        create_run(run, config, to_checkpoint(state, config))
        return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def run_directory(rng: Random) -> Case:
    """A run directory of which one to three files are hostile; mostly its checksums hold nevertheless."""
    files: dict[str, bytes] = dict(sample_run())
    for name in rng.sample(sorted(files), rng.choice((1, 1, 1, 2, 3))):
        if chance(rng, 0.2):
            files[name] = damage(rng, files[name])
        elif name.endswith(".json"):
            files[name] = _hostile_json(rng, files[name])
        else:
            files[name] = _hostile_tensors(rng, files[name])
    if chance(rng, 0.9):
        make_right(files)
    if chance(rng, 0.2):
        older = {
            name.replace("step-00000001", rng.choice(("step-00000000", "step-x", "step-2"))) for name in files
        }
        files.update({name: rng.choice(list(files.values())) for name in sorted(older - files.keys())})
    case = Case({f"run/{name}": content for name, content in files.items()})
    case.options = {"resume": chance(rng, 0.15)}
    if chance(rng, 0.1):
        unusual_files(rng, case)
    return case


def make_right(files: dict[str, bytes]) -> None:
    """Gives the state what it must share with the config, and the manifest the checksums of the files."""
    folder = next(name for name in files if name.endswith("state.json")).removesuffix("state.json")
    try:
        state = json.loads(files[f"{folder}state.json"])
        state["config"] = fixed_part(from_json(RunConfig, json.loads(files["config.json"])))
        files[f"{folder}state.json"] = json.dumps(state).encode()
    except (UserError, ValueError, TypeError, RecursionError, OverflowError, AttributeError):
        pass
    try:
        manifest = json.loads(files[f"{folder}manifest.json"])
        for name in manifest:
            content = files[folder + name]
            manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files[f"{folder}manifest.json"] = json.dumps(manifest).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        pass


def _hostile_json(rng: Random, content: bytes) -> bytes:
    """Some values, keys or the nesting of a JSON file changed."""
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice(
            (
                b"[" * 10**5,
                b'{"a":' * 10**5,
                b"[" * 900 + b"]" * 900,
                b"9" * 5000,
                b'"\\ud800"',
                b"NaN",
                b"{}",
            )
        )
    if kind == 1:  # one key twice
        body = content.rstrip().rstrip(b"}")
        return (
            body + b"," + rng.choice((b'"step": 5', b'"data": {}', b'"train": null', b'"step": NaN')) + b"}"
        )
    tree = json.loads(content)
    for _ in range(rng.randrange(1, 3)):
        _replace_one(rng, tree)
    return json.dumps(tree).encode()


def _replace_one(rng: Random, tree: Any) -> None:
    """Changes one value somewhere in nested dicts and lists, or removes or adds a key."""
    while True:
        keys = sorted(tree) if isinstance(tree, dict) else range(len(tree))
        if not keys:
            return
        key = rng.choice(list(keys))
        if isinstance(tree[key], dict | list) and tree[key] and chance(rng, 0.9):
            tree = tree[key]
            continue
        if isinstance(tree, dict) and chance(rng, 0.1):
            tree[rng.choice(("more", "", "\n"))] = tree.pop(key)
        elif isinstance(tree[key], int) and not isinstance(tree[key], bool) and chance(rng, 0.6):
            tree[key] = number(rng, tree[key], 0.9)
        else:
            tree[key] = copy.deepcopy(rng.choice(_VALUES))
        return


def _hostile_tensors(rng: Random, content: bytes) -> bytes:
    """A safetensors file whose header or numbers are changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    kind = rng.randrange(8)
    if kind == 0:  # numbers
        value = rng.choice((float("nan"), float("inf"), 1e38, -1e38, 1e-45, 0.0))
        body[begin:end] = struct.pack("<f", value) * ((end - begin) // 4)
    elif kind == 1:
        entry["shape"] = pick(
            rng,
            [number(rng, axis, 0.5) for axis in entry["shape"]],
            ([], [0], [-1], [2**62, 4], [1] * 99),
            0.3,
        )
    elif kind == 2:
        entry["dtype"] = rng.choice(_DTYPES)
    elif kind == 3:  # another type, with the right size
        size = rng.choice(
            (("F64", 8), ("F16", 2), ("I64", 8), ("U8", 1), ("C64", 8), ("BOOL", 1), ("F8_E4M3", 1))
        )
        entry["dtype"], entry["shape"] = size[0], [(end - begin) // size[1]]
    elif kind == 4:
        entry["data_offsets"] = [number(rng, offset, 0.7) for offset in (begin, end)]
    elif kind == 5:
        header[rng.choice(("extra", "__metadata__", "", "\n", "x" * 10_000, name + ".exp_avg"))] = header.pop(
            name
        )
    elif kind == 6:
        del header[name]
    else:
        _replace_one(rng, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", number(rng, len(text), 0.05) % 2**64) + text + bytes(body)
