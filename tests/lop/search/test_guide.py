"""Moves, the Gaussian process behind them, and that a guided tree finds more with as many evaluations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.search.evaluation import Evaluation
from lop.search.guide import Guide, Prior
from lop.search.moves import MOVES, Move, bend
from lop.search.surrogate import GRID, Surrogate
from lop.search.tree import SearchTree, TreeOptions
from lop.space.allocation import Allocation, Space, uniform

SPACE = Space(12, 160, 8, 0.95)
OPTIONS = TreeOptions(
    simulations=80, evaluations=60, exploration=0.02, step=0.3, decay=0.8, children=6, depth=12, window=2
)


@pytest.mark.parametrize("move", MOVES)
@given(seed=st.integers(0, 999), target=st.floats(0.05, 0.9), size=st.floats(0.01, 0.5))
@settings(max_examples=30, deadline=None)
def test_moves_keep_the_budget_and_the_limits(move: Move, seed: int, target: float, size: float) -> None:
    budget = SPACE.budget(target)
    start = uniform(SPACE, budget)
    for current in (start, move(start, SPACE, budget, np.random.default_rng(seed), size)):
        found = move(current, SPACE, budget, np.random.default_rng(seed), size)
        assert found.budget == start.budget
        assert all(SPACE.min_width <= width <= SPACE.neurons for width in found.widths)


WEIGHTS = np.exp(-np.arange(SPACE.layers) / 4) + 0.2


def damages(ratios: np.ndarray) -> np.ndarray:
    """[n] of allocations [n, L]: nearly additive, the first layers dear, neighbours alike."""
    return (ratios**2) @ WEIGHTS + 0.5 * (ratios[:, 1:] * ratios[:, :-1]).sum(axis=1)


def test_what_was_seen_is_known_and_what_is_far_is_not() -> None:
    random = np.random.default_rng(0)
    ratios = random.uniform(0.2, 0.8, size=(40, SPACE.layers))
    surrogate = Surrogate(ratios, -damages(ratios), np.ones(40))
    mean, near = surrogate.predict(ratios)
    np.testing.assert_allclose(mean, -damages(ratios), atol=0.1)
    _, far = surrogate.predict(ratios + 2)
    assert far.min() > 3 * near.max()


def test_predictions_rank_allocations_never_seen() -> None:
    random = np.random.default_rng(1)
    seen, new = random.uniform(0.2, 0.8, size=(2, 60, SPACE.layers))
    mean, _ = Surrogate(seen, -damages(seen), np.ones(60)).predict(new)
    assert np.corrcoef(mean, -damages(new))[0, 1] > 0.9


def test_the_likeliest_setting_is_taken() -> None:
    random = np.random.default_rng(2)
    ratios = random.uniform(0.2, 0.8, size=(30, SPACE.layers))
    noise = random.normal(size=30)
    exact = Surrogate(ratios, -damages(ratios), np.ones(30)).setting
    noisy = Surrogate(ratios, noise, np.ones(30)).setting
    assert exact.noise < noisy.noise == max(setting.noise for setting in GRID)


def test_equal_rewards_promise_nothing_and_break_nothing() -> None:
    ratios = np.random.default_rng(3).uniform(0.2, 0.8, size=(10, SPACE.layers))
    found = Surrogate(ratios, np.full(10, -1.5), np.ones(10)).improvement(ratios, -1.5)
    assert np.isfinite(found).all()


def search(guided: bool, seed: int) -> tuple[SearchTree, list[Allocation]]:
    options = TreeOptions(**{**vars(OPTIONS), "guided": guided})
    start = uniform(SPACE, SPACE.budget(0.5))
    tree = SearchTree(SPACE, [start], options, seed=(seed,), reward=lambda e: e.worth("divergence"))
    asked: list[Allocation] = []
    while candidates := tree.advance():
        for candidate in candidates:
            asked.append(candidate.allocation)
            value = float(damages(np.array([candidate.allocation.ratios(SPACE)]))[0])
            tree.tell(candidate.allocation, Evaluation(0.5, -1.0, divergence=value))
    return tree, asked


def test_a_guided_tree_finds_more_with_as_many_evaluations() -> None:
    start = damages(np.full((1, SPACE.layers), 0.5))[0]

    def gain(guided: bool, seed: int) -> float:
        return float(start - (search(guided, seed)[0].best[1].divergence or 0))

    plain, guided = ([gain(way, seed) for seed in range(3)] for way in (False, True))
    assert min(plain) > 0
    assert min(guided) > max(plain)


def test_a_guided_tree_is_a_function_of_its_seed_and_asks_for_nothing_twice() -> None:
    (tree, first), (_, again), (_, other) = search(True, 5), search(True, 5), search(True, 6)
    assert first == again != other
    assert len(set(first)) == len(first) == OPTIONS.evaluations == len(tree.results)
    assert tree.done


def test_with_a_prior_the_first_moves_already_go_where_it_is_better_and_rewards_correct_it() -> None:
    start, budget = uniform(SPACE, SPACE.budget(0.5)), SPACE.budget(0.5)

    def costs(allocation: Allocation) -> float:
        return float(damages(np.array([allocation.ratios(SPACE)]))[0])

    def follow(prior: Prior | None, count: int) -> list[float]:
        guide, random, known = Guide(SPACE, budget, prior), np.random.default_rng(0), {start: -costs(start)}
        while len(known) < count:
            best = sorted(known, key=lambda allocation: known[allocation], reverse=True)[:3]
            move = guide.move(best, 0.3, random, known, dict.fromkeys(known), known)
            known[move] = -costs(move)
        return [-reward for reward in known.values()]

    # About right: neighbours cost more together, which it does not know.
    right, wrong = (lambda r, sign=sign: -sign * np.log((r**2) @ WEIGHTS) for sign in (1, -1))
    # The least that there is to be found is about nine tenths of the start.
    assert max(follow(right, 8)[3:]) < 0.95 * costs(start) < np.mean(follow(None, 8)[3:])
    assert min(follow(wrong, 24)) < 0.95 * costs(start)


def test_any_constant_may_be_added_to_a_prior() -> None:
    start, budget = uniform(SPACE, SPACE.budget(0.5)), SPACE.budget(0.5)

    def moved(constant: float) -> Allocation:
        known = {start: -2.0, bend(start, SPACE, budget, np.random.default_rng(1), 0.2): -1.0}
        guide = Guide(SPACE, budget, lambda ratios: constant - np.log(damages(ratios)))
        return guide.move(list(known), 0.3, np.random.default_rng(0), known, dict.fromkeys(known), known)

    assert moved(0.0) == moved(100.0)
