"""Public names of models and samplers are documented, and the most used ones have an example."""

import inspect
from doctest import DocTestFinder
from importlib import import_module
from pkgutil import iter_modules

import pytest

import cdm_fast
from cdm_fast import sampling
from cdm_fast.model import composition, conditioned, energy
from cdm_fast.sampling import langevin, restoration

ROOMS = ("cdm_fast.model", "cdm_fast.sampling")
MODULES = [
    import_module(f"{room}.{module.name}")
    for room in ROOMS
    for module in iter_modules(import_module(room).__path__)
]
MODULES.append(import_module("cdm_fast.data.draws"))

# The doctests themselves are run by pytest's --doctest-modules.
WITH_EXAMPLE = [
    cdm_fast.NoiseSchedule,
    cdm_fast.NoiseSchedule.noise,
    cdm_fast.CDM,
    cdm_fast.CDM.log_prob,
    cdm_fast.DDM,
    cdm_fast.cdm_loss,
    cdm_fast.ddm_loss,
    cdm_fast.sample,
    energy.Energy,
    composition.Product,
    composition.Mixture,
    conditioned.OfClass,
    conditioned.Guided,
    langevin.hmc,
    restoration.Known,
    restoration.restore,
    sampling.DDIM,
    sampling.MALA,
    sampling.SMC,
    sampling.MoveLog,
    sampling.ImageNoise,
]


def public(holder):
    """(name, object) of the public functions, classes, methods and properties that `holder` defines."""
    for name, value in vars(holder).items():
        value = getattr(value, "__func__", value)  # of a classmethod
        documented = inspect.isclass(value) or inspect.isfunction(value) or isinstance(value, property)
        if name.startswith("_") or not documented:
            continue
        if inspect.ismodule(holder) and value.__module__ != holder.__name__:
            continue  # imported
        yield f"{holder.__name__}.{name}", value
        if inspect.isclass(value):
            yield from public(value)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_names_have_a_docstring(module):
    assert module.__doc__
    documents = {name: value.__doc__ or "" for name, value in public(module)}
    generated = {name: f"{name.rpartition('.')[2]}(" for name in documents}  # by dataclass and NamedTuple
    assert [name for name, text in documents.items() if not text or text.startswith(generated[name])] == []


@pytest.mark.parametrize("named", WITH_EXAMPLE, ids=lambda named: named.__qualname__)
def test_what_is_called_first_has_an_example(named):
    found = DocTestFinder(recurse=False).find(inspect.unwrap(named), named.__qualname__)
    assert any(test.examples for test in found)
