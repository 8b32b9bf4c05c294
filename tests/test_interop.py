"""diffusers' schedulers on our grid give our samples; exported graphs give the model's numbers."""

import pytest
import torch
from torch import nn

from benchmarks.support.analytic import ExactNetwork, random_mixture
from cdm_fast import CDM, MLP, NoiseSchedule, Transformer, UNet, UserError
from cdm_fast.interop import (
    ClassPosterior,
    Inspection,
    Likelihood,
    NoisePredictor,
    build_scheduler,
    export,
    export_onnx,
)
from cdm_fast.model.conditioned import Guided
from cdm_fast.sampling import ddim, dpm_solver_pp_2m


def silent():
    raise AssertionError("a deterministic sampler drew noise")


class InSinglePrecision(nn.Module):
    """An exact network whose input and logits are fp32, as a trained one's."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x.double()).float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("steps", [5, 10, 20, 50], ids=lambda steps: f"{steps}-steps")
@pytest.mark.parametrize("schedule_name", ["uniform", "linear", "cosine"])
@pytest.mark.parametrize("sampler", [ddim, dpm_solver_pp_2m], ids=lambda sampler: sampler.__name__)
def test_diffusers_schedulers_agree_with_our_samplers(sampler, schedule_name, steps, dtype):
    """On the same noise and grid. DPM-Solver++ rounds its state to fp32 at every step; in fp32 the first step
    of `cosine` divides the rounding of s eps_hat by a_T = 2e-4."""
    diffusers = pytest.importorskip("diffusers")
    schedule, density = NoiseSchedule.by_name(schedule_name, 200), random_mixture(3, 4, seed=1)
    network = ExactNetwork(density, schedule)
    if dtype == torch.float32:
        network = InSinglePrecision(network)
    model = CDM(network, schedule, input_shape=(3,))
    if sampler is ddim:
        scheduler = build_scheduler(diffusers.DDIMScheduler, schedule, steps, clip_sample=False)
    else:
        scheduler = build_scheduler(diffusers.DPMSolverMultistepScheduler, schedule, steps)
    assert (scheduler.timesteps + 1).tolist() == schedule.grid(steps)[:-1]
    start = torch.randn(20, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x, predictor = start, NoisePredictor(model)
    for timestep in scheduler.timesteps:
        x = scheduler.step(predictor(x, timestep).sample, timestep, x).prev_sample
    wanted = sampler(model, start, silent, schedule.grid(steps))
    assert float((wanted - start).abs().max()) > 0.5
    coarse = dtype == torch.float32 and schedule_name == "cosine"
    torch.testing.assert_close(x.to(dtype), wanted, rtol=0, atol=1e-4 if coarse else 2e-6)


def joint_unet():
    torch.manual_seed(0)
    schedule = NoiseSchedule.uniform(6)
    network = UNet(
        8,
        1,
        schedule.num_levels,
        base_channels=32,
        multipliers=(1,),
        blocks_per_level=1,
        attention_resolutions=(8,),
        num_classes=3,
        conditioning="joint",
    )
    with torch.no_grad():
        network.linear_layer.weight.normal_(std=0.3)
    return CDM(network, schedule, class_prior=torch.tensor([1.0, 2.0, 3.0]))


def joint_transformer():
    torch.manual_seed(0)
    schedule = NoiseSchedule.uniform(6)
    sizes = {"patch_size": 2, "width": 32, "depth": 1, "head_width": 16, "stem_channels": 32}
    network = Transformer(8, 1, schedule.num_levels, num_classes=3, conditioning="joint", **sizes)
    torch.nn.init.normal_(network.linear_layer.weight, std=0.3)
    return CDM(network, schedule, class_prior=torch.tensor([1.0, 2.0, 3.0]))


def test_the_predictor_is_the_denoiser():
    model = joint_unet()
    x, label = torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 1, -1])
    torch.testing.assert_close(NoisePredictor(model)(x, 3, label).sample, model.denoise(x, 4, label))
    guided = Guided(model, 1.5)
    found = NoisePredictor(guided)(x, torch.tensor([0, 3, 4, 5]), label)[0]
    torch.testing.assert_close(found, guided.denoise(x, torch.tensor([1, 4, 5, 6]), label))
    assert not found.requires_grad


MODULES = {"likelihood": Likelihood, "classifier": ClassPosterior}


def joint_mlp():
    torch.manual_seed(0)
    schedule = NoiseSchedule.uniform(6)
    network = MLP(5, schedule.num_levels, hidden=16, num_classes=3, conditioning="joint")
    torch.nn.init.normal_(network.linear_layer.weight, std=0.3)
    return CDM(network, schedule, class_prior=torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("kind", "model"),
    [("likelihood", joint_unet), ("classifier", joint_mlp), ("likelihood", joint_transformer)],
    ids=["likelihood", "classifier", "likelihood-of-patches"],
)
def test_exported_graphs_agree(kind, model, tmp_path):
    """At another batch size, after a round trip through a file, without an operation of our own."""
    module = MODULES[kind](model())
    x = torch.randn(5, *module.model.input_shape)
    program = export(module)
    assert "cdm_fast" not in str(program.graph)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "classes", [{}, {"num_classes": 3}, {"num_classes": 3, "conditioning": "joint"}], ids=str
)
def test_an_inspection_tells_what_the_methods_of_the_model_tell(classes):
    schedule = NoiseSchedule.uniform(T=10)
    model = CDM(MLP(4, schedule.num_levels, hidden=8, **classes), schedule).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        log_prob, log_level, denoised = Inspection(model)(x)
        wanted = model.log_prob_classes(x) if classes else model.log_prob(x)[:, None]
        torch.testing.assert_close(log_prob, wanted)
        posterior = (model.log_posterior(x) - model.log_level_prior).log_softmax(1)
        torch.testing.assert_close(log_level, posterior)
        level = log_level[:, 1:-1].argmax(1) + 1
        torch.testing.assert_close(denoised, model.predict_x0(x, level))


def test_onnx_agrees(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module, x = ClassPosterior(joint_unet()), torch.randn(5, 1, 8, 8)
    path = export_onnx(module, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["log_prob"], {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), module(x), rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    schedule = NoiseSchedule.ot(8)
    model = CDM(MLP(2, schedule.num_levels, hidden=16), schedule)
    with pytest.raises(UserError, match="'ot' does not preserve variance"):
        NoisePredictor(model)
    with pytest.raises(UserError, match="trained without classes"):
        ClassPosterior(model)
    with pytest.raises(UserError, match="does not know the shape"):
        export(Likelihood(CDM(ExactNetwork(random_mixture(2, 1), schedule), schedule)))
