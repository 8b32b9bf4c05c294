"""Wrapper models hold each module and each tensor once; every such class of the package is tested."""

from importlib import import_module
from pkgutil import walk_packages

import pytest
import torch

import cdm_fast
from cdm_fast import CDM, DDM, MLP, MLPDenoiser, NoiseSchedule
from cdm_fast.interop import ClassPosterior, Likelihood, NoisePredictor
from cdm_fast.interop.denoisers import (
    FlowMatching,
    Foreign,
    LevelDenoiser,
    PathDenoiser,
    ScoreSDE,
    SigmaDenoiser,
)
from cdm_fast.interop.paths import sigma_path
from cdm_fast.likelihood.ode import ContinuousDenoiser
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.composition import Composition, Mixture, Product
from cdm_fast.model.conditioned import Between, Guided, GuidedEnergy, OfClass
from cdm_fast.model.denoiser import Denoiser, Wrapper
from cdm_fast.model.energy import Energy
from cdm_fast.sampling.restoration import Known, Posterior

SCHEDULE = NoiseSchedule.uniform(5)
ABSTRACT = {Denoiser, Wrapper, Energy, Composition, Foreign, ContinuousDenoiser}


def cdm():
    return CDM(MLP(3, SCHEDULE.num_levels, hidden=16, num_classes=4, conditioning="joint"), SCHEDULE)


def linear():
    return torch.nn.Linear(3, 3)


# What each kind of model is made of.
PARTS = {
    CDM: lambda: [MLP(3, SCHEDULE.num_levels, hidden=16), SCHEDULE],
    DDM: lambda: [MLPDenoiser(3, hidden=16), SCHEDULE],
    Classifier: lambda: [MLP(3, 4, hidden=16, num_classes=4), SCHEDULE],
    Guided: lambda: [cdm(), 1.5],
    GuidedEnergy: lambda: [cdm(), 1.5],
    Between: lambda: [Guided(cdm(), 0.5), 1, 0.3],
    OfClass: lambda: [cdm(), 2],
    Product: lambda: [[cdm(), OfClass(cdm(), 1)]],
    Mixture: lambda: [[cdm(), Product([cdm(), cdm()])]],
    Posterior: lambda: [cdm(), Known(torch.zeros(3), 0.1)],
    LevelDenoiser: lambda: [linear(), SCHEDULE, "eps"],
    PathDenoiser: lambda: [linear(), sigma_path(0.01, 10.0), "eps"],
    ScoreSDE: lambda: [linear(), "vp"],
    SigmaDenoiser: lambda: [linear()],
    FlowMatching: lambda: [linear()],
    Likelihood: lambda: [cdm()],
    ClassPosterior: lambda: [cdm()],
    NoisePredictor: lambda: [cdm()],
}


def modules_in(values):
    for value in values:
        if isinstance(value, torch.nn.Module):
            yield value
        elif isinstance(value, list):
            yield from modules_in(value)


@pytest.mark.parametrize("kind", PARTS, ids=lambda kind: kind.__name__)
def test_everything_is_registered_once(kind):
    parts = PARTS[kind]()
    model = kind(*parts)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert len(names) == len(list(model.modules()))
    inside = [tensor.data_ptr() for part in modules_in(parts) for tensor in part.state_dict().values()]
    found = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(found)) == len(found)
    assert (
        set(inside) <= set(found) and len(found) <= len(inside) + 2
    )  # priors of a CDM, weights of a mixture


def subclasses(kind):
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_no_kind_of_model_is_left_out():
    for module in walk_packages(cdm_fast.__path__, "cdm_fast."):
        if not module.name.endswith(("__main__", "_C")) and ".kernels" not in module.name:
            import_module(module.name)
    own = {kind for kind in subclasses(Denoiser) if kind.__module__.startswith("cdm_fast.")}
    assert own | {Denoiser} == {kind for kind in PARTS if issubclass(kind, Denoiser)} | ABSTRACT
