"""The greedy programme against the exact one for any damages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.errors import LopError
from lop.search.sensitivity import best_additive
from lop.space.allocation import Space
from lop.space.programme import least_damage, pruned_shares

SPACE = Space(4, 64, 8, 0.9)


def table(seed: int, space: Space = SPACE) -> np.ndarray:
    """Damages that grow ever faster, [L, n]."""
    random = np.random.default_rng(seed)
    steps = np.sort(random.exponential(size=(space.layers, len(pruned_shares(space)))), axis=1)
    return steps.cumsum(axis=1)


def cost(damages: np.ndarray, widths: tuple[int, ...], space: Space = SPACE) -> float:
    lost = [(space.neurons - width) // space.granularity for width in widths]
    return sum(damages[layer, count - 1] for layer, count in enumerate(lost) if count)


@given(st.integers(0, 10_000), st.floats(0, 0.875))
def test_no_allocation_of_the_budget_costs_less(seed: int, target: float) -> None:
    damages, budget = table(seed), SPACE.budget(target)
    found = least_damage(SPACE, damages, budget)
    exact = best_additive(SPACE, np.append(damages[:, ::-1], np.zeros((4, 1)), axis=1), budget)
    assert found.budget == budget
    assert cost(damages, found.widths) == pytest.approx(cost(damages, exact.widths))


def test_a_cap_holds_where_the_budget_can_be_met_and_gives_way_where_it_cannot() -> None:
    damages = table(0) * np.array([[1e-6], [1], [1], [1]])  # Of the first layer nothing is missed.
    free, capped = (least_damage(SPACE, damages, SPACE.budget(0.25), max_share=share) for share in (1.0, 0.5))
    assert free.widths[0] == SPACE.min_width
    assert capped.widths[0] == 32
    assert least_damage(SPACE, damages, SPACE.budget(0.5), max_share=0.25).budget == SPACE.budget(0.5)


def test_no_layer_is_wider_than_allowed() -> None:
    space = Space(4, 64, 8, 0.9, max_width_ratio=1.25)
    budget = space.budget(0.5)
    found = least_damage(space, table(1, space) * np.array([[1e-6], [1], [1], [1e6]]), budget)
    assert max(found.widths) <= space.max_width(budget)
    assert found.budget == budget


def test_a_budget_between_two_multiples_is_refused() -> None:
    with pytest.raises(LopError, match="not a multiple of 8"):
        least_damage(SPACE, table(0), 101)
