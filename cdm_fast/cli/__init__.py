"""The command line, `cdm-fast`."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; see `entry.main`, which is imported here.

    argv: the arguments; None takes those of the process, and then Ctrl-C during imports ends the process.
    """
    if argv is not None:
        from cdm_fast.cli.entry import main

        return main(argv)
    from cdm_fast.cli.interrupt import dies_of_interrupt

    with dies_of_interrupt():
        from cdm_fast.cli.entry import main

        return main()
