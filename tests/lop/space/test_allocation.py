from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.errors import LopError
from lop.space.allocation import Allocation, Space, dense, project, uniform

spaces = st.builds(
    lambda layers, units, granularity, ratio, widest: Space(layers, units * granularity, granularity, ratio, widest),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([1, 4, 128]),
    st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.95]),
    st.sampled_from([None, 1.0, 1.2, 3.0]),
)


@st.composite
def spaces_with_targets(draw: st.DrawFn) -> tuple[Space, float]:
    space = draw(spaces)
    return space, draw(st.floats(0, space.max_target))


@given(spaces_with_targets())
def test_budget_is_the_largest_multiple_within_the_target(case: tuple[Space, float]) -> None:
    space, target = case
    kept = (1 - Fraction(str(target))) * space.layers * space.neurons
    budget = space.budget(target)
    assert budget % space.granularity == 0
    # At the largest target the float may ask for a hair less than the least widths.
    assert budget == max(kept // space.granularity * space.granularity, space.layers * space.min_width)


@pytest.mark.parametrize(("target", "kept"), [(0.3, 7), (0.7, 3), (0.35, 6), (0.1, 9), (0.0, 10)])
def test_target_means_the_decimal_that_was_written(target: float, kept: int) -> None:
    assert Space(1, 10, 1, 0.9).budget(target) == kept


@given(spaces_with_targets(), st.data())
def test_projection_meets_budget_and_limits(case: tuple[Space, float], data: st.DataObject) -> None:
    space, target = case
    ratios = data.draw(st.lists(st.floats(-2, 3), min_size=space.layers, max_size=space.layers))
    allocation = project(ratios, space, space.budget(target))
    assert allocation.budget == space.budget(target)
    widest = space.max_width(allocation.budget)
    assert all(space.min_width <= width <= widest <= space.neurons for width in allocation.widths)
    if space.max_width_ratio is not None:
        mean = allocation.budget / space.layers
        assert widest < max(space.max_width_ratio * mean, mean + space.granularity) + 1e-9
    assert all(width % space.granularity == 0 for width in allocation.widths)
    assert project(ratios, space, space.budget(target)) == allocation


@given(st.integers(0, 10_000))
def test_projection_is_the_nearest_of_all_allocations(seed: int) -> None:
    random = np.random.default_rng(seed)
    space = Space(3, 24, 4, 0.9, random.choice([None, 1.3]))
    budget = space.budget(float(random.uniform(0, space.max_target)))
    ratios = random.normal(0.5, 0.6, 3)

    def distance(widths: tuple[int, ...]) -> float:
        return float(sum((1 - width / space.neurons - ratio) ** 2 for width, ratio in zip(widths, ratios)))

    widths = range(space.min_width, space.max_width(budget) + 1, space.granularity)
    best = min(distance(candidate) for candidate in product(widths, repeat=3) if sum(candidate) == budget)
    assert distance(project(ratios, space, budget).widths) == pytest.approx(best)


@given(st.integers(0, 10_000), st.integers(1, 28))
@settings(max_examples=40)
def test_projection_agrees_with_giving_one_unit_at_a_time(seed: int, layers: int) -> None:
    random = np.random.default_rng(seed)
    space = Space(layers, 160, 8, 0.9)
    budget = space.budget(float(random.uniform(0, space.max_target)))
    ratios = random.normal(0.5, random.choice([0.05, 0.4, 2]), layers)

    def distance(widths: Sequence[int] | np.ndarray) -> np.ndarray:
        return (1 - np.array(widths) / space.neurons - ratios) ** 2

    widths = np.full(layers, space.min_width)
    while widths.sum() < budget:
        cost = distance(widths + space.granularity) - distance(widths)
        cost[widths == space.neurons] = np.inf
        widths[np.argmin(cost)] += space.granularity
    assert distance(project(ratios, space, budget).widths).sum() == pytest.approx(distance(widths).sum(), abs=1e-12)


@given(spaces_with_targets())
def test_an_allocation_projects_to_itself(case: tuple[Space, float]) -> None:
    space, target = case
    allocation = uniform(space, space.budget(target))
    assert project(allocation.ratios(space), space, allocation.budget) == allocation


@given(spaces_with_targets())
def test_uniform_widths_differ_by_one_step_at_most(case: tuple[Space, float]) -> None:
    space, target = case
    widths = uniform(space, space.budget(target)).widths
    assert max(widths) - min(widths) <= space.granularity


def test_ties_go_to_the_earlier_layer() -> None:
    assert project([0.5, 0.5], Space(2, 2, 1, 0.5), 3).widths == (2, 1)


def test_dense_prunes_nothing() -> None:
    space = Space(2, 8, 4, 0.5)
    assert dense(space).ratios(space) == (0, 0)


@pytest.mark.parametrize("target", [-0.1, 0.96, 1.0, float("nan"), float("inf")])
def test_targets_outside_are_named(target: float) -> None:
    with pytest.raises(LopError, match=r"target .* is outside \[0, 0\.9"):
        Space(4, 320, 8, 0.95).budget(target)


@pytest.mark.parametrize("ratios", [[0.5], [0.5, float("nan")], [[0.5, 0.5]]])
def test_ratios_of_another_shape_are_named(ratios: list[float]) -> None:
    with pytest.raises(LopError, match="2 finite ratios"):
        project(ratios, Space(2, 8, 4, 0.5), 8)


def test_impossible_spaces_and_budgets_are_named() -> None:
    with pytest.raises(LopError, match="granularity 3"):
        Space(2, 8, 3, 0.5)
    with pytest.raises(LopError, match="max_ratio 1"):
        Space(2, 8, 4, 1.0)
    with pytest.raises(LopError, match=r"max_width_ratio 0\.9"):
        Space(2, 8, 4, 0.5, 0.9)
    with pytest.raises(LopError, match="7 neurons"):
        project([0.5, 0.5], Space(2, 8, 4, 0.5), 7)


def test_allocations_are_values() -> None:
    assert len({Allocation((1, 2)), Allocation((1, 2)), Allocation((2, 1))}) == 2
