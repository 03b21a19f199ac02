import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger, read_ledger
from lop.search.loop import run_search
from lop.search.racing import Candidate
from lop.search.tree import SearchTree
from lop.space.allocation import Allocation, uniform
from tests.lop.search.test_tree import OPTIONS, SPACE, score

TARGETS = (0.2, 0.5, 0.6)


def make_trees() -> dict[float, SearchTree]:
    return {
        target: SearchTree(
            SPACE,
            [uniform(SPACE, SPACE.budget(target))],
            OPTIONS,
            seed=(0, SPACE.budget(target)),
            reward=lambda result: result.accuracy,
        )
        for target in TARGETS
    }


class RandomWorkers:
    """Evaluates any number at a time, and hands results back in any order; may break after some."""

    def __init__(
        self,
        seed: int,
        capacity: int,
        most: int | None = None,
        *,
        score: Callable[[Allocation], Evaluation] = score,
    ) -> None:
        self.capacity = capacity
        self.counts: Counter[Allocation] = Counter()
        self._random = np.random.default_rng(seed)
        self._most = most
        self._score = score
        self._waiting: list[Allocation] = []

    @property
    def alive(self) -> int:
        return self.capacity

    def expect(self, most: int) -> None:
        self.expected = most

    def submit(self, candidate: Candidate) -> None:
        self._waiting.append(candidate.allocation)

    def collect(self, seconds: float) -> list[tuple[Allocation, Evaluation]]:
        assert len(self._waiting) <= self.expected
        self._random.shuffle(self._waiting)  # type: ignore[arg-type]
        count = int(self._random.integers(1, len(self._waiting) + 1))
        done, self._waiting = self._waiting[:count], self._waiting[count:]
        self.counts.update(done)
        if self._most is not None and self.counts.total() > self._most:
            raise KeyboardInterrupt
        return [(allocation, self._score(allocation)) for allocation in done]


def outcome(trees: dict[float, SearchTree]) -> list[object]:
    return [(target, tree.best, list(tree.results.items())) for target, tree in trees.items()]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], set[tuple[Allocation, Evaluation]]]:
    path = tmp_path_factory.mktemp("calm") / "ledger"
    trees = make_trees()
    with Ledger(path, {}) as ledger:
        run_search(trees.values(), RandomWorkers(0, 1), ledger)
    return outcome(trees), set(read_ledger(path))


@given(st.integers(0, 2**31), st.integers(1, 50))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_workers_change_only_the_time(
    tmp_path: Path, calm: tuple[list[object], set[tuple[Allocation, Evaluation]]], seed: int, capacity: int
) -> None:
    path = tmp_path / "ledger"
    shutil.rmtree(path, ignore_errors=True)
    trees, workers = make_trees(), RandomWorkers(seed, capacity)
    with Ledger(path, {}) as ledger:
        run_search(trees.values(), workers, ledger)
    assert (outcome(trees), set(read_ledger(path))) == calm
    assert max(workers.counts.values()) == 1


@given(st.lists(st.integers(0, 110), min_size=1, max_size=4))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_interrupted_search_ends_as_a_calm_one(
    tmp_path: Path, calm: tuple[list[object], set[tuple[Allocation, Evaluation]]], stops: list[int]
) -> None:
    path = tmp_path / "ledger"
    shutil.rmtree(path, ignore_errors=True)
    for seed, most in enumerate(stops):
        with Ledger(path, {}) as ledger, suppress(KeyboardInterrupt):
            run_search(make_trees().values(), RandomWorkers(seed, 3, most), ledger)
    known = {allocation for allocation, _ in read_ledger(path)}
    trees, workers = make_trees(), RandomWorkers(9, 3)
    with Ledger(path, {}) as ledger:
        run_search(trees.values(), workers, ledger)
    assert (outcome(trees), set(read_ledger(path))) == calm
    assert not known & set(workers.counts)
