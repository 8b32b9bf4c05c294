"""Models of diffusers as denoisers: their schedulers, their folders, and the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.support.analytic import random_mixture
from cdm_fast import UserError
from cdm_fast.interop import from_diffusers, load_diffusers
from cdm_fast.interop.from_diffusers import fetch
from cdm_fast.likelihood import flow_log_prob
from tests.test_cli import call, call_json
from tests.tiny_run import write_images

diffusers = pytest.importorskip("diffusers")

MIXTURE = random_mixture(2, 3, seed=1, spread=0.5)


class Exact(nn.Module):
    """The mixture's exact denoiser, called as diffusers calls networks; `amplitudes` of each timestep."""

    def __init__(self, predicts, amplitudes):
        super().__init__()
        self.predicts, self.amplitudes = predicts, amplitudes

    def forward(self, y, timestep):
        rows = [self.row(y[i : i + 1], float(t)) for i, t in enumerate(timestep)]
        return type("Output", (), {"sample": torch.cat(rows)})

    def row(self, y, timestep):
        alpha, beta = self.amplitudes(timestep)
        score = MIXTURE.score(y.double(), alpha, beta)
        eps, x0 = -beta * score, (y + beta**2 * score) / max(alpha, 1e-12)
        if self.predicts == "velocity":
            return eps - (x0 if alpha > 1e-9 else MIXTURE.mean())
        known = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - beta * x0, "score": score}
        return known[self.predicts]


def discrete(scheduler):
    power = torch.as_tensor(scheduler.alphas_cumprod).double()
    return lambda t: (float(power[round(t)].sqrt()), float((1 - power[round(t)]).sqrt()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DDPMScheduler", {}),
        ("DDIMScheduler", {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}),
        ("EulerDiscreteScheduler", {"prediction_type": "sample"}),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_discrete_schedulers_have_the_closed_form_denoiser(kind, options):
    scheduler = getattr(diffusers, kind)(num_train_timesteps=200, **options)
    network = Exact(scheduler.config.get("prediction_type"), discrete(scheduler))
    model = from_diffusers(network, scheduler)
    assert model.schedule.T == 200 - bool(options.get("rescale_betas_zero_snr"))
    x = MIXTURE.sample(6, torch.Generator().manual_seed(0))
    for t in (1, 60, model.schedule.T):
        s = float(model.schedule.s[t])
        a, _ = discrete(scheduler)(t - 1)
        assert float(model.schedule.a[t]) == pytest.approx(a, rel=1e-6)
        torch.testing.assert_close(model.denoise(x, t), -s * MIXTURE.score(x, a, s), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "ScoreSdeVeScheduler"])
def test_continuous_schedulers_have_the_closed_form_likelihood(kind):
    scheduler = getattr(diffusers, kind)()
    if kind.startswith("Flow"):
        network = Exact("velocity", lambda t: (1 - t / 1000, t / 1000))
    else:
        network = Exact("score", lambda sigma: (1.0, sigma))
    model = from_diffusers(network, scheduler, levels=50)
    x = MIXTURE.sample(6, torch.Generator().manual_seed(0))
    alpha, beta = model.path.amplitudes(torch.tensor([model.path.least]).double())
    exact = MIXTURE.log_prob(x, alpha, beta)[:, 0]
    assert float((flow_log_prob(model, x).log_prob - exact).abs().max()) < 0.01


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_the_schedulers(predicts):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=predicts)

    class Bare(nn.Module):
        def forward(self, y, noise):
            return type("Output", (), {"sample": torch.tanh(y) * noise.view(-1, 1)})

    model = from_diffusers(Bare(), scheduler, levels=20)
    y, sigma = torch.randn(5, 3).double(), 0.7
    out = Bare()(scheduler.precondition_inputs(y, sigma), 0.25 * torch.tensor([sigma]).log().expand(5)).sample
    denoised = scheduler.precondition_outputs(y, out, sigma)
    found = model.eps_hat(y, torch.full((5,), sigma).double().log())
    torch.testing.assert_close(y - sigma * found, denoised, rtol=1e-5, atol=1e-6)


def tiny_unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    )


def tiny_dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    ).eval()


def save(folder, network, kind="unet", safe=True):
    network.save_pretrained(folder / kind, safe_serialization=safe)
    diffusers.DDPMScheduler(num_train_timesteps=40).save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_folder_gives_the_networks_own_numbers(tmp_path, safe):
    network = tiny_unet().eval()
    model = load_diffusers(save(tmp_path, network, safe=safe))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.denoise(x, 7), network(x, 6).sample)
    assert (model.input_shape, model.schedule.T, model.num_classes) == ((1, 8, 8), 40, None)
    beside = tmp_path / "unet"
    diffusers.DDPMScheduler(num_train_timesteps=40).save_pretrained(beside)
    assert load_diffusers(beside).schedule.T == 40


def test_a_dit_has_its_classes_and_no_variance(tmp_path):
    network = tiny_dit()
    model = load_diffusers(save(tmp_path, network, "transformer"))
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([1, -1])
    with torch.no_grad():
        theirs = network(x, torch.tensor([4, 4]), class_labels=torch.tensor([1, 3])).sample[:, :1]
        torch.testing.assert_close(model.denoise(x, 5, label), theirs)
    assert (model.num_classes, model.null_label) == (3, 3)


def test_a_conditional_unet_takes_what_its_conditions_give():
    class Conditional(nn.Module):
        def forward(self, y, timestep, encoder_hidden_states):
            return type("Output", (), {"sample": y * encoder_hidden_states.view(-1, 1)})

    model = from_diffusers(
        Conditional(),
        diffusers.DDPMScheduler(),
        conditions=lambda label: {"encoder_hidden_states": label.float() + 2},
        num_classes=4,
        null_label=4,
    )
    x = torch.ones(2, 3)
    torch.testing.assert_close(model.denoise(x, 5, torch.tensor([0, -1])), torch.tensor([[2.0], [6]]) * x)


