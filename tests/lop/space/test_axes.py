"""Spaces with attention beside the FFNs, whose units cost differently: against all allocations of small ones."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.errors import LopError
from lop.search.moves import MOVES, Move
from lop.search.sensitivity import best_additive
from lop.space.allocation import Allocation, Attention, Space, dense, of_ffns, parse_space, project, uniform

spaces = st.builds(
    lambda layers, units, granularity, ratio, attention, vanishing: Space(
        layers, units * granularity, granularity, ratio, None, attention, vanishing
    ),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 4]),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.builds(Attention, st.integers(1, 2), st.integers(1, 50), st.integers(1, 9)),
    st.booleans(),
)


@st.composite
def spaces_with_budgets(draw: st.DrawFn) -> tuple[Space, int]:
    space = draw(spaces)
    return space, draw(st.integers(space.least, space.whole))


def every(space: Space, budget: int) -> list[Allocation]:
    """All allocations within a budget to which nothing can be added, the cheapest unit of any axis included."""
    axes = [part for part in space.parts for _ in range(space.layers)]
    found = []
    for widths in product(*(part.widths.tolist() for part in axes)):
        left = budget - space.cost(widths)
        missing = [part.cost * part.step for part, width in zip(axes, widths) if width < part.width]
        if 0 <= left < min(missing, default=left + 1):
            found.append(Allocation(widths))
    return found


@given(spaces_with_budgets(), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_projection_is_the_nearest_of_all_that_spend_the_budget(case: tuple[Space, int], seed: int) -> None:
    space, budget = case
    ratios = np.random.default_rng(seed).uniform(-0.5, 1.5, space.axes)
    found = project(ratios, space, budget)

    def distance(allocation: Allocation) -> float:
        return float(((np.array(allocation.ratios(space)) - ratios) ** 2).sum())

    all_of_them = every(space, budget)
    assert found in all_of_them
    assert distance(found) == pytest.approx(min(map(distance, all_of_them)))
    assert project(ratios, space, budget) == found


@given(spaces_with_budgets(), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_programme_finds_the_least_sum_of_damages(case: tuple[Space, int], seed: int) -> None:
    space, budget = case
    random = np.random.default_rng(seed)
    counts = [len(part.widths) for part in space.parts for _ in range(space.layers)]
    table = np.full((space.axes, max(counts)), np.inf)
    for row, count in zip(table, counts):
        row[:count] = random.uniform(0, 1, count)
    widths = [part.widths.tolist() for part in space.parts for _ in range(space.layers)]

    def damage(allocation: Allocation) -> float:
        return sum(row[there.index(width)] for row, there, width in zip(table, widths, allocation.widths))

    found = best_additive(space, table, budget)
    all_of_them = every(space, budget)
    assert found in all_of_them
    assert damage(found) == pytest.approx(min(map(damage, all_of_them)))


@pytest.mark.parametrize("move", MOVES)
@given(case=spaces_with_budgets(), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_moves_stay_within_the_budget_however_many_follow(move: Move, case: tuple[Space, int], seed: int) -> None:
    space, budget = case
    random = np.random.default_rng(seed)
    current = uniform(space, budget)
    for _ in range(3):
        current = move(current, space, budget, random, 0.5)
        assert current in every(space, budget)


@given(spaces_with_budgets())
@settings(max_examples=60, deadline=None)
def test_who_knows_ffns_alone_keeps_attention_dense_while_the_budget_allows(case: tuple[Space, int]) -> None:
    space, budget = case
    ffn, attention = space.parts
    found = of_ffns(space, budget, uniform)
    assert found in every(space, budget)
    kept = found.widths[space.layers :]
    if budget >= space.layers * (ffn.cost * ffn.min_width + attention.cost * attention.width):
        assert kept == (attention.width,) * space.layers
    else:
        least = min(sum(allocation.widths[: space.layers]) for allocation in every(space, budget))
        assert sum(found.widths[: space.layers]) == least


def test_a_space_of_ffns_alone_is_what_it_was_and_one_with_attention_can_be_read_back() -> None:
    plain = Space(2, 8, 4, 0.5)
    assert plain.as_dict() == {
        "layers": 2, "neurons": 8, "granularity": 4, "max_ratio": 0.5, "max_width_ratio": None,
    }  # fmt: skip
    space = Space(2, 8, 4, 0.5, None, Attention(3, 100, 7), vanishing=True)
    assert parse_space(space.as_dict()) == space
    assert space.ffns == replace(plain, vanishing=True)
    assert dense(space).widths == (8, 8, 3, 3)
    assert space.cost(dense(space).widths) == space.whole == space.budget(0) == 2 * (8 * 7 + 3 * 100)


def test_nothing_is_kept_only_where_axes_may_vanish() -> None:
    attention = Attention(3, 100, 7)
    assert [part.min_width for part in Space(2, 8, 4, 0.9, None, attention).parts] == [4, 1]
    vanishing = Space(2, 8, 4, 0.9, None, attention, vanishing=True)
    assert uniform(vanishing, vanishing.budget(1)).widths == (0, 0, 0, 0)
    with pytest.raises(LopError, match="max_width_ratio"):
        Space(2, 8, 4, 0.9, 1.2, attention)
