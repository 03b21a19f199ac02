import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.run.config import find_config, load_config
from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger, read_ledger
from lop.search.loop import InProcess, run_search
from lop.search.racing import (
    Candidate,
    Opponent,
    Racing,
    chance,
    gives_up,
    pack,
    pack_values,
    sample_rounds,
    trails,
    unpack,
    unpack_values,
)
from lop.search.rewards import REWARDS
from lop.search.tree import SearchTree, TreeOptions
from lop.space.allocation import Space, uniform

SPACE = Space(5, 64, 4, 0.9)
SAMPLES = 240
RACING = Racing(rounds=8, confidence=0.95)
ROUNDS = sample_rounds(SAMPLES, RACING.rounds, seed=4)
OPTIONS = TreeOptions(
    simulations=70, evaluations=50, exploration=0.05, step=0.4, decay=0.9, children=4, depth=6, window=3, opponent=1
)
bits = st.lists(st.booleans(), min_size=1, max_size=60).map(np.array)


def test_rounds_are_a_partition_that_only_the_seed_changes() -> None:
    assert sorted(np.concatenate(ROUNDS)) == list(range(SAMPLES))
    assert {len(part) for part in ROUNDS} == {SAMPLES // RACING.rounds}
    again = sample_rounds(SAMPLES, RACING.rounds, seed=4)
    assert all((a == b).all() for a, b in zip(ROUNDS, again))
    assert not (np.concatenate(sample_rounds(SAMPLES, 8, seed=5)) == np.concatenate(ROUNDS)).all()
    assert len(sample_rounds(3, 8, seed=0)) == 3


@given(bits)
def test_hits_come_back_from_text(hits: np.ndarray) -> None:
    assert (unpack(pack(hits), len(hits)) == hits).all()


@given(st.data())
@settings(deadline=None)
def test_chance_agrees_with_a_naive_sum(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    opponent, correct, seen = (
        np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))) for _ in range(3)
    )
    correct = correct & seen

    def predicted(trials: int, successes: int, failures: int) -> list[float]:
        a, b = successes + 0.5, failures + 0.5

        def beta(x: float, y: float) -> float:
            return math.gamma(x) * math.gamma(y) / math.gamma(x + y)

        return [math.comb(trials, k) * beta(k + a, trials - k + b) / beta(a, b) for k in range(trials + 1)]

    wins, losses = (correct & ~opponent).sum(), (seen & ~correct & opponent).sum()
    gained = predicted((~seen & ~opponent).sum(), wins, (seen & ~opponent).sum() - wins)
    lost = predicted((~seen & opponent).sum(), losses, (seen & opponent).sum() - losses)
    expected = sum(
        more * less for g, more in enumerate(gained) for f, less in enumerate(lost) if wins + g >= losses + f
    )
    assert chance(correct, seen, opponent) == pytest.approx(expected, abs=1e-9)


def test_what_is_certain_is_given_up_and_what_is_open_is_not() -> None:
    opponent = np.ones(100, dtype=bool)
    seen = np.arange(100) < 20
    one_less = seen & (np.arange(100) > 0)
    assert chance(one_less, seen, opponent) == 0  # The opponent has no miss left that it could make good with.
    assert gives_up(RACING, one_less, seen, opponent)
    assert not gives_up(RACING, seen, seen, opponent)


class Simulated:
    """An allocation answers a sample if what it keeps of the first layers, with noise of the sample's, suffices."""

    def __init__(self) -> None:
        self.scored = 0
        random = np.random.default_rng(2)
        self._hardness = random.uniform(0.2, 0.75, SAMPLES)
        self._taste = random.normal(0, 0.25, (SAMPLES, SPACE.layers))

    def evaluate(self, candidate: Candidate) -> Evaluation:
        allocation, opponent = candidate.allocation, candidate.opponent
        kept = np.array(allocation.widths) / SPACE.neurons
        power = (np.linspace(1, 0.2, SPACE.layers) / 3 + self._taste) @ kept
        correct, seen = np.zeros(SAMPLES, dtype=bool), np.zeros(SAMPLES, dtype=bool)
        for part in ROUNDS:
            seen[part] = True
            correct[part] = power[part] > self._hardness[part]
            if opponent and not seen.all() and gives_up(RACING, correct, seen, unpack(opponent.record, SAMPLES)):
                break
        self.scored += int(seen.sum())
        return Evaluation(
            accuracy=float(correct[seen].mean()),
            log_probability=float(power[seen].mean()),
            hits=pack(correct),
            opponent=opponent.allocation.widths if opponent else None,
            scored=None if seen.all() else int(seen.sum()),
        )


