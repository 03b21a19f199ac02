import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.intervals import mean_over_forms, paired_bootstrap, wilson


@given(st.integers(1, 5000), st.data())
def test_wilson_holds_the_share_and_stays_within_bounds(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    found = wilson(correct, total)
    assert 0 <= found.low <= found.value == correct / total <= found.high <= 1


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe 1998, table I: 81/263 and 15/148 and 0/20.
    for correct, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        found = wilson(correct, total)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_the_mean_weighs_forms_alike() -> None:
    values, forms = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 1])
    assert mean_over_forms(values, forms) == 0.5


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        images = np.repeat(np.arange(100), 2)
        values = np.repeat(random.random(100) < 0.7, 2).astype(float)
        found = paired_bootstrap(values, np.zeros(200, int), images, seed=trial, resamples=400)
        covered += found.low <= 0.7 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_bootstrap_of_no_difference_holds_zero() -> None:
    values = np.zeros(30)
    found = paired_bootstrap(values, np.arange(30) % 3, np.arange(30))
    assert (found.low, found.value, found.high) == pytest.approx((0, 0, 0))
