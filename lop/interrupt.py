"""Ctrl-C and SIGTERM: what runs ends in order, and its exit code says by which."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SECONDS_TO_END = 5.0
_SECONDS_TO_ASK_AGAIN = 0.05


class Interrupted(KeyboardInterrupt):
    """The signal of that number has asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    @property
    def code(self) -> int:
        """The exit code, as shells count."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted` inside the block: the first that comes does.

    What ends in order is not cut short by an impatient second one, nor by a shell that signals twice; one that comes
    after five seconds ends the process where it is. Where Python drops what a handler raises (in a finaliser, or after
    a fork), the process is asked again. Outside the main thread, which alone gets signals, and for a SIGINT
    that is ignored, as a shell has it for what runs in the background, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[float] = []
    dropped: list[Interrupted] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        if len(asked) == 1 or dropped:
            dropped.clear()
            raise Interrupted(number)
        if asked[-1] - asked[0] > _SECONDS_TO_END:
            os._exit(128 + number)

    tell = sys.unraisablehook

    def look(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            tell(unraisable)
            return
        dropped.append(unraisable.exc_value)
        # Not from here: what is raised within this hook would be dropped, too.
        again = threading.Timer(_SECONDS_TO_ASK_AGAIN, os.kill, (os.getpid(), unraisable.exc_value.number))
        again.daemon = True
        again.start()

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    changed = [number for number, handler in kept.items() if handler not in (signal.SIG_IGN, None)]
    for number in changed:
        signal.signal(number, handle)
    sys.unraisablehook = look
    try:
        yield
    finally:
        sys.unraisablehook = tell
        if not asked:  # Else the process is about to end.
            for number in changed:
                signal.signal(number, kept[number])
