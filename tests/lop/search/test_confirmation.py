"""What is kept back from a search, and the answer that it confirms."""

from pathlib import Path

import numpy as np
import pytest

from lop.model.samples import SampleSets
from lop.search.confirmation import confirm, kept_back
from lop.search.evaluation import Evaluation, Scorers
from lop.search.ledger import Ledger
from lop.search.loop import InProcess, run_search
from lop.search.racing import Candidate
from lop.search.tree import SearchTree, TreeOptions
from lop.space.allocation import Allocation, Space, uniform

SPACE = Space(6, 64, 4, 0.9)
OPTIONS = TreeOptions(
    simulations=60, evaluations=40, exploration=0.02, step=0.3, decay=0.8, children=6, depth=8, window=2
)


def test_samples_kept_back_are_a_part_that_shares_no_image(samples: SampleSets) -> None:
    reward = samples.reward[:300]
    search, back = kept_back(reward, 0.25, seed=3)
    assert len(search) + len(back) == len(reward)
    assert {sample.keys[0] for sample in search}.isdisjoint(sample.keys[0] for sample in back)
    assert 0.15 < len(back) / len(reward) < 0.35
    assert kept_back(reward, 0.25, seed=3) == (search, back) != kept_back(reward, 0.25, seed=4)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_neither_part_is_empty(samples: SampleSets, share: float) -> None:
    assert all(kept_back(samples.reward[:40], share, seed=0))


class Noisy:
    """An allocation's true reward and a lucky or unlucky part of its own, which other samples do not have."""

    def __init__(self, seed: int, noise: float) -> None:
        self._seed, self._noise = seed, noise
        self.asked: list[Allocation] = []

    def evaluate(self, candidate: Candidate) -> Evaluation:
        self.asked.append(candidate.allocation)
        luck = np.random.default_rng([self._seed, *candidate.allocation.widths]).normal() * self._noise
        return Evaluation(0.5, true_reward(candidate.allocation) + float(luck))


def true_reward(allocation: Allocation) -> float:
    """Uniform is best; nothing can be won, and a search that trusts its scores loses."""
    return -float(np.var(allocation.widths)) / 100


def searched(folder: Path, scorer: Scorers) -> Allocation:
    budget = SPACE.budget(0.5)
    tree = SearchTree(SPACE, [uniform(SPACE, budget)], OPTIONS, seed=(0,), reward=lambda e: e.worth("log_probability"))
    with Ledger(folder, {}) as ledger:
        workers = InProcess(scorer)
        run_search([tree], workers, ledger)
        found = confirm({0.5: tree}, 4, workers, ledger, lambda _: None)[0.5]
    assert found.keys() == {*tree.ranked[:4], uniform(SPACE, budget)}
    assert all(evaluation.confirms for evaluation in found.values())
    return tree.confirmed(found)


def test_luck_does_not_win(tmp_path: Path) -> None:
    lucky = searched(tmp_path / "a", Scorers(Noisy(0, 1.0), Noisy(1, 0.01)))
    assert lucky == uniform(SPACE, SPACE.budget(0.5))


def test_what_was_confirmed_is_not_evaluated_again(tmp_path: Path) -> None:
    first, again = (Scorers(Noisy(0, 1.0), Noisy(1, 0.5)) for _ in range(2))
    assert searched(tmp_path, first) == searched(tmp_path, again)
    assert isinstance(again.search, Noisy)
    assert isinstance(again.confirmation, Noisy)
    assert not again.search.asked
    assert not again.confirmation.asked
