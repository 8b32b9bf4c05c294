"""Hostile checkpoints in the paper's public format: zip files of a pickle and of tensors' bytes."""

import io
import pickle
import warnings
import zipfile
from functools import cache
from random import Random
from typing import Any

import safetensors.torch
import torch

from cdm_fast.nn import UNet
from tests.fuzz.arrays import Payload
from tests.fuzz.case import Case, unusual_files
from tests.fuzz.containers import Entry, zip_file
from tests.fuzz.mutate import chance, damage, number

_GLOBALS = (
    *(
        b"os system",
        b"posix system",
        b"builtins exec",
        b"builtins eval",
        b"builtins bytearray",
        b"builtins set",
    ),
    *(
        b"collections OrderedDict",
        b"collections Counter",
        b"torch.nn.parameter Parameter",
        b"torch Tensor",
        b"torch Size",
    ),
    *(
        b"torch._utils _rebuild_tensor",
        b"torch._utils _rebuild_tensor_v2",
        b"torch._utils _rebuild_sparse_tensor",
    ),
    *(
        b"torch._utils _rebuild_meta_tensor_no_storage",
        b"torch._utils _rebuild_qtensor",
        b"torch._utils _rebuild_parameter",
    ),
    *(
        b"torch._utils _rebuild_nested_tensor",
        b"torch._tensor _rebuild_from_type_v2",
        b"torch DoubleStorage",
        b"torch CharStorage",
    ),
    *(
        b"torch ComplexFloatStorage",
        b"torch float32",
        b"torch device",
        b"_codecs encode",
        b"torch.serialization _get_layout",
    ),
)
_PROGRAMS = (
    b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R.",  # four billion zero bytes
    b"\x80\x02" + b")q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0K\1s.",  # a tuple of 2**60 leaves, to be hashed
    b"\x80\x02" + b"]q\0" + b"]q\1(h\0h\0eq\0" * 60 + b".",  # a list of 2**60 leaves
    b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # nested 100,000 times
    b"\x80\x02" + b"(" * 100_000 + b"t" * 99_999 + b".",
    b"\x80\x02" + b"X\xff\xff\xff\x7fabc.",
    b"\x80\x02" + b"\x8b\xff\xff\xff\x7fabc.",
    b"\x80\x02" + b"r\xff\xff\xff\xff.",
    pickle.dumps(Payload(), 2),
    pickle.dumps(Payload(), 5),
    b"",
)


@cache
def tiny_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = UNet(
        4, 1, 4, base_channels=32, multipliers=(1,), blocks_per_level=1, attention_resolutions=(), dropout=0.0
    )
    return {name: value + 0.1 for name, value in network.state_dict().items()}


