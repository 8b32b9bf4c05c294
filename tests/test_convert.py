"""Checkpoints of the public code become runs that compute the same function."""

import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from cdm_fast import NoiseSchedule, UNet, load
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError
from cdm_fast.interop.convert import PUBLIC_BETAS, choose_schedule, convert, infer_config, read_public
from cdm_fast.likelihood import evaluate
from cdm_fast.runs.checkpoint import read_config
from tests.accuracy import TOLERANCE, relative_error

SIZE, CHANNELS, LEVELS, BASE, MULTIPLIERS, BLOCKS = 8, 2, 7, 32, (1, 2), 1


def make_state(num_classes=None, seed=0):
    """Random weights under the public names; norms and biases are not left at 1 and 0."""
    torch.manual_seed(seed)
    network = UNet(
        SIZE,
        CHANNELS,
        LEVELS,
        base_channels=BASE,
        multipliers=MULTIPLIERS,
        blocks_per_level=BLOCKS,
        attention_resolutions=(SIZE // 2,),
        dropout=0.0,
        num_classes=num_classes,
    )
    return {name: value + 0.1 * torch.randn_like(value) for name, value in network.state_dict().items()}


def save_public(path, state, ema=None, prefix=""):
    """A file as the public code writes it."""
    content = {
        "epoch": 3,
        "model_state_dict": {prefix + name: value for name, value in state.items()},
        "ema_model_state_dict": {prefix + name: value for name, value in (ema or state).items()},
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "loss": 0.03,
    }
    torch.save(content, path)
    return path


def public_logits(w, x, label=None):
    """The public network from the paper's description, on raw tensors: logits (B, N), cumulated."""

    def conv(name, x, **options):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def block(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        if embedding is not None:
            h = h + linear(f"{name}.temb_proj", F.silu(embedding))[:, :, None, None]
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)

    def attend(name, x):
        q, k, v = (conv(f"{name}.{part}", norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(dim=2)  # (B, from, to)
        return x + conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def stage(side, level, index, x):
        x = block(f"{side}.{level}.block.{index}", x)
        return (
            attend(f"{side}.{level}.attn.{index}", x) if f"{side}.{level}.attn.{index}.q.weight" in w else x
        )

    embedding = None
    if label is not None:
        embedding = linear("temb.dense.1", F.silu(linear("temb.dense.0", w["label_emb.weight"][label])))
    last = len(MULTIPLIERS) - 1
    skips = [conv("conv_in", x, padding=1)]
    for level in range(last + 1):
        for index in range(BLOCKS):
            skips.append(stage("down", level, index, skips[-1]))
        if level < last:
            skips.append(conv(f"down.{level}.downsample.conv", F.pad(skips[-1], (0, 1, 0, 1)), stride=2))
    h = block("mid.block_2", attend("mid.attn_1", block("mid.block_1", skips[-1])))
    for level in range(last, -1, -1):
        for index in range(BLOCKS + 1):
            h = stage("up", level, index, torch.cat([h, skips.pop()], dim=1))
        if level > 0:
            h = conv(f"up.{level}.upsample.conv", F.interpolate(h, scale_factor=2, mode="nearest"), padding=1)
    h = conv("conv_out", F.silu(norm("norm_out", h)), padding=1).mean(dim=(2, 3))
    return linear("linear_layer", h).cumsum(dim=1)


@pytest.fixture
def images():
    return torch.randn(3, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "data-parallel"])
def test_logits_agree_with_the_public_network(tmp_path, images, prefix):
    raw, ema = make_state(seed=0), make_state(seed=1)
    file = save_public(tmp_path / "cdm.pt", raw, ema, prefix)
    convert(file, tmp_path / "run", schedule="linear", image_size=SIZE)
    with torch.no_grad():
        for weights, state in (("ema", ema), ("raw", raw)):
            logits = load(tmp_path / "run", weights=weights).logits(images)
            assert relative_error(logits, public_logits(state, images)) < TOLERANCE[torch.float32]


def test_class_conditional_logits_agree(tmp_path, images):
    state = make_state(num_classes=4)
    converted = convert(
        save_public(tmp_path / "cdm.pt", state), tmp_path / "run", schedule="linear", image_size=SIZE
    )
    assert converted.config.image.num_classes == 4
    label = torch.tensor([0, 3, -1])
    with torch.no_grad():
        logits = load(tmp_path / "run").logits(images, label)
    row = label % 5  # the file's null class is the last
    assert relative_error(logits, public_logits(state, images, row)) < TOLERANCE[torch.float32]


def test_flow_matching_levels_are_turned_round(tmp_path, images):
    state = make_state()
    convert(save_public(tmp_path / "cdm.pt", state), tmp_path / "run", schedule="ot", image_size=SIZE)
    model = load(tmp_path / "run")
    with torch.no_grad():
        logits = model.logits(images)
    assert relative_error(logits, public_logits(state, images).flip(1)) < TOLERANCE[torch.float32]
    # Their time of level t, i/(N-1) with i = N-1-t: x = time x_0 + (1 - (1 - sigma_min) time) eps.
    time = torch.arange(LEVELS - 1, -1, -1, dtype=torch.float64) / (LEVELS - 1)
    torch.testing.assert_close(model.schedule.a, time)
    torch.testing.assert_close(model.schedule.s[1:], (1 - (1 - 1e-4) * time)[1:], rtol=1e-12, atol=0)
    assert model.schedule.s[0] == 0


def test_the_papers_networks_are_recognised():
    sizes = {"cifar10": (32, (1, 2, 2, 2)), "celeba64": (64, (1, 2, 2, 2, 4))}
    for image_size, multipliers in sizes.values():
        with torch.device("meta"):
            state = UNet(
                image_size,
                3,
                1002,
                base_channels=128,
                multipliers=multipliers,
                blocks_per_level=2,
                attention_resolutions=(16,),
            ).state_dict()
        config, assumed = infer_config(state, "linear", None, "file")
        assert (config.image.shape, config.schedule.T) == ((3, image_size, image_size), 1000)
        assert (config.network.base_channels, config.network.multipliers) == (128, multipliers)
        assert (config.network.blocks_per_level, config.network.attention_resolutions) == (2, (16,))
        assert f"image size {image_size}" in assumed


def test_the_report_says_what_was_assumed(tmp_path):
    file = save_public(tmp_path / "cdm.pt", make_state())
    report = convert(file, tmp_path / "run", schedule="uniform", image_size=SIZE).to_json()
    assert report["num_parameters"] == sum(value.numel() for value in make_state().values())
    assert (report["T"], report["schedule"], report["num_classes"]) == (LEVELS - 2, "uniform", None)
    assert report["assumed"] == ["schedule uniform", "256 grey levels at 2u/255 - 1"]


def public_alpha_hat(steps, beta_start=1e-4, beta_end=0.02):
    """The public code's table, in its fp32: clean data, `steps` noisy levels, pure noise."""
    alpha = 1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float32)
    return torch.cat([torch.ones(1), torch.cumprod(alpha, dim=0), torch.zeros(1)])


@pytest.mark.parametrize("betas", [None, (2e-4, 0.01)], ids=["public", "asked-for"])
def test_betas_are_the_public_codes_at_any_number_of_levels(tmp_path, betas):
    """Ours scale by 1000/T: eps_hat would be 13 % off at level 250 of 500."""
    torch.manual_seed(0)
    state = UNet(
        SIZE,
        CHANNELS,
        502,
        base_channels=BASE,
        multipliers=MULTIPLIERS,
        blocks_per_level=BLOCKS,
        attention_resolutions=(SIZE // 2,),
        dropout=0.0,
    ).state_dict()
    file = save_public(tmp_path / "cdm.pt", state)
    convert(file, tmp_path / "run", schedule="linear", betas=betas, image_size=SIZE)
    alpha_hat = public_alpha_hat(500, *(betas or PUBLIC_BETAS)).double()
    schedule = load(tmp_path / "run").schedule
    torch.testing.assert_close(schedule.a, alpha_hat.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        schedule.s, (1 - alpha_hat).sqrt(), rtol=1e-3, atol=0
    )  # theirs cancels in fp32
    assert read_config(tmp_path / "run").schedule.beta_end == (betas or PUBLIC_BETAS)[1]
    scaled = NoiseSchedule.linear(500)
    assert abs(float(schedule.s[250] / scaled.s[250]) - 1) > 0.1


@pytest.mark.parametrize(
    ("outputs", "name", "asked", "chosen"),
    [
        (1002, "cdm.pt", None, "linear"),
        (1000, "cdm.pt", None, "ot"),
        (7, "mode=training_dataset=CIFAR10_noise_steps=5_last_epoch", None, "linear"),
        (7, "mode=FM_training_dataset=CIFAR10_noise_steps=7_last_epoch", None, "ot"),
        (7, "cdm.pt", "ot", "ot"),
        (1000, "cdm.pt", "uniform", "uniform"),
    ],
)
def test_the_schedule_is_told_by_what_can_be_seen(tmp_path, outputs, name, asked, chosen):
    state = {"linear_layer.weight": torch.zeros(outputs, 4)}
    found, told = choose_schedule(state, asked, tmp_path / name)
    assert found == chosen and chosen in told
    assert ("though" in told) == (outputs == 1000 and asked == "uniform")


def test_a_schedule_that_nothing_tells_is_asked_for(tmp_path):
    file = save_public(tmp_path / "cdm.pt", make_state())
    with pytest.raises(UserError, match="7 outputs.*--schedule ot.*give --schedule") as caught:
        convert(file, tmp_path / "run", image_size=SIZE)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="go with --schedule linear"):
        convert(file, tmp_path / "run", schedule="ot", betas=(1e-4, 0.02), image_size=SIZE)


def test_flow_matching_keeps_sigma_min(tmp_path, images):
    """Their eps_hat at the level next to the data, times 1 - (1 - sigma_min) t: 9 % low without sigma_min."""
    torch.manual_seed(0)
    network = UNet(
        SIZE,
        CHANNELS,
        1000,
        base_channels=BASE,
        multipliers=MULTIPLIERS,
        blocks_per_level=BLOCKS,
        attention_resolutions=(SIZE // 2,),
        dropout=0.0,
    )
    file = save_public(tmp_path / "cdm.pt", network.state_dict())
    convert(file, tmp_path / "run", image_size=SIZE)
    model = load(tmp_path / "run")
    for level in (1, 500, 998):
        x = images.clone().requires_grad_()
        logits = public_logits(network.state_dict(), x)
        index = 999 - level  # theirs
        gradient = torch.autograd.grad((logits[:, 0] - logits[:, index]).sum(), x)[0]
        theirs = (1 - (1 - 1e-4) * index / 999) * (gradient + images)
        with torch.no_grad():
            torch.testing.assert_close(model.denoise(images, level), theirs, rtol=1e-3, atol=1e-6)
    assert float(model.schedule.s[1]) == pytest.approx(1.10090e-3, rel=1e-4)


def with_prefix(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (lambda s: {"ema_model_state_dict": s}, "no model_state_dict"),
        (lambda s: {"model_state_dict": s, "epoch": 3}, "no ema_model_state_dict"),
        (lambda s: s, "no model_state_dict: its state_dict stands for both"),
        (with_prefix("module."), "its state_dict"),
        (with_prefix("module.module."), "its state_dict"),
        (with_prefix("_orig_mod."), "its state_dict"),
        (with_prefix("module._orig_mod."), "its state_dict"),
        (lambda s: {"ema_model_state_dict": with_prefix("_orig_mod.module.")(s)}, "no model_state_dict"),
    ],
)
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_part_of_a_file_stands_for_the_whole_and_says_so(tmp_path, content, note, container, images):
    state, file = make_state(), tmp_path / "weights.pt"
    held = content(state)
    if container == "torch":
        torch.save(held, file)
    elif all(isinstance(value, torch.Tensor) for value in held.values()):
        safetensors.torch.save_file(held, file)  # under a name that says otherwise
    else:
        pytest.skip("safetensors hold tensors alone")
    converted = convert(file, tmp_path / "run", schedule="linear", image_size=SIZE)
    assert any(note in told for told in converted.assumed)
    with torch.no_grad():
        for weights in ("ema", "raw"):
            logits = load(tmp_path / "run", weights=weights).logits(images)
            torch.testing.assert_close(logits, public_logits(state, images), rtol=1e-4, atol=1e-4)


def test_names_that_differ_in_a_prefix_alone_are_refused(tmp_path):
    state = make_state()
    torch.save({**state, **with_prefix("module.")(state)}, tmp_path / "cdm.pt")
    with pytest.raises(UserError, match="differ only in `module.`"):
        convert(tmp_path / "cdm.pt", tmp_path / "run", schedule="linear", image_size=SIZE)


def test_the_paper_protocol_is_the_public_codes(tmp_path):
    """Their `calc_nll` (cdm.py), given labels, on x = (u/255 - 0.5)/0.5, with 7 added."""
    state = make_state(num_classes=4)
    convert(save_public(tmp_path / "cdm.pt", state), tmp_path / "run", schedule="linear", image_size=SIZE)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, CHANNELS, SIZE, SIZE), generator=generator).to(torch.uint8)
    labels = torch.tensor([0, 1, 2, 3, 3, 1])
    x = (images.float() / 255 - 0.5) / 0.5
    f, d = public_logits(state, x, labels), x[0].numel()
    log_likelihood = -(d / 2) * math.log(2 * math.pi) - 0.5 * (x**2).sum((1, 2, 3)) + f[:, 0] - f[:, -1]
    theirs = -float(log_likelihood.mean()) / d / math.log(2) + 7
    data = ImageData(images, labels, 256, 4, "made up", "test", pixels="points")
    model = load(tmp_path / "run")
    report = evaluate(model, data, draws=1, protocol="paper", given="label", check_levels=0)
    assert report.bits_per_dim == pytest.approx(theirs, abs=1e-5)
    other = evaluate(model, data, draws=1, protocol="paper", check_levels=0)
    assert abs(other.bits_per_dim - theirs) > 1e-4  # the null class is another one


