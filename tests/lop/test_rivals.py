from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.allocation import Allocation, Space, uniform
from lop.errors import LopError
from lop.evolution import OFFSPRING, ROUNDS, evolve, mutate
from lop.sensitivity import best_additive, damage_table, scan, scan_widths

SPACE = Space(3, 24, 4, 0.9)


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


@given(st.integers(0, 10_000), st.floats(0, 0.85))
def test_a_mutation_keeps_the_budget_and_the_limits(seed: int, target: float) -> None:
    random = np.random.default_rng(seed)
    allocation = uniform(SPACE, SPACE.budget(min(target, SPACE.max_target)))
    for _ in range(10):
        child = mutate(allocation, SPACE, random, step=4)
        assert child.budget == allocation.budget
        assert all(SPACE.min_width <= width <= SPACE.neurons and width % 4 == 0 for width in child.widths)
        allocation = child


def test_evolution_spends_what_it_is_given_and_climbs() -> None:
    space = Space(6, 64, 4, 0.9)
    weights = np.linspace(1, 0.1, 6)
    asked: list[float] = []

    def worth(allocation: Allocation, share: float) -> tuple[float]:
        asked.append(share)
        return (float(weights @ np.array(allocation.widths)),)

    start = uniform(space, space.budget(0.5))
    steps = list(evolve(start, space, worth, evaluations=61, seed=(1,), step=4))
    assert sum(asked) == pytest.approx(steps[-1].spent) == pytest.approx(61)
    assert asked[1 : 2 + OFFSPRING] == [ROUNDS[0].share] * OFFSPRING + [ROUNDS[1].share]
    worths = [step.worth for step in steps]
    assert worths == sorted(worths)
    assert worths[-1] > worths[0]
    assert {step.best.budget for step in steps} == {start.budget}
    again = list(evolve(start, space, worth, evaluations=61, seed=(1,), step=4))
    assert again == steps
