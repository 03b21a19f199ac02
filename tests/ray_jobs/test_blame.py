"""Who is to blame for failures and deaths: told without Ray, from what happened alone."""

from contextlib import nullcontext
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.errors import LopError
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from ray_jobs.blame import ATTEMPTS, Blame

CANDIDATES = [Candidate(Allocation((width, 8))) for width in range(1, 120)]


def test_an_allocation_that_raises_everywhere_is_given_up_and_told_once_something_succeeds() -> None:
    blame, bad = Blame(), CANDIDATES[0]
    assert [blame.failed(bad, worker, "too odd") for worker in range(ATTEMPTS)] == [True, True, False]
    assert blame.has_given_up
    assert bad not in blame
    blame.succeeded(CANDIDATES[1], 0)
    assert blame.release() == {bad: "too odd"}
    assert not blame.has_given_up


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_a_worker_that_fails_at_everything_is_found_and_its_failures_forgotten(others: list[int]) -> None:
    blame, broken, at_fault = Blame(), "broken", 0
    for number, healthy in enumerate(others):
        candidate = CANDIDATES[number]
        assert blame.failed(candidate, broken, "no memory")
        assert blame.has_tried(candidate, broken)
        assert not blame.has_tried(candidate, healthy)
        if blame.is_at_fault(broken):
            at_fault += 1
            broken = f"broken {at_fault}"  # Another takes its place, and is no better.
        blame.succeeded(candidate, healthy)
    assert at_fault == len(others) // ATTEMPTS
    assert not blame.has_given_up


def test_where_everything_fails_nothing_is_recorded() -> None:
    blame = Blame()
    for candidate in CANDIDATES[:2]:
        for worker in range(ATTEMPTS):
            blame.failed(candidate, worker, "no model")
            assert not blame.is_at_fault(worker)  # Others do no better.
    for worker in range(ATTEMPTS - 1):
        assert blame.failed(CANDIDATES[2], worker, "no model")
    with pytest.raises(LopError, match=r"failed 3 times: no model"):
        blame.failed(CANDIDATES[2], ATTEMPTS, "no model")


def test_a_new_worker_is_wanted_once_for_each_failure() -> None:
    blame, candidate = Blame(), CANDIDATES[0]
    for worker in range(ATTEMPTS - 1):
        blame.failed(candidate, worker, "odd")
        assert blame.wants_another(candidate)
        assert not blame.wants_another(candidate)


@given(st.integers(0, 60))
def test_the_calmer_the_cluster_the_fewer_deaths_tell(evaluated: int) -> None:
    blame, killer = Blame(), CANDIDATES[0]
    for number in range(evaluated):
        blame.succeeded(CANDIDATES[1 + number], "worker")
    deaths = 0
    with pytest.raises(LopError) if not evaluated else nullcontext():
        while True:
            blame.died()
            deaths += 1
            if not blame.killed(killer):
                break
    assert deaths >= ATTEMPTS
    assert not evaluated or blame.release() == {killer: "its worker died each time"}
    if evaluated >= 50:
        assert deaths == ATTEMPTS


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("seed", range(20))
def test_deaths_by_chance_are_no_allocations_fault(seed: int, rate: float) -> None:
    # Of 100,000 innocent allocations one may be blamed by chance, so these seeds stand for all.
    chance = Random(seed)
    blame, waiting = Blame(), list(CANDIDATES)
    while waiting:
        candidate = waiting.pop(0)
        if chance.random() >= rate:
            blame.succeeded(candidate, "worker")
            continue
        blame.died()
        assert blame.killed(candidate)
        waiting.append(candidate)


def test_deaths_in_a_row_are_the_clusters() -> None:
    blame = Blame()
    for _ in range(9):
        blame.died()
    with pytest.raises(LopError, match="10 workers in a row died"):
        blame.died()
