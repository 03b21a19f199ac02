"""Rich's console as LOP's tables use it."""

from rich.console import Console


class PlainConsole(Console):
    """Leaves it to the command line what happens when the reader of a pipe has left, as for every other output."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles a `BrokenPipeError`; rich's own ends the process with 1."""
        raise
