"""The errors that a user can fix."""


class UserError(ValueError):
    """A bad file or value: one line that names it and says what to do.

    The command line prints the message and exits with status 2; it never shows a traceback for it.
    """


class DiskError(UserError):
    """Writing failed (no space, no permission): training warns and tries again later."""


def require_at_least(name: str, value: int, least: int) -> None:
    """Raises UserError if `value` is below `least`; `name` is the name that the user knows."""
    if value < least:
        raise UserError(f"{name} is {value}; give {least} or more")
