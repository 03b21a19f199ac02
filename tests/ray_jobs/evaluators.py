"""Cheap evaluators that fail in the ways that real ones do; every result is a function of the allocation alone."""

import os
import signal
import time
import zlib
from pathlib import Path

from lop.search.evaluation import Evaluation
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from tests.lop.search.test_tree import score


class Logged:
    """Takes `seconds`, and writes down each allocation that it has evaluated."""

    def __init__(self, log: Path, seconds: float = 0.01) -> None:
        self._log, self._seconds = log, seconds

    def evaluate(self, candidate: Candidate) -> Evaluation:
        allocation = candidate.allocation
        time.sleep(self._seconds)
        with self._log.open("a") as file:
            file.write("-".join(map(str, allocation.widths)) + "\n")
        return score(allocation)


def trouble(allocation: Allocation) -> str:
    """What is wrong with an allocation; about one in seven has something."""
    kinds = {0: "raises", 1: "dies", 2: "hangs"}
    return kinds.get(zlib.crc32(repr(allocation.widths).encode()) % 20, "")


SECONDS = 3.0
ERRORS = {
    "raises": "MemoryError: out of memory on purpose",
    "dies": "its worker died each time",
    "hangs": f"it took longer than {SECONDS:g} s",
}


class Troubled:
    """Some allocations cannot be evaluated, each in its own way."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        allocation = candidate.allocation
        kind = trouble(allocation)
        if kind == "raises":
            raise MemoryError("out of memory on purpose")
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hangs":
            time.sleep(3600)
        return score(allocation)


class CalmlyTroubled:
    """What `Troubled` comes to in the end."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        allocation = candidate.allocation
        kind = trouble(allocation)
        return Evaluation.failed(ERRORS[kind]) if kind else score(allocation)
