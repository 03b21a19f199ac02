"""The sensitivity programme against hand-worked cases, brute force, and its own interrupted self."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lop.errors import LopError
from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger
from lop.search.sensitivity import best_additive, damage_table, measure_damages, scan, scan_widths
from lop.space.allocation import Allocation, Space
from tests.lop.search.test_loop import RandomWorkers

SPACE = Space(3, 24, 4, 0.9)


def judge(allocation: Allocation) -> Evaluation:
    """Damage grows with the square of what is cut, most in the first layer."""
    cut = 24 - np.array(allocation.widths)
    return Evaluation(0.5, -1.0, divergence=float(np.array([3, 1, 2]) @ cut**2))


def measured(path: Path, workers: RandomWorkers) -> np.ndarray:
    with Ledger(path, {}) as ledger:
        return measure_damages(SPACE, 3, workers, ledger)


@given(st.integers(0, 2**31), st.integers(1, 12), st.lists(st.integers(0, 8), max_size=3))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_scan_is_the_same_however_it_is_made(tmp_path: Path, seed: int, capacity: int, stops: list[int]) -> None:
    path = tmp_path / "ledger"
    shutil.rmtree(path, ignore_errors=True)
    for most in stops:
        with suppress(KeyboardInterrupt):
            measured(path, RandomWorkers(seed, capacity, most, score=judge))
    with Ledger(path, {}) as ledger:
        before = len(ledger)
    workers = RandomWorkers(seed, capacity, score=judge)
    table = measured(path, workers)
    # Nothing is lost, nothing is done twice; the measured widths are 4, 12 and 20.
    assert workers.counts.total() == 9 - before
    np.testing.assert_allclose(
        table[:, [0, 2, 4, 5]], [[3 * c**2 * w for c in (20, 12, 4, 0)] for w in (1, 1 / 3, 2 / 3)]
    )


def test_the_scan_prunes_one_layer_at_a_time() -> None:
    widths = scan_widths(SPACE, 2)
    assert widths == [4, 20]
    assert scan_widths(SPACE, 99) == [4, 8, 12, 16, 20]
    assert [a.widths for a in scan(SPACE, widths)] == [
        (4, 24, 24), (20, 24, 24), (24, 4, 24), (24, 20, 24), (24, 24, 4), (24, 24, 20),
    ]  # fmt: skip


def test_damages_between_measured_widths_are_linear() -> None:
    table = damage_table(SPACE, [4, 12], np.array([[8.0, 4.0], [0.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(table[0], [8, 6, 4, 8 / 3, 4 / 3, 0])
    np.testing.assert_allclose(table[2], [1, 1, 1, 2 / 3, 1 / 3, 0])


def test_the_programme_worked_by_hand() -> None:
    # Two layers of four units, each at least one; four to keep. Damage of keeping 1, 2, 3, 4 units:
    space = Space(2, 4, 1, 0.75)
    table = np.array([[9.0, 5.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    # 3 + 1 costs 1 + 3 = 4; 2 + 2 costs 7; 1 + 3 costs 10.
    assert best_additive(space, table, 4).widths == (3, 1)
    with pytest.raises(LopError, match="9 neurons"):
        best_additive(space, table, 9)


@given(st.integers(0, 10_000), st.integers(3, 18))
@settings(max_examples=50)
def test_the_programme_is_exact(seed: int, units: int) -> None:
    table = np.random.default_rng(seed).normal(size=(3, 6))

    def damage(widths: Sequence[int]) -> float:
        return float(sum(table[layer, width // 4 - 1] for layer, width in enumerate(widths)))

    budget = 4 * units
    found = best_additive(SPACE, table, budget)
    assert found.budget == budget
    best = min(damage(widths) for widths in product(range(4, 25, 4), repeat=3) if sum(widths) == budget)
    assert damage(found.widths) == pytest.approx(best)


@given(st.integers(0, 10_000), st.integers(3, 18), st.floats(1, 3))
@settings(max_examples=50)
def test_the_programme_keeps_to_the_widest_layer_allowed(seed: int, units: int, bound: float) -> None:
    space = replace(SPACE, max_width_ratio=bound)
    table = np.random.default_rng(seed).normal(size=(3, 6))
    found = best_additive(space, table, 4 * units)
    assert found.budget == 4 * units
    assert max(found.widths) <= space.max_width(4 * units)