def searched(path: Path, options: TreeOptions, seed: int = 0) -> tuple[SearchTree, int]:
    simulated = Simulated()
    tree = SearchTree(
        SPACE, [uniform(SPACE, SPACE.budget(0.5))], options, seed=(seed,), reward=lambda result: result.accuracy
    )
    with Ledger(path, {}) as ledger:
        run_search([tree], InProcess(simulated), ledger)
    return tree, simulated.scored


def test_races_score_fewer_samples_and_the_best_was_scored_in_full(tmp_path: Path) -> None:
    raced, scored = searched(tmp_path / "raced", OPTIONS)
    assert scored < 0.6 * SAMPLES * len(raced.results)
    assert raced.best[1].is_complete
    given_up = [result for result in raced.results.values() if not result.is_complete]
    assert len(given_up) > len(raced.results) / 3
    assert all(result.opponent in {allocation.widths for allocation in raced.results} for result in given_up)


def test_a_raced_search_is_replayed_from_its_ledger(tmp_path: Path) -> None:
    first, scored = searched(tmp_path / "ledger", OPTIONS)
    before = list(read_ledger(tmp_path / "ledger"))
    second, again = searched(tmp_path / "ledger", OPTIONS)
    assert scored > 0
    assert again == 0
    assert list(first.results.items()) == list(second.results.items())
    assert list(read_ledger(tmp_path / "ledger")) == before


def test_another_opponent_is_another_evaluation(tmp_path: Path) -> None:
    even, other = uniform(SPACE, SPACE.budget(0.5)), uniform(SPACE, SPACE.budget(0.4))
    opponent = Opponent(other, pack(np.ones(SAMPLES, dtype=bool)))
    raced = Simulated().evaluate(Candidate(even, opponent))
    whole = Simulated().evaluate(Candidate(even))
    with Ledger(tmp_path / "ledger", {}) as ledger:
        ledger.append(even, raced)
        ledger.flush()
        assert ledger.get(Candidate(even)) is None
        ledger.append(even, whole)
    with Ledger(tmp_path / "ledger", {}) as ledger:
        assert ledger.get(Candidate(even)) == whole
        assert ledger.get(Candidate(even, opponent)) == raced
        assert ledger.get(Candidate(even, Opponent(even, opponent.record))) is None
    assert list(read_ledger(tmp_path / "ledger")) == [(even, raced), (even, whole)]


def test_a_search_may_race_for_any_reward() -> None:
    for reward in REWARDS:
        config = load_config(find_config("tiny"), ["search.racing={}", f"search.reward={reward}"])
        assert config.search.tree_options().opponent == 1
    assert load_config(find_config("tiny")).search.tree_options().opponent == 0


@given(st.integers(2, 600), st.integers(2, 32), st.integers(0, 99))
def test_rounds_of_a_real_reward_double(samples: int, rounds: int, seed: int) -> None:
    parts = Racing(rounds, 0.9, "divergence").parts(samples, seed=seed)
    assert sorted(np.concatenate(parts)) == list(range(samples))
    seen = np.cumsum([len(part) for part in parts])
    # Each later round is about as large as all before it.
    assert all(later <= 2 * earlier + 2 for earlier, later in itertools.pairwise(seen))
    assert len(parts) <= rounds.bit_length() + 1


def test_a_real_reward_is_given_up_about_as_often_as_it_would_lose() -> None:
    """Of candidates that would draw level on all samples, one in ten is given up at a look with 90% confidence."""
    random = np.random.default_rng(0)
    racing, lost = Racing(16, 0.9, "divergence"), 0
    for _ in range(2000):
        gains = random.normal(size=400)
        gains -= gains.mean()
        lost += trails(racing, gains[:100], 400)
    assert 0.07 < lost / 2000 < 0.13


@pytest.mark.parametrize(("shift", "expected"), [(-1.0, True), (1.0, False)])
def test_a_clear_difference_decides_a_race(shift: float, expected: bool) -> None:
    gains = np.random.default_rng(1).normal(shift, 0.5, size=40)
    assert trails(Racing(4, 0.9, "divergence"), gains, 400) is expected


def test_equal_candidates_race_on() -> None:
    assert not trails(Racing(4, 0.9, "divergence"), np.zeros(10), 100)


def test_values_come_back_from_text() -> None:
    values = np.random.default_rng(2).normal(size=33)
    np.testing.assert_allclose(unpack_values(pack_values(values)), values, rtol=1e-3)