def edit(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (edit("unet/config.json", _class_name="AutoencoderKL"), "AutoencoderKL"),
        (edit("unet/config.json", block_out_channels=[16, 16]), "in the network of its config.json"),
        (edit("unet/config.json", down_block_types=["Nothing"]), "can build"),
        (edit("scheduler/scheduler_config.json", _class_name="os"), "names the scheduler os"),
        (edit("scheduler/scheduler_config.json", _class_name="DPMScheduler"), "names the scheduler"),
        (edit("scheduler/scheduler_config.json", prediction_type="flow"), "predicts 'flow'"),
        (remove("scheduler/scheduler_config.json"), "no scheduler_config.json"),
        (remove("unet/diffusion_pytorch_model.safetensors"), "holds no diffusion_pytorch_model"),
        (lambda folder: (folder / "unet" / "config.json").write_text("[1"), "cannot be read"),
        (lambda folder: (folder / "vae").mkdir(), "latents"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage, told):
    save(tmp_path, tiny_unet())
    damage(tmp_path)
    with pytest.raises(UserError, match=told) as caught:
        load_diffusers(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_weights_is_not_run(tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return (print, ("executed",))

    save(tmp_path, tiny_unet(), safe=False)
    torch.save({"a": Malicious()}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="wants to execute code"):
        load_diffusers(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_a_model_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hf:nobody/nothing: cannot be fetched"):
        fetch("nobody/nothing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and images of its kind."""
    path = tmp_path_factory.mktemp("diffusers")
    write_images(path / "images.npz", num_grey_levels=np.array(256))
    return save(path, tiny_unet())


FEW = ["--ode-images", "2", "--elbo-images", "4", "--tolerance", "0.01", "--device", "cpu"]


def test_nll_audits_another_programs_model(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["nll", f"diffusers:{folder}", "--data", folder / "images.npz", "--method", "audit", *FEW]
    found = call_json(*command, "--out", "images.csv")
    assert found["pixels"] == "points" and found["method"] == "audit"
    gap = found["elbo_bits_per_dim"] - found["ode_bits_per_dim"]
    assert found["gap_bits_per_dim"] == pytest.approx(gap) and np.isfinite(gap)
    assert "40 levels of DDPMScheduler" in found["ode"]["path"]
    status, told, _ = call(*command)
    assert status == 0 and "bound minus ODE" in told and "probability-flow ODE" in told
    other = call_json(*command, "--pixels", "intervals")
    assert other["pixels"] == "intervals" and other["ode_bits_per_dim"] != found["ode_bits_per_dim"]


def test_samples(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = call_json("sample", f"diffusers:{folder}", "--num", "2", "--steps", "3", "--out", "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["images"].shape[:3] == (2, 8, 8)
    assert drawn["num_images"] == 2


def test_noise_blind_denoising_of_a_picture(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)).save("noisy.png")
    found = call_json("denoise", f"diffusers:{folder}", "noisy.png", "--device", "cpu")
    (row,) = found["images"]
    assert 1 <= row["level"] <= 40 and row["sigma"] > 0 and (tmp_path / row["out"]).is_file()


@pytest.mark.parametrize("method", ["denoising", "ode"])
def test_a_dit_classifies(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images.npz", num_grey_levels=np.array(256))
    source = f"diffusers:{save(tmp_path / 'dit', tiny_dit(), 'transformer')}"
    flags = ["--data", "images.npz", "--images", "2", "--trials", "2", "--tolerance", "0.1"]
    found = call_json("classify", source, "--method", method, *flags, "--probes", "2", "--device", "cpu")
    assert (found["num_classes"], found["num_images"]) == (3, 2) and found["method"] == method
    assert (tmp_path / found["picture"]).is_file()
    given = call_json("nll", source, "--method", "elbo", *FEW, "--data", "images.npz", "--given", "label")
    assert given["elbo"]["given"] == "label" and np.isfinite(given["elbo_bits_per_dim"])


def test_a_network_without_a_null_class_is_audited_given_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images.npz", num_grey_levels=np.array(256))
    source = f"diffusers:{save(tmp_path / 'classes', tiny_unet(num_class_embeds=3))}"
    found = call_json("nll", source, "--method", "audit", *FEW, "--data", "images.npz")
    assert found["ode"]["given"] == found["elbo"]["given"] == "label"


def test_a_model_of_the_hub_is_the_folder_that_was_fetched(folder, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder)
    )
    command = ["nll", "hf:somebody/model", "--data", folder / "images.npz", "--method", "elbo", *FEW]
    assert np.isfinite(call_json(*command)["elbo_bits_per_dim"]) and set(asked) == {"somebody/model"}


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["nll", "--method", "ode"], "give --data"),
        (["nll", "--data", "IMAGES"], "give --method ode, elbo or audit"),
        (["nll", "--data", "IMAGES", "--method", "ode", "--given", "label"], "without classes"),
        (["score", "--data", "IMAGES"], "only denoises"),
        (["classify", "--data", "IMAGES"], "without classes"),
    ],
)
def test_what_it_cannot_do_is_told_in_one_line(folder, tmp_path, monkeypatch, command, told):
    monkeypatch.chdir(tmp_path)
    words = [str(folder / "images.npz") if word == "IMAGES" else word for word in command[1:]]
    status, _, error = call(command[0], f"diffusers:{folder}", *words)
    assert status == 2 and told in error and error.strip().count("\n") == 0
