"""The exceptions that a user is meant to read."""


class LopError(Exception):
    """Something the user can mend: the message names the bad value and what would be right, in one line."""


class CancelledError(LopError):
    """Whoever asked for something has asked to stop it; nothing of it is left behind."""