@cache
def _records(content: bytes) -> dict[str, bytes]:
    """The members of a torch zip file, without the folder that they share."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


@cache
def sample() -> bytes:
    return _saved(_public(tiny_state()))


def _public(state: Any) -> dict[str, Any]:
    return {"epoch": 3, "model_state_dict": state, "ema_model_state_dict": state, "loss": 0.5}


def _saved(content: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def public_checkpoint(rng: Random) -> Case:
    """A `.pt` file whose container, pickle or tensors are hostile."""
    kind = rng.randrange(11)
    if kind < 4:
        records = dict(_records(sample()))
        records["data.pkl"] = _hostile_pickle(rng, records["data.pkl"])
        content = _container(rng, records, 0.02)
    elif kind < 6:
        content = _container(rng, dict(_records(sample())), 0.3)
    elif kind < 7:
        content = damage(rng, sample())
    elif kind < 10:
        content = _saved(_hostile_object(rng), legacy=chance(rng, 0.1))
    else:
        content = damage(rng, safetensors.torch.save(tiny_state()), edits=2)
    case = Case({"cdm.pt": content})
    case.options = {
        "schedule": rng.choice(("linear", "uniform", "ot", "cosine", None)),
        "image_size": rng.choice((None, 4, 4, 4, 0, 7, -1, 2**20, 10**9)),
    }
    if chance(rng, 0.02):
        unusual_files(rng, case, named=True)
    return case


def _container(rng: Random, records: dict[str, bytes], lies: float) -> bytes:
    deflated = chance(rng, 0.05)
    if chance(rng, 0.01):
        victim = rng.choice(sorted(records))
        records[victim] = bytes(2**27)
        deflated = True
    prefix = rng.choice(("archive/", "cdm/", "", "../")) if chance(rng, 0.1) else "archive/"
    entries = [Entry(f"{prefix}{name}".encode(), content, deflated) for name, content in records.items()]
    if chance(rng, 0.1):
        entries.pop(rng.randrange(len(entries)))
    return zip_file(rng, entries, lies)


def _hostile_pickle(rng: Random, program: bytes) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(_PROGRAMS)
    if kind == 1:  # another function or class
        old = rng.choice(
            (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"torch\nFloatStorage")
        )
        return program.replace(old, rng.choice(_GLOBALS).replace(b" ", b"\n"), rng.choice((1, -1)))
    if kind == 2:  # numbers: sizes, strides, storage lengths
        places = [i for i, byte in enumerate(program) if byte == 0x4B]  # BININT1
        place = rng.choice(places)
        big = number(rng, 1, 0.9).to_bytes(16, "little", signed=True)
        return (
            program[:place]
            + rng.choice((b"\x8a\x10" + big, b"J" + big[:4], b"N", b"]", b"}", b")"))
            + program[place + 2 :]
        )
    if kind == 3:
        return program[:-1] + rng.choice(
            (b"}.", b"0.", b"a.", b"u.", b"b.", b"R.", b"Q.", b"\x81.", b"s.", b"h\xff.")
        )
    return damage(rng, program, rng.choice(_PROGRAMS), edits=2)


def _hostile_object(rng: Random) -> Any:
    state: dict[Any, Any] = dict(tiny_state())
    for _ in range(rng.randrange(1, 4)):
        _edit_state(rng, state)
    kind = rng.randrange(12)
    if kind == 0:
        return state
    if kind == 1:
        return rng.choice(([], None, 3, torch.ones(2), {"model_state_dict": state}, {1: 2}, [state] * 3))
    if kind == 2:
        return {
            "model_state_dict": state,
            "ema_model_state_dict": rng.choice((None, {}, [], 3, "x", torch.ones(1))),
        }
    if kind == 3:
        return {"model_state_dict": state, "ema_model_state_dict": tiny_state()}
    return _public(state)


@cache
def _odd_tensors() -> tuple[torch.Tensor, ...]:
    with warnings.catch_warnings(action="ignore"):  # of kinds of tensors that are deprecated or in beta
        return (
            torch.ones(3).to_sparse(),
            torch.ones(2, 2).to_sparse_csr(),
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            torch.ones(2, device="meta"),
            torch.nn.Parameter(torch.ones(2)),
            torch.ones(2, dtype=torch.complex64),
            torch.ones(2, dtype=torch.bool),
            torch.ones(2).to(torch.float8_e5m2),
            torch.tensor(1.0),
            torch.zeros(0),
            torch.full((2,), float("nan")),
        )


def _edit_state(rng: Random, state: dict[Any, Any]) -> None:
    name = rng.choice(sorted(state, key=str))
    value = state[name]
    kind = rng.randrange(9)
    if kind == 0:
        del state[name]
    elif kind == 1:
        state[
            rng.choice(
                (
                    f"module.{name}",
                    "down.7.block.0.conv1.weight",
                    f"down.{2**40}.x",
                    "",
                    3,
                    None,
                    ("a",),
                    "\x1b[31m\n",
                )
            )
        ] = value
    elif kind == 2:  # a view that is far larger than what it shows
        rows = rng.choice((2**20, 2**40, 0, 3))
        state[name] = torch.zeros(1).expand(rows, *rng.choice(((), (4,), (2**20,))))
    elif kind == 3:
        state[name] = rng.choice(_odd_tensors())
    elif kind == 4:
        state[name] = rng.choice((None, 3, "x", [1.0], {"a": 1}, b"bytes"))
    elif (
        kind == 5
        and isinstance(value, torch.Tensor)
        and value.numel() < 10**6
        and value.layout == torch.strided
    ):
        state[name] = value.to(rng.choice((torch.float64, torch.float16, torch.int64, torch.bfloat16)))
    elif kind == 6 and isinstance(value, torch.Tensor):
        sizes = (1, 2, 3, 32, 33, 64)
        state[name] = torch.ones([rng.choice(sizes) for _ in range(max(value.dim(), 1))])
    elif kind == 7:
        state["label_emb.weight"] = torch.ones(rng.choice((1, 2, 11)), rng.choice((1, 128)))
    else:
        state["linear_layer.weight"] = torch.zeros(rng.choice((0, 1, 2, 3, 100)), 32)
