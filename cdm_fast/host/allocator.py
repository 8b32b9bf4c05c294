"""What the C library does with memory that is freed."""

import ctypes
import os
import sys

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Larger blocks are mapped one by one and go back to the system; the largest that glibc itself adapts to.
MAPPED_BYTES = 32 << 20
KEPT_BYTES = 2**31 - 1  # of the heap's end, the most that mallopt's int can say
OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Makes this process keep up to 2 GiB of freed memory, for tensors to come; returns whether it does.

    A training step frees all its activations at its end, and glibc then returns the end of its heap to the
    system. The next step gets the same memory back page by page: on Fashion-MNIST some 10,000 page faults
    (`benchmarks/bench_allocator.py`). The peak of memory is the same. Nothing changes with another C library
    than glibc, and where the environment has settings of its own.
    """
    set_outside = any(name in os.environ for name in OWN_SETTINGS)
    if sys.platform != "linux" or set_outside or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        os.confstr("CS_GNU_LIBC_VERSION")  # musl has no such name
    except (AttributeError, OSError, ValueError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
