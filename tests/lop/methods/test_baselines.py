from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lop.errors import LopError
from lop.methods.alphapruning import alpha_pruning
from lop.methods.flap import VARIANTS
from lop.methods.method import Given
from lop.methods.owl import owl
from lop.methods.registry import BASELINES, METHODS
from lop.methods.spread import global_threshold
from lop.model.importance import activation, contribution, flap, fluctuation, importance, magnitude, order, wanda
from lop.model.statistics import NeuronStatistics
from lop.run.spectra import tail_exponent
from lop.space.allocation import Space


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
    np.testing.assert_allclose(fluctuation(HAND), [[1, 0, 4], [0, 0.25, 1]])


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


def test_flap_has_every_setting_once() -> None:
    variants = {method.name: method for method in VARIANTS}
    # FLAP as published, and Wanda-sp, stand under their own names.
    assert len(variants) == len(VARIANTS) == 3 * 2 * 2 - 2
    assert variants["flap-ifv-ul-um-bias"].bias
    assert not variants["flap-ifv-al-am"].bias
    space = Space(2, 3, 1, 0.7)
    plain = variants["flap-wifv-ul-um"]
    assert plain(Given(space, "activation", HAND), 4).allocation.widths == (2, 2)
    assert {(method.importance, method.bias) for method in VARIANTS if "al-am" not in method.name} == {
        ("flap", True), ("flap", False), ("wanda", True), ("fluctuation", True), ("fluctuation", False)
    }  # fmt: skip


def spread_scores(rows: list[list[float]]) -> NeuronStatistics:
    """Statistics whose activation scores are the given ones."""
    return by_hand(np.array(rows)[:, None, :], np.ones((len(rows), 1, len(rows[0]))))


def test_owl_worked_by_hand() -> None:
    # 20 neurons a layer: 1, 2 and 0 of them above five times the mean, so D = 0.05, 0.1, 0 and d = 0.08, 0.16, 0.
    rows = [[100.0] + [1.0] * 19, [100.0, 100.0] + [1.0] * 18, [1.0] * 20]
    assert 5 * np.mean(rows[1]) < 100
    space = Space(3, 20, 1, 0.95)
    budget = space.budget(0.5)
    # Densities 0.5 + d - 0.08: 0.5, 0.58, 0.42 of 20 neurons are 10, 11.6, 8.4.
    assert owl(spread_scores(rows), space, budget).widths == (10, 12, 8)
    assert owl(spread_scores([[1.0] * 20] * 3), space, budget).widths == (10, 10, 10)


def test_alpha_pruning_worked_by_hand() -> None:
    # Exponents 2, 3, 4 become 0.7, 1, 1.3 times the target: ratios 0.35, 0.5, 0.65, widths 13, 10, 7 of 20.
    space = Space(3, 20, 1, 0.95)
    statistics = replace(spread_scores([[1.0] * 20] * 3), exponents=np.array([2.0, 3.0, 4.0]))
    assert alpha_pruning(statistics, space, space.budget(0.5)).widths == (13, 10, 7)
    with pytest.raises(LopError, match="no spectra"):
        alpha_pruning(replace(statistics, exponents=None), space, 30)


def test_the_tail_exponent_worked_by_hand() -> None:
    # Eigenvalues 1, 4, 16, 64: k = 2, α = 1 + 2 / (ln(16 / 4) + ln(64 / 4)).
    weight = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    expected = 1 + 2 / (np.log(4) + np.log(16))
    assert tail_exponent(weight) == pytest.approx(expected, rel=1e-5)
    wide = torch.cat([weight, torch.zeros(4, 3)], dim=1)
    assert tail_exponent(wide) == pytest.approx(expected, rel=1e-5)
    assert tail_exponent(wide.T) == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 1000), st.floats(0, 0.9), st.sampled_from(BASELINES))
def test_every_baseline_meets_the_budget(seed: int, target: float, name: str) -> None:
    random = np.random.default_rng(seed)
    space = Space(4, 32, 4, 0.9)
    statistics = by_hand(random.normal(size=(4, 10, 32)), random.normal(size=(4, 6, 32)))
    errors = np.sort(random.random((4, 33)), axis=1)[:, ::-1]
    statistics = replace(statistics, exponents=random.normal(3, 1, 4), surveys={"errors": errors})
    budget = space.budget(min(target, space.max_target))
    method = METHODS[name]
    assert method.start is not None
    for allocation in (
        method(Given(space, "activation", statistics), budget).allocation,
        method.start(statistics, space, budget),
    ):
        assert allocation.budget == budget
        assert min(allocation.widths) >= space.min_width


def test_unknown_importance_is_named() -> None:
    with pytest.raises(LopError, match="'random' is not one of activation"):
        importance("random", HAND)
