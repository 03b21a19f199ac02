"""The fleet with real actors: late, slow, dying and failing ones change nothing but the time."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from lop.errors import LopError
from lop.search.evaluation import Evaluation, Scorer
from lop.search.ledger import Ledger, read_ledger
from lop.search.loop import InProcess, run_search
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from ray_jobs.fleet import Fleet
from tests.lop.search.test_loop import make_trees, outcome
from tests.lop.search.test_tree import score
from tests.ray_jobs.waiting import wait_for

Outcome = tuple[list[object], list[tuple[Allocation, Evaluation]]]
pytestmark = pytest.mark.usefixtures("ray_cluster")


class Slow:
    """Takes a different time in each process."""

    def __init__(self) -> None:
        self._seconds = random.Random(os.getpid()).uniform(0.001, 0.02)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        allocation = candidate.allocation
        time.sleep(self._seconds)
        return score(allocation)


class Held:
    """Evaluates nothing until a file is there."""

    def __init__(self, gate: Path) -> None:
        self._gate = gate

    def evaluate(self, candidate: Candidate) -> Evaluation:
        allocation = candidate.allocation
        wait_for(self._gate.exists, "the gate")
        time.sleep(0.01)
        return score(allocation)


class FailsTwice:
    """Raises for the first two times that any process evaluates an allocation, or one of `every` so many."""

    def __init__(self, folder: Path, times: int = 2, every: int = 1) -> None:
        self._folder, self._times, self._every = folder, times, every

    def evaluate(self, candidate: Candidate) -> Evaluation:
        allocation = candidate.allocation
        if zlib.crc32(repr(allocation.widths).encode()) % self._every:
            return score(allocation)
        tries = self._folder / "-".join(map(str, allocation.widths))
        with tries.open("a") as file:
            file.write("x")
        if tries.stat().st_size <= self._times:
            raise MemoryError("out of memory on purpose")
        return score(allocation)


WARM_UP = Allocation((64, 64, 64, 64, 64))


class BadIn:
    """Raises in one process, the first to be asked anything but `WARM_UP`."""

    def __init__(self, folder: Path) -> None:
        self._claim = folder / "bad"

    def evaluate(self, candidate: Candidate) -> Evaluation:
        allocation = candidate.allocation
        if allocation == WARM_UP:
            return score(allocation)
        try:
            with self._claim.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            pass
        if self._claim.read_text() == str(os.getpid()):
            raise MemoryError("this card is full")
        time.sleep(0.01)
        return score(allocation)


class CannotUnpickleError(Exception):
    """Goes to another process, and does not come back to life there."""

    def __init__(self, card: int, hint: str) -> None:
        super().__init__(f"card {card}: {hint}")


class RaisesUnpicklable:
    def evaluate(self, candidate: Candidate) -> Evaluation:
        raise CannotUnpickleError(3, "fell off the bus")


def _missing() -> Callable[[], Scorer]:
    raise ModuleNotFoundError("no module named lop")


class CannotUnpickle:
    """A factory that the driver can send and no actor can receive."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _missing, ()

    def __call__(self) -> Scorer:
        return Slow()


class Breaks:
    def __init__(self) -> None:
        raise FileNotFoundError("no such model folder")


class Dies:
    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        raise AssertionError


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    path = tmp_path_factory.mktemp("calm") / "ledger"
    trees = make_trees()
    with Ledger(path, {}) as ledger:
        run_search(trees.values(), InProcess(cast(Any, Slow())), ledger)
    return outcome(trees), sorted(read_ledger(path))


def searched(path: Path, fleet: Fleet) -> Outcome:
    trees = make_trees()
    with Ledger(path, {}) as ledger:
        run_search(trees.values(), fleet, ledger)
    return outcome(trees), sorted(read_ledger(path))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_actors_changes_nothing(tmp_path: Path, calm: Outcome, count: int) -> None:
    with Fleet(Slow, count=count) as fleet:
        assert searched(tmp_path / "ledger", fleet) == calm


