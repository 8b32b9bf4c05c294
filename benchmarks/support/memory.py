"""Peak resident memory of a process."""

from pathlib import Path


def peak_resident_mib() -> float:
    """The most memory that this process has had resident so far, in MiB (Linux).

    Not `getrusage().ru_maxrss`: a child process starts with its parent's, which hides its own.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / 2**10
