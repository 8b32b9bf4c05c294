"""The errors that a user can put right."""


class UserError(ValueError):
    """A bad file or value: one line that names it and says what to do.

    The command line prints the message and exits with status 2; it never shows a traceback for it.
    """


class DiskError(UserError):
    """The system refused to write (no space, no permission): training warns and tries again later."""
