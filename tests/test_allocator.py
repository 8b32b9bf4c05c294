"""Freed memory that a process keeps: page faults of repeated work, and settings that are left alone."""

import os
import subprocess
import sys

import pytest

# Page faults of each repetition after the first: 50 blocks of 1 MiB that are written and freed together.
PROGRAM = """
import resource, sys
from cdm_fast.host.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "kept" else False)
import numpy
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [numpy.full(2**17, 1.0) for _ in range(50)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(6)][2:])
"""
BLOCK_PAGES = 50 * 2**20 // 4096


def of_process(mode, **environment):
    """(whether memory is kept, page faults of four repetitions)."""
    kept, faults = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return kept == "True", eval(faults)


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc"
)


def test_kept_memory_needs_no_page_faults():
    kept, faults = of_process("kept")
    assert kept and max(faults) < BLOCK_PAGES / 100
    assert min(of_process("returned")[1]) > BLOCK_PAGES / 2


@pytest.mark.parametrize("setting", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_settings_of_the_environment_stay(setting):
    assert not of_process("kept", **{setting: "131072"})[0]


def test_tunables_of_malloc_stay():
    assert not of_process("kept", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0]
    assert of_process("kept", GLIBC_TUNABLES="glibc.elision.enable=0")[0]