def test_killed_actors_are_replaced(tmp_path: Path, calm: Outcome) -> None:
    gate = tmp_path / "gate"
    with Fleet(partial(Held, gate), count=2) as fleet, _killing(fleet, gate) as killed:
        assert searched(tmp_path / "ledger", fleet) == calm
    assert killed


@contextmanager
def _killing(fleet: Fleet, gate: Path) -> Iterator[list[int]]:
    """Kills a random actor of the fleet with SIGKILL, up to four times; opens the gate after the first."""
    done, killed = threading.Event(), list[int]()

    def kill() -> None:
        while not done.wait(0.3):
            if fleet.pids and len(killed) < 4:
                pid = random.choice(fleet.pids)
                try:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    gate.touch()
                except ProcessLookupError:
                    continue

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def test_an_evaluation_that_fails_twice_is_tried_a_third_time(tmp_path: Path, calm: Outcome) -> None:
    (tmp_path / "tries").mkdir()
    with Fleet(partial(FailsTwice, tmp_path / "tries", every=40), count=2) as fleet:
        assert searched(tmp_path / "ledger", fleet) == calm
    assert any((tmp_path / "tries").iterdir())


def stumbles(mark: Path) -> Scorer:
    """Cannot be built the first time."""
    if not mark.exists():
        mark.touch()
        raise AttributeError("partially initialized module")
    return Slow()


def test_a_worker_that_stumbles_once_at_its_start_is_replaced(tmp_path: Path, calm: Outcome) -> None:
    with Fleet(partial(stumbles, tmp_path / "mark"), count=1) as fleet:
        assert searched(tmp_path / "ledger", fleet) == calm


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Breaks, "could not be set up: FileNotFoundError: no such model folder"),
        (CannotUnpickle(), "could not be set up: ModuleNotFoundError: no module named lop"),
        (Dies, "died before they could evaluate anything"),
    ],
)
def test_workers_that_cannot_start_are_named(tmp_path: Path, build: Callable[[], Scorer], message: str) -> None:
    with Fleet(build, count=1) as fleet, pytest.raises(LopError, match=message):
        searched(tmp_path / "ledger", fleet)


def test_three_failures_name_the_allocation(tmp_path: Path) -> None:
    (tmp_path / "tries").mkdir()
    build = partial(FailsTwice, tmp_path / "tries", times=99)
    message = r"allocation \([\d, ]+\) failed 3 times: MemoryError: out of memory on purpose$"
    with Fleet(build, count=2) as fleet, pytest.raises(LopError, match=message):
        searched(tmp_path / "ledger", fleet)
    assert list(read_ledger(tmp_path / "ledger")) == []


def test_an_exception_that_cannot_be_unpickled_is_a_failure_like_any_other(tmp_path: Path) -> None:
    with Fleet(RaisesUnpicklable, count=1) as fleet, pytest.raises(LopError, match="card 3: fell off the bus"):
        searched(tmp_path / "ledger", fleet)


def test_a_failed_evaluation_is_tried_on_another_actor(tmp_path: Path, calm: Outcome) -> None:
    with Fleet(partial(BadIn, tmp_path), count=2) as fleet:
        _wait_for_all(fleet, 2)
        assert searched(tmp_path / "ledger", fleet) == calm


def _wait_for_all(fleet: Fleet, count: int) -> None:
    """Keeps the fleet busy until all its actors are ready: it finds out only while it waits for a result."""
    waiting = 0
    while waiting or len(fleet.pids) < count:
        if not waiting:
            fleet.submit(Candidate(WARM_UP))
            waiting += 1
        waiting -= len(fleet.collect(1))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "http://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_cannot_be_reached_is_named(address: str) -> None:
    script = "import ray_jobs.cluster as cluster\nwith cluster.connected(): pass"
    environment = {**os.environ, "RAY_ADDRESS": address}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert ended.returncode == 1
    assert f"LopError: no Ray cluster at {address}: " in ended.stderr.splitlines()[-1]
