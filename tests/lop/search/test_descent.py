"""Where a descent leads, when damages are known exactly, and when they come from workers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.search.descent import Few, RecordedDamages, descend, most_evaluations
from lop.search.evaluation import Evaluation, Scorers
from lop.search.ledger import Ledger
from lop.search.loop import InProcess
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, Attention, Space, uniform

SPACE = Space(12, 480, 8, 0.9)
BOTH = Space(6, 64, 4, 0.9, attention=Attention(4, 400, 30))


class Exponential:
    """Damages that fall off exponentially with each axis's width, and interact: what is lost is lost twice."""

    def __init__(self, weights: Sequence[float], space: Space) -> None:
        self.weights, self.space = np.array(weights), space
        self.asked: list[Allocation] = []

    def of(self, allocation: Allocation) -> float:
        alone = float((self.weights * np.expm1(3 * np.array(allocation.ratios(self.space)))).sum())
        return alone + alone**2

    def __call__(self, allocations: Sequence[Allocation], few: Few = Few.JUDGE) -> list[float]:
        self.asked += allocations
        return [self.of(allocation) for allocation in allocations]

    def evaluate(self, candidate: Candidate) -> Evaluation:
        assert candidate.few
        self.asked.append(candidate.allocation)
        return Evaluation(0.5, -1.0, divergence=self.of(candidate.allocation))


@pytest.mark.parametrize("space", [SPACE, BOTH])
@given(seed=st.integers(0, 1000), target=st.floats(0.1, 0.7))
def test_each_round_is_better_than_the_one_before(space: Space, seed: int, target: float) -> None:
    budget = space.budget(round(target, 3))
    damage = Exponential(np.random.default_rng(seed).lognormal(sigma=2, size=space.axes), space)
    path = descend(space, budget, 3, damage)
    values = [damage.of(allocation) for allocation in (uniform(space, budget), *path)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    assert len(damage.asked) <= most_evaluations(space, 3)
    for allocation in path:
        assert space.cost(allocation.widths) <= budget
        if space.attention is None:
            assert allocation.budget == budget


def test_it_comes_near_the_best_allocation_there_is() -> None:
    """With these damages the best ratios are `c − log(w)/3`, which the budget's c makes them sum to."""
    weights = np.exp(np.linspace(-1.2, 1.2, SPACE.layers))
    budget, damage = SPACE.budget(0.5), Exponential(weights, SPACE)
    best = 0.5 - np.log(weights) / 3
    found = descend(SPACE, budget, 8, damage)[-1]
    start, least = (
        damage.of(uniform(SPACE, budget)),
        damage.of(Allocation(tuple(np.round((1 - best) * 480).astype(int)))),
    )
    assert damage.of(found) - least < 0.1 * (start - least)


def test_where_nothing_can_be_moved_nothing_is() -> None:
    space = Space(4, 64, 64, 0.5)
    assert descend(space, space.budget(0), 3, Exponential(np.ones(4), space)) == []


def test_what_the_ledger_holds_is_not_scored_again(tmp_path: Path) -> None:
    """A descent that was interrupted goes on, and its few samples are told apart from a search's evaluations."""
    budget = SPACE.budget(0.3)
    weights = np.linspace(0.1, 2, SPACE.layers)
    paths, asked = [], []
    for _ in range(2):
        scorer = Exponential(weights, SPACE)
        with Ledger(tmp_path, {}) as ledger:
            damages = RecordedDamages(InProcess(Scorers(scorer, few=dict.fromkeys(Few, scorer))), ledger, 100)
            paths.append(descend(SPACE, budget, 2, damages))
            assert ledger.get(Candidate(paths[-1][0])) is None
        asked.append(len(scorer.asked))
        assert damages.scored >= asked[0]
    assert paths[0] == paths[1] != []
    assert asked[0] > 0 == asked[1]
