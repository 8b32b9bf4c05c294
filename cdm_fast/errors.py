"""The one kind of error a user can cause."""


class UserError(ValueError):
    """A bad file or value: one line that names it and says what to do.

    The command line prints the message and exits with status 2; it never shows a traceback for it.
    """
