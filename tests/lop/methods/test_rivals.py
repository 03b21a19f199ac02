import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.methods.evolution import OFFSPRING, ROUNDS, evolve, mutate
from lop.space.allocation import Allocation, Space, uniform


@given(st.integers(0, 10_000), st.floats(0, 0.85), st.none() | st.floats(1, 2))
def test_a_mutation_keeps_the_budget_and_the_limits(seed: int, target: float, ratio: float | None) -> None:
    random = np.random.default_rng(seed)
    space = Space(3, 24, 4, 0.9, ratio)
    allocation = uniform(space, space.budget(min(target, space.max_target)))
    for _ in range(10):
        child = mutate(allocation, space, random, step=4)
        assert child.budget == allocation.budget
        most = space.max_width(allocation.budget)
        assert all(space.min_width <= width <= most and width % 4 == 0 for width in child.widths)
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
