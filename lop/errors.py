"""The exceptions that a user is meant to read, and how others are told in one line."""


class LopError(Exception):
    """Something the user can mend: the message names the bad value and what would be right, in one line."""


class CancelledError(LopError):
    """Whoever asked for something has asked to stop it; nothing of it is left behind."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something; where none does, the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