def test_converting_leaves_the_callers_random_numbers_alone(tmp_path):
    file = save_public(tmp_path / "cdm.pt", make_state())
    before = torch.get_rng_state()
    convert(file, tmp_path / "run", schedule="linear", image_size=SIZE)
    assert torch.equal(torch.get_rng_state(), before)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def drop(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def replace(name, value):
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(drop("conv_in.weight"), "no tensor conv_in.weight", id="no-conv-in"),
        pytest.param(drop("down.0.block.0.norm1.bias"), "norm1.bias is absent", id="a-tensor-is-missing"),
        pytest.param(replace("extra", torch.ones(1)), "extra is \\(1,\\), and absent", id="an-extra-tensor"),
        pytest.param(
            replace("mid.block_1.conv1.bias", torch.ones(3)), "conv1.bias is \\(3,\\)", id="wrong-shape"
        ),
        pytest.param(
            replace("norm_out.weight", torch.full((BASE,), math.nan)), "norm_out.weight holds NaN", id="nan"
        ),
        pytest.param(
            replace("norm_out.weight", [1.0]), "not a dict of names and dense tensors", id="not-a-tensor"
        ),
    ],
)
def test_another_network_is_named_in_one_line(tmp_path, damage, message):
    file = save_public(tmp_path / "cdm.pt", damage(make_state()))
    with pytest.raises(UserError, match=message) as caught:
        convert(file, tmp_path / "run", schedule="linear", image_size=SIZE)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def write_truncated(path):
    save_public(path, make_state())
    path.write_bytes(path.read_bytes()[:2000])


