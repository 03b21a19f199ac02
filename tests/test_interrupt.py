"""Ctrl-C and SIGTERM are not lost, wherever they come."""

import signal
import threading
from collections.abc import Iterator

import pytest

from lop.interrupt import Interrupted, interruptible

NUMBERS = [signal.SIGINT, signal.SIGTERM]


class Drops:
    """Python ignores what is raised while it is finalised."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self) -> None:
        signal.raise_signal(self._number)


def interrupted(number: int) -> None:
    with interruptible():
        Drops(number)  # Finalised at once.
        threading.Event().wait(60)


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Tests may run in the background of a shell, which has its jobs ignore SIGINT."""
    kept = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_python_drops_is_asked_for_again(number: int) -> None:
    with pytest.raises(Interrupted) as caught:
        interrupted(number)
    assert caught.value.code == 128 + number


@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_signal_does_not_cut_an_end_in_order_short(number: int) -> None:
    ended = False

    def run() -> None:
        nonlocal ended
        with interruptible():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)
                ended = True

    with pytest.raises(Interrupted):
        run()
    assert ended
