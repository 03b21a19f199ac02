"""The one exception that a user is meant to read."""


class LopError(Exception):
    """Something the user can mend: the message names the bad value and what would be right, in one line."""
