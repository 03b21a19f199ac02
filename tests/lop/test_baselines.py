import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.allocation import Space
from lop.baselines import BASELINES, global_threshold, root_allocation
from lop.errors import LopError
from lop.importance import activation, contribution, flap, importance, magnitude, order, wanda
from lop.statistics import NeuronStatistics


def by_hand(hidden: np.ndarray, down: np.ndarray) -> NeuronStatistics:
    """Statistics of hidden activations [L, n, F] and weights [L, H, F]."""
    mean = hidden.mean(1)
    moment = ((hidden - mean[:, None]) ** 2).sum(1)
    return NeuronStatistics(hidden.shape[1], mean, moment, np.sqrt((down**2).sum(1)), np.abs(down).mean(1))


HIDDEN = np.array([[[1.0, 0.0, 2.0], [3.0, 0.0, -2.0]], [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]])
DOWN = np.array([[[3.0, 1.0, 0.0], [4.0, 0.0, 2.0]], [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]])
HAND = by_hand(HIDDEN, DOWN)


def test_scores_worked_by_hand() -> None:
    np.testing.assert_allclose(activation(HAND)[0], [10**0.5, 0, 8**0.5])
    np.testing.assert_allclose(magnitude(HAND)[0], [5, 1, 2])
    np.testing.assert_allclose(contribution(HAND)[0], [5 * 10**0.5, 0, 2 * 8**0.5])
    np.testing.assert_allclose(wanda(HAND)[0], [3.5 * 5**0.5, 0, 1 * 4**0.5])
    np.testing.assert_allclose(flap(HAND)[0], [1 * 25, 0, 4 * 4])
    np.testing.assert_allclose(flap(HAND)[1], [0, 0.25, 1])


def test_order_is_stable() -> None:
    np.testing.assert_array_equal(order(np.array([[1.0, 3.0, 1.0, 3.0]])), [[1, 3, 0, 2]])


def test_one_threshold_over_standardised_scores() -> None:
    space = Space(2, 4, 1, 0.75)
    scores = np.array([[0.0, 0.0, 0.0, 10.0], [1.0, 2.0, 3.0, 4.0]])
    standard = (scores - scores.mean(1, keepdims=True)) / scores.std(1, ddof=1, keepdims=True)
    kept = np.sort(np.argsort(-standard, axis=None, kind="stable")[:4])
    expected = tuple(int((kept // 4 == layer).sum()) for layer in range(2))
    assert global_threshold(scores, space, 4).widths == expected == (1, 3) or expected == (2, 2)
    assert global_threshold(np.ones((2, 4)), space, 4).budget == 4


@given(st.integers(0, 1000), st.floats(0, 0.9), st.sampled_from(list(BASELINES)))
def test_every_baseline_meets_the_budget(seed: int, target: float, name: str) -> None:
    random = np.random.default_rng(seed)
    space = Space(4, 32, 4, 0.9)
    statistics = by_hand(random.normal(size=(4, 10, 32)), random.normal(size=(4, 6, 32)))
    budget = space.budget(min(target, space.max_target))
    for allocation in (
        BASELINES[name].allocate(statistics, space, budget),
        root_allocation(name, statistics, space, budget),
    ):
        assert allocation.budget == budget
        assert min(allocation.widths) >= space.min_width


def test_unknown_importance_is_named() -> None:
    with pytest.raises(LopError, match="'random' is not one of activation"):
        importance("random", HAND)