def write_truncated_safetensors(path):
    safetensors.torch.save_file(make_state(), path)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(lambda path: None, "no such file", id="missing"),
        pytest.param(lambda path: path.write_bytes(b""), "not a whole zip file", id="empty"),
        pytest.param(lambda path: path.write_text("not a checkpoint"), "not a whole zip file", id="text"),
        pytest.param(write_truncated, "not a whole zip file", id="truncated"),
        pytest.param(lambda path: torch.save(Malicious(), path), "wants to execute code", id="executes-code"),
        pytest.param(
            lambda path: torch.save({"weights": {}}, path),
            "holds weights: neither model_state_dict nor ema",
            id="other-keys",
        ),
        pytest.param(lambda path: torch.save([1.0], path), "holds a list", id="a-list"),
        pytest.param(lambda path: torch.save(torch.ones(3), path), "holds a Tensor", id="a-tensor"),
        pytest.param(lambda path: torch.save({}, path), "holds an empty dict", id="empty-dict"),
        pytest.param(write_truncated_safetensors, "is damaged", id="truncated-safetensors"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, capsys, write, message):
    file = tmp_path / "cdm.pt"
    write(file)
    with pytest.raises(UserError, match=message) as caught:
        read_public(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_an_image_size_that_cannot_be_guessed_is_asked_for(tmp_path):
    with torch.device("meta"):
        state = UNet(
            SIZE,
            CHANNELS,
            LEVELS,
            base_channels=BASE,
            multipliers=MULTIPLIERS,
            blocks_per_level=BLOCKS,
            attention_resolutions=(),
        ).state_dict()
    with pytest.raises(UserError, match="attends at 0 resolutions.*give --image-size"):
        infer_config(state, "linear", None, "file")


def test_an_image_size_that_does_not_fit_is_refused(tmp_path):
    file = save_public(tmp_path / "cdm.pt", make_state())
    with pytest.raises(UserError, match="9x9"):
        convert(file, tmp_path / "run", schedule="linear", image_size=9)
    assert not (tmp_path / "run").exists()


def test_an_existing_directory_is_not_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("")
    with pytest.raises(UserError, match="exists already"):
        convert(save_public(tmp_path / "cdm.pt", make_state()), tmp_path / "run", image_size=SIZE)
