"""Weights from pickles of whole networks, as EDM's code writes them, without running code in them."""

import io
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from cdm_fast import UserError
from cdm_fast.interop import SigmaDenoiser
from cdm_fast.interop.edm import read_edm


class Record(dict):
    """A dictionary class of the file's own code."""


def rebuild(record):
    """What such a pickle calls; here never."""
    raise AssertionError("code of the file was run")


class Persistent(nn.Module):
    """A module that pickles itself as EDM's do: with its source code, behind a function of its own module."""

    def __reduce__(self):
        state = dict(self.__dict__)
        return rebuild, (Record(type="class", module_src="print('executed')", class_name="X", state=state),)


class Inner(Persistent):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.halved = nn.Parameter(torch.randn(5).half())
        self.register_buffer("freqs", torch.arange(3).float())
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.alias = self.weight.detach()[1:, ::2]


class Net(Persistent):
    def __init__(self):
        super().__init__()
        self.label_dim, self.img_resolution, self.img_channels = 3, 4, 1
        self.model = nn.ModuleDict({"0": Inner(), "1": nn.Linear(2, 2)})
        self.view = nn.Parameter(torch.randn(6, 6)[1:4, 2:])

    def forward(self, y, sigma, class_labels=None):
        shift = 0 if class_labels is None else class_labels.sum(1).view(-1, 1, 1, 1)
        return y / (1 + sigma.view(-1, 1, 1, 1)) + shift


@pytest.fixture
def foreign(monkeypatch):
    """The classes as if they belonged to another program: gone by the time of reading."""
    module = types.ModuleType("other_program")
    for thing in (Record, rebuild, Inner, Net):
        monkeypatch.setattr(thing, "__module__", "other_program")
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "other_program", module)
    return module


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_tensors_and_nothing_else(tmp_path, foreign, monkeypatch, capsys, protocol):
    torch.manual_seed(0)
    network = Net()
    content = pickle.dumps({"ema": network, "dataset_kwargs": Record(path="x")}, protocol)
    (tmp_path / "edm.pkl").write_bytes(content)
    monkeypatch.delitem(sys.modules, "other_program")
    found, expected = read_edm(tmp_path / "edm.pkl"), network.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
    assert "executed" not in capsys.readouterr().out
    Net().load_state_dict(found)


def test_a_network_with_classes_is_called_as_edms_are():
    model = SigmaDenoiser(Net(), levels=10)
    y, sigma = torch.randn(2, 1, 4, 4), torch.tensor([0.5, 2.0])
    found = model.eps_hat(y, sigma.double().log(), torch.tensor([1, -1]))
    denoised = y / (1 + sigma.view(-1, 1, 1, 1)) + torch.tensor([1.0, 0.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, (y - denoised) / sigma.view(-1, 1, 1, 1))
    assert (model.num_classes, model.input_shape) == (3, (1, 4, 4))


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def of_storage(content):
    """A file whose one tensor has this storage."""

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (content,)

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, (2**20, 2**19), (0, 0), False, {})

    return pickle.dumps({"ema": Tensor()})


def legacy(tensor):
    stream = io.BytesIO()
    torch.save(tensor._typed_storage(), stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps({"ema": Malicious()}), "no tensors under 'ema'"),
        (pickle.dumps({"net": 1}), "it holds net"),
        (pickle.dumps([1]), "holds no 'ema'"),
        (pickle.dumps({"ema": 3.0}), "no tensors"),
        (of_storage(legacy(torch.ones(4))), "more numbers than its storage"),
        (of_storage(legacy(torch.ones(4))[:-3]), "another size"),
        (of_storage(b""), "damaged"),
        (b"", "damaged"),
        (b"\x80\x04\x95", "damaged"),
        (b"\x80\x02" + b"r\xff\xff\xff\xff.", "damaged"),
        (b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0K\1s.", "tuples without end"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds no 'ema'"),
        (b"\x80\x02\x82\x01.", "damaged"),
    ],
)
def test_an_odd_file_is_refused_in_one_line(tmp_path, capsys, content, told):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read_edm(tmp_path / "a.pkl")
    assert "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out
