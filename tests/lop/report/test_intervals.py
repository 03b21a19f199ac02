import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.report.intervals import Resampler, bootstrap_p, mcnemar, mean_over_forms, paired_bootstrap, wilson


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


def test_resampled_means_are_those_of_the_paired_bootstrap() -> None:
    random = np.random.default_rng(1)
    images = np.repeat(np.arange(60), 2)
    strata, values = np.arange(120) % 2, random.random(120)
    resampled = Resampler([str(i) for i in range(60)]).means(values, strata, [str(i) for i in images])
    found = paired_bootstrap(values, strata, images)
    assert np.percentile(resampled, [2.5, 97.5]) == pytest.approx([found.low, found.high], abs=1e-6)


def test_an_image_that_a_column_lacks_changes_nothing_of_it() -> None:
    resampler = Resampler(["a", "b", "c"])
    assert set(resampler.means(np.ones(2), np.zeros(2), ["a", "b"]).round(6)) <= {0.0, 1.0}


def test_p_values_of_the_bootstrap() -> None:
    assert bootstrap_p(np.full(999, 0.1)) == pytest.approx(2 / 1000)
    assert bootstrap_p(np.array([-1.0, 1.0] * 50)) == 1.0
    assert bootstrap_p(np.zeros(100)) == 1.0


def test_mcnemar_worked_by_hand() -> None:
    # One question only the first gets right, six only the second: 2·(C(7,0) + C(7,1)) / 2^7.
    first = np.array([True] * 5 + [True] + [False] * 6)
    second = np.array([True] * 5 + [False] + [True] * 6)
    assert mcnemar(first, second) == mcnemar(second, first) == 2 * (1 + 7) / 2**7
    assert mcnemar(first, first) == 1.0


def test_p_values_are_as_rare_as_they_say() -> None:
    random = np.random.default_rng(0)
    images = [str(i) for i in range(150)]
    resampler = Resampler(images, resamples=400)
    differences = random.normal(size=(200, 150))
    small = sum(bootstrap_p(resampler.means(row, np.zeros(150), images)) < 0.05 for row in differences)
    assert 2 <= small <= 24
