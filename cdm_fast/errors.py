"""The errors that a user can put right."""


class UserError(ValueError):
    """A bad file or value: one line that names it and says what to do.

    The command line prints the message and exits with status 2; it never shows a traceback for it.
    """


class DiskError(UserError):
    """The system refused to write (no space, no permission): training warns and tries again later."""


def require_at_least(name: str, value: int, least: int) -> None:
    """Raises UserError where `value` is below `least`; `name` is what the user knows it by."""
    if value < least:
        raise UserError(f"{name} is {value}; give {least} or more")
