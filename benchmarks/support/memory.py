"""Resident memory of this process (Linux)."""

from pathlib import Path


def peak_resident_mib() -> float:
    """The most memory that this process has had resident so far, in MiB.

    Not `getrusage().ru_maxrss`: a child process starts with its parent's, which hides its own.
    """
    return _status_mib("VmHWM")


def anonymous_mib() -> float:
    """Resident memory that belongs to no file, in MiB."""
    return _status_mib("RssAnon")


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kib) / 2**10
