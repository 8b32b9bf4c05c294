"""Speed settings: measured precision, compilation of loss and network, recomputation of stages."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from cdm_fast import CDM, NoiseSchedule, UNet, UNetDenoiser
from cdm_fast.config import PRESETS
from cdm_fast.data import load_data
from cdm_fast.model import DDM
from cdm_fast.ops.precision import multiplies_bf16
from cdm_fast.sampling import sample
from cdm_fast.training import tuning
from cdm_fast.training.state import new_state
from cdm_fast.training.step import draw_batch, make_loss, training_step
from tests.tiny_run import tiny_config, write_images

CPU = torch.device("cpu")


@pytest.mark.parametrize(("seconds_bf16", "chosen"), [(0.5, "bf16"), (1.5, "fp32")])
def test_auto_precision_takes_the_winner_of_the_race(monkeypatch, seconds_bf16, chosen):
    seconds = {torch.bfloat16: seconds_bf16, torch.float32: 1.0}
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(tuning, "product_seconds", lambda config, dtype, device: seconds[dtype])
    assert tuning.pick_precision(PRESETS["digits"], CPU) == chosen


def test_auto_precision_without_bf16_instructions_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert tuning.pick_precision(PRESETS["digits"], CPU) == "fp32"
    asked = replace(PRESETS["digits"], train=replace(PRESETS["digits"].train, precision="bf16"))
    with pytest.warns(UserWarning, match="CPU has no bf16 instructions"):
        assert tuning.pick_precision(asked, CPU) == "bf16"


@pytest.mark.parametrize("preset", ["cifar10", "cifar10-transformer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_race_is_short(preset, dtype):
    if dtype == torch.bfloat16 and not multiplies_bf16(CPU):
        pytest.skip("without bf16 instructions there is no race")
    assert 0 < tuning.product_seconds(PRESETS[preset], dtype, CPU) < 5


@pytest.fixture
def one_graph(monkeypatch):
    """torch.compile without code generation: still one graph, or an error."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture(params=["unet", "transformer"])
def config(request, tmp_path):
    config = tiny_config(write_images(tmp_path / "images.npz"))
    return replace(config, network=replace(config.network, architecture=request.param))


def losses(config, steps=3):
    """Of the first steps of a run."""
    state = new_state(config, CPU)
    loss_function = tuning.compiled(make_loss(config.train), config.train.compile, CPU)
    data, results = load_data(config.data.source), []
    for step in range(steps):
        torch.manual_seed(step)  # of the dropout
        batch = draw_batch(data, state.model, config, step)
        results.append(
            training_step(state.model, state.optimizer, state.ema, batch, loss_function, step=step)
        )
    return torch.stack([result.loss for result in results])


@pytest.mark.parametrize("objective", ["cdm", "ddm"])
def test_compiled_training_takes_the_same_steps(one_graph, config, objective):
    if (config.network.architecture, objective) == ("transformer", "ddm"):
        pytest.skip("a transformer classifies noise levels")
    eager = replace(config, train=replace(config.train, objective=objective))
    compiled = replace(eager, train=replace(eager.train, compile="default"))
    torch.testing.assert_close(losses(compiled), losses(eager), rtol=1e-5, atol=1e-6)


def test_compiled_adversarial_training_takes_the_same_steps(one_graph, config):
    network = replace(config.network, conditioning="joint", head_rank=0)
    train = replace(config.train, adversarial="l2", budget=0.5, adversarial_steps=2)
    eager = replace(config, network=network, train=train)
    compiled = replace(eager, train=replace(train, compile="default"))
    torch.testing.assert_close(losses(compiled), losses(eager), rtol=1e-5, atol=1e-6)


def test_recomputing_training_takes_the_same_steps(config):
    recomputing = replace(config, train=replace(config.train, checkpoint_blocks=True))
    torch.testing.assert_close(losses(recomputing), losses(config), rtol=1e-6, atol=1e-7)


def test_recomputation_compiles(one_graph, config):
    both = replace(config, train=replace(config.train, checkpoint_blocks=True, compile="default"))
    torch.testing.assert_close(losses(both), losses(config), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cdm", "ddm"])
def test_compiled_network_draws_the_same_images(one_graph, kind):
    schedule, shape = NoiseSchedule.uniform(T=10), (8, 1)
    trunk = {"base_channels": 8, "multipliers": (1, 2), "blocks_per_level": 1, "attention_resolutions": (4,)}
    torch.manual_seed(0)
    model = (
        CDM(UNet(*shape, schedule.num_levels, **trunk, num_groups=4), schedule)
        if kind == "cdm"
        else DDM(UNetDenoiser(*shape, **trunk, num_groups=4), schedule)
    )
    expected = sample(model, 3, steps=4)
    tuning.compile_network(model, "default")
    torch.testing.assert_close(sample(model, 3, steps=4), expected, rtol=1e-4, atol=1e-5)


def test_auto_compiles_nothing_on_a_cpu():
    def function():
        return None

    assert tuning.compiled(function, "auto", CPU) is function
