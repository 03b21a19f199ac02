"""Latency as the sum of the parts' times, and profiles as files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.errors import LopError
from lop.space.latency import Profile, Times, parse_profile


def times(steps: list[float], first: int = 8) -> Times:
    """FFN times that rise by these steps, at widths that double."""
    widths = tuple(first * 2**index for index in range(len(steps)))
    return Times(0.25, 2.0, 1.0, widths, tuple(float(each) for each in np.cumsum(steps)))


some_times = st.lists(st.floats(0, 5), min_size=1, max_size=5).map(times)


@given(some=some_times, widths=st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_any_widths_lie_within_the_bounds_of_their_sum(some: Times, widths: list[int]) -> None:
    widths = [min(width, some.widths[-1]) for width in widths]  # The widest that is measured is the dense one.
    low, high = some.bounds(sum(widths), len(widths))
    assert low - 1e-9 <= some.of(widths) <= high + 1e-9


@given(some=some_times, budget=st.integers(1, 500), more=st.integers(0, 100), layers=st.integers(1, 6))
def test_bounds_grow_with_the_budget(some: Times, budget: int, more: int, layers: int) -> None:
    here, there = some.bounds(budget, layers), some.bounds(budget + more, layers)
    assert here[0] <= there[0] + 1e-9
    assert here[1] <= there[1] + 1e-9


@given(
    some=some_times,
    of_groups=st.lists(st.floats(0, 5), min_size=2, max_size=4),
    layers=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3)), min_size=1, max_size=6),
)
def test_widths_of_both_parts_lie_within_the_bounds_of_their_sums(
    some: Times, of_groups: list[float], layers: list[tuple[int, int]]
) -> None:
    seconds = tuple(float(each) for each in np.cumsum(of_groups))
    both = replace(some, attention=seconds[-1], groups=tuple(range(len(seconds))), of_groups=seconds)
    widths = [min(width, some.widths[-1]) for width, _ in layers]
    groups = [min(kept, both.groups[-1]) for _, kept in layers]
    low, high = both.bounds(sum(widths), len(layers), np.array([sum(groups)]))
    assert low[0] - 1e-9 <= both.of(widths, groups) <= high[0] + 1e-9
    # All groups is what is meant where none are named.
    assert both.of(widths) == pytest.approx(both.of(widths, [both.groups[-1]] * len(widths)))


def test_bounds_are_met_where_times_are_a_line() -> None:
    line = Times(0, 0, 0, (1, 100), (1.0, 100.0))
    low, high = line.bounds(90, 3)
    # But for widths below the least that is measured, which take no less than that.
    assert (low, high) == (pytest.approx(90, rel=0.03), pytest.approx(90, rel=0.03))


GROUPED = Times(0.5, 2.0, 1.0, (0, 8, 16), (0.0, 1.0, 2.0), (0, 2), (0.0, 0.5))
PROFILE = Profile("abc", 4, 16, "a device", {"context": 8}, {"decode": times([1, 2]), "prefill": times([2, 2])}, {})


@pytest.mark.parametrize("phases", [PROFILE.phases, {"decode": GROUPED, "prefill": GROUPED}])
def test_a_profile_is_read_as_it_was_written(phases: dict[str, Times]) -> None:
    profile = replace(PROFILE, phases=phases)
    assert parse_profile(json.loads(json.dumps(profile.as_dict()))) == profile


def test_a_profile_of_ffns_alone_says_nothing_of_groups() -> None:
    assert PROFILE.as_dict()["phases"]["decode"].keys() == {"attention", "head", "other", "widths", "ffn"}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"phases": {}},
        {"phases": None},
        {"layers": "many"},
        {"neurons": 128},
        {"other": 1},
        {"phases": {"decode": {}, "prefill": {}}},
        {"phases": {name: {**vars(times([1])), "ffn": [float("nan")]} for name in ("decode", "prefill")}},
        {"phases": {name: {**vars(times([1, 2])), "ffn": [2.0, 1.0]} for name in ("decode", "prefill")}},
        {"phases": {name: {**vars(GROUPED), "of_groups": [0.1, 0.4]} for name in ("decode", "prefill")}},
        {"phases": {name: {**vars(GROUPED), "groups": [1]} for name in ("decode", "prefill")}},
    ],
)
def test_other_files_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(LopError):
        parse_profile({**PROFILE.as_dict(), **change})
