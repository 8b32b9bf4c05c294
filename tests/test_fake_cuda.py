"""Launches, copies and waits of the CIFAR-10 preset's steps, samplers and likelihoods, on fake CUDA tensors.

    TRITON_INTERPRET=1 python -m tests.fake_cuda_runs /tmp/cache step

prints what a step launches, copies and waits for. The numbers below are what it is today: a change that
alters them is seen here, and writes the new ones down.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from building.host_compiler import compiler

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(torch.version.cuda is not None, reason="a stand-in for a PyTorch without CUDA"),
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
]

LAUNCHES = {
    "step": 1497,
    "step of a joint head": 866,
    "step of a transformer": 1575,
    "record": 35,
    "ddim": 2638,
    "ddpm": 1318,
    "dpm_solver_pp_2m": 1315,
    "heun": 2280,
    "mala": 19010,
    "smc": 20501,
    "guided": 1442,
    "guided joint": 1414,
    "log_prob": 331,
    "nll": 2079,
}
PILOT = {
    "aten::_local_scalar_dense at sampling/langevin.py": 36
}  # 20 + 4 moves each set the next one's step size
WAITS = {
    "mala": PILOT,
    # Each of 4 levels asks two numbers at once whether to resample; fake tensors answer one by one.
    "smc": {
        "aten::_local_scalar_dense at sampling/langevin.py": 36 + 8,
        "copy to the host at sampling/langevin.py": 1,
    },
    # The values of each draw, and those that tell what bf16 costs.
    "nll": {"copy to the host at likelihood/single_pass.py": 2 + 1},
}
# Copies of a step. Between fp32 and bf16: activations where full precision begins and ends, folded kernels.
STEP_COPIES = {
    "bfloat16": 36,
    "float32": 10,
    "float32 -> bfloat16": 10,
    "bfloat16 -> float32": 10,
    "float64 -> float32": 3,
    "int64": 1,
    "bool -> float32": 1,
    "float32 -> float64": 1,
    "float32 -> int64": 1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{run: {"launches": {op: n}, "ops": ..., "copies": ..., "syncs": ..., "sites": ...}}"""
    return _run(tmp_path_factory.mktemp("fake_cuda"), "tests.fake_cuda_runs")


def _run(cache, program, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", program, str(cache), "json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def total(record):
    return sum(record["launches"].values())


def test_a_step_launches_what_is_written_down(runs):
    step = runs["step"]
    print(f"a step launches {total(step)} kernels:", json.dumps(step["launches"], indent=1))
    assert total(step) <= 1500
    assert {name: total(record) for name, record in runs.items()} == LAUNCHES


def test_nothing_waits_but_what_must(runs):
    for name, record in runs.items():
        waits: dict[str, int] = {}
        for what, count in record["syncs"].items():
            where = what.rpartition(":")[0]
            waits[where] = waits.get(where, 0) + count
        assert waits == WAITS.get(name, {}), name


def test_a_step_copies_what_is_written_down(runs):
    assert runs["step"]["copies"] == STEP_COPIES


def test_every_op_runs_on_its_kernel(runs):
    kernels = {
        "noising",
        "noise_level_ce",
        "noise_level_ce_backward",
        "denoise_loss",
        "denoise_loss_backward",
        "head_cotangent",
        "head_cotangent_backward",
        "group_norm_silu",
        "group_norm_silu_backward",
        "group_norm_silu_vjp",
        "group_norm_silu_vjp_backward",
        "attention",
        "attention_vjp",
        "attention_vjp_backward",
    }
    assert kernels <= set(runs["step"]["ops"])
    of_tokens = {f"{op}{kind}" for op in ("rms_norm", "swiglu") for kind in ("", "_vjp", "_vjp_backward")}
    assert of_tokens | {"rms_norm_backward", "attention"} <= set(runs["step of a transformer"]["ops"])


def test_noise_is_one_launch_a_draw(runs):
    assert runs["ddpm"]["ops"]["image_normals"] == 4  # the start, and all steps but the last
    for counts in runs["ddpm"]["launches"], runs["mala"]["launches"]:
        assert not any("xor" in name for name in counts)  # plain Philox is full of them


def test_averaged_weights_are_cast_once_in_a_whole_run(runs):
    casts = sum(count for what, count in runs["ddim"]["copies"].items() if "->" in what)
    assert casts <= 4 * 16  # in 4 steps: of activations alone; autocast alone makes 1,194
    assert runs["ddim"]["launches"]["aten::_foreach_copy_"] <= 8


def test_the_stand_in_sees_what_a_gpu_would_do(tmp_path):
    seen = _run(tmp_path, "tests.fake_cuda_faults")
    assert set(seen["item"]["syncs"]) == {"aten::_local_scalar_dense at elsewhere"}
    assert set(seen["pageable copy"]["syncs"]) == {"blocking copy to the device at elsewhere"}
    assert set(seen["number made on the device"]["syncs"]) == {"blocking copy to the device at elsewhere"}
    assert set(seen["copy to the host"]["syncs"]) == {"copy to the host at elsewhere"}
    assert set(seen["index on the host"]["syncs"]) == {"index on the host at elsewhere"}
    assert set(seen["nonzero"]["syncs"]) == {"aten::nonzero at elsewhere"}
    assert seen["nonzero"]["error"] and seen["mixed devices"]["error"]
    assert seen["pinned copy"]["syncs"] == {}
    assert seen["pinned copy"]["launches"] == {"aten::_to_copy": 1}
    assert seen["views"]["launches"] == {}
    assert seen["host"]["launches"] == {} and seen["host"]["value"] == 6.0
    assert seen["plain op"]["launches"] == {"aten::mul": 1, "aten::add": 1}
    assert seen["cast"]["copies"] == {"float32 -> bfloat16": 1}
    assert seen["convolution"]["value"] == 0 and seen["convolution"]["launches"] == {"aten::convolution": 1}
    by_kernel = seen["convolution by a channels-last kernel"]  # as in cuDNN, the kernel's layout decides
    assert by_kernel["value"] == 1
    assert by_kernel["launches"] == {"copy before a convolution": 1, "aten::convolution": 1}
    # 130 tensors in two lists: 64 a launch; one of 330 blocks: 320 a launch.
    assert seen["many small tensors"]["launches"] == {"aten::_foreach_add_": 3}
    assert seen["one large tensor"]["launches"] == {"aten::_foreach_add_": 2}
