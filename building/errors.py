"""What keeps kernels from being built."""


class NotPossible(Exception):
    """Some kernels cannot be built here: one line with the reason and what to do."""
