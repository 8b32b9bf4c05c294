"""The command line, `cdm-fast`."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; see `entry.main`, which is imported here."""
    from cdm_fast.cli.entry import main

    return main(argv)
