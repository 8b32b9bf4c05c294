"""The stand-in for CUDA finds what it is there to find, and lets right kernels pass, in every order."""

import re
import subprocess

import pytest

from tests.cuda_on_cpu import stand_in

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(stand_in.missing() is not None, reason=f"CUDA on the CPU: {stand_in.missing()}"),
]
RIGHT = ("reverse", "dynamic", "warp-sum", "packs", "copy", "grid-y-65535", "shared-232448")

# What each faulty kernel comes to in every order, without sanitizers.
FOUND = {
    "missing-barrier": r"wrong: out\[\d+\] = -?nan",  # memory that no thread has written yet
    "missing-second-barrier": r"wrong: out\[\d+\] = \d+",
    "unset-shared": r"wrong: out\[7\] = -?nan",
    "divergent-barrier": "fault: .*barrier at .*: thread 3 waits at",
    "barrier-after-return": "fault: .*barrier at .*: thread 5 has returned before it",
    "return-before-shuffle": "fault: .*warp shuffle at .*: thread 31 has returned before it",
    "shuffles-apart": "fault: .*warp shuffle at .*: thread 33 waits at",
    "partial-warp": "fault: .*warp shuffle at .*only for one-dimensional blocks of whole warps",
    "shared-write-beyond": "fault: .*a block wrote outside of its 512 bytes of shared memory",
    "dynamic-too-small": "fault: .*a block wrote outside of its 256 bytes of shared memory",
    "threads-1025": "error: invalid configuration argument",
    "no-blocks": "error: invalid configuration argument",
    "grid-y-65536": "error: invalid configuration argument",
    "shared-49153": "error: invalid configuration argument",
    "shared-232449": "error: invalid argument",
    "other-stream": "fault: .*another stream than PyTorch's current one",
    "no-device-guard": "fault: .*launch without a device guard",
}

# What the sanitizers report, in every order.
SANITIZED = {
    "shared-read-beyond": "AddressSanitizer: use-after-poison",
    "shared-write-beyond": "AddressSanitizer: use-after-poison",
    "dynamic-read-beyond": "AddressSanitizer: use-after-poison",
    "dynamic-too-small": "AddressSanitizer: use-after-poison",
    "global-read-beyond": "AddressSanitizer: heap-buffer-overflow",
    "misaligned-packs": "misaligned address",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return stand_in.build_faults(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    if stand_in.missing_sanitizer() is not None:
        pytest.skip(stand_in.missing_sanitizer())
    return stand_in.build_faults(tmp_path_factory.mktemp("sanitized"), sanitize=True)


def _run(program, kernel, order):
    done = subprocess.run([program, kernel, order], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.parametrize("order", stand_in.THREAD_ORDERS)
@pytest.mark.parametrize("kernel", RIGHT)
@pytest.mark.parametrize("build", ["plain", "sanitized"])
def test_right_kernels_pass(request, build, kernel, order):
    assert _run(request.getfixturevalue(build), kernel, order) == "ok\n"


@pytest.mark.parametrize("order", stand_in.THREAD_ORDERS)
@pytest.mark.parametrize(("kernel", "says"), FOUND.items(), ids=FOUND.keys())
def test_faults_are_found(plain, kernel, says, order):
    output = _run(plain, kernel, order)
    assert re.match(says, output), output


@pytest.mark.parametrize("order", stand_in.THREAD_ORDERS)
@pytest.mark.parametrize(("kernel", "says"), SANITIZED.items(), ids=SANITIZED.keys())
def test_sanitizers_find_accesses_that_are_out_of_bounds_or_misaligned(sanitized, kernel, says, order):
    output = _run(sanitized, kernel, order)
    assert says in output and "ok" not in output.splitlines(), output


@pytest.mark.parametrize(("order", "begins"), [("natural", "ok"), ("reversed", "wrong"), ("random", "wrong")])
def test_some_faults_need_another_order_to_be_seen(plain, order, begins):
    assert _run(plain, "reads-the-lane-before", order).startswith(begins)
