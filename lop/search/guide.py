"""Which of many moves to take: the one that the rewards so far promise most of."""

from collections.abc import Collection, Mapping

import numpy as np

from lop.search.moves import MOVES
from lop.search.surrogate import Setting, Surrogate
from lop.space.allocation import Allocation, Space

# Rewards to know before any is predicted; until then moves are taken as they are drawn, one kind after the other.
_LEAST = 8
# Moves to choose from: as long as the tree asks for, and shorter ones.
_SIZES = (1.0, 1.0, 0.4, 0.15)
_EACH = 6
# The process's setting is chosen anew with so many more rewards.
_GROWTH = 1.25


class Guide:
    """Proposes moves to allocations of a budget, a function of what it is asked, in order."""

    def __init__(self, space: Space, budget: int) -> None:
        self._space, self._budget = space, budget
        self._setting: Setting | None = None
        self._fitted = 0

    def move(
        self,
        start: Allocation,
        size: float,
        random: np.random.Generator,
        rewards: Mapping[Allocation, float],
        scored: Mapping[Allocation, int | None],
        asked: Collection[Allocation],
    ) -> Allocation:
        """Where to go from an allocation.

        Args:
            size: the largest change of an axis's ratio, about.
            rewards: so far; more is better.
            scored: on how many samples each is known, None for all.
            asked: what is known or on its way, and not to be asked for again.
        """
        if len(rewards) < _LEAST:
            return MOVES[len(asked) % len(MOVES)](start, self._space, self._budget, random, size)
        kinds = [(move, size * part) for part in _SIZES for move in MOVES for _ in range(_EACH)]
        moves = [move(start, self._space, self._budget, random, length) for move, length in kinds]
        new = [move for move in dict.fromkeys(moves) if move not in asked]
        if not new:
            return moves[0]
        values = _scale(np.array(list(rewards.values())))
        surrogate = self._surrogate(self._ratios(list(rewards)), values, _shares(list(scored.values())))
        return new[int(np.argmax(surrogate.improvement(self._ratios(new), float(values.max()))))]

    def _surrogate(self, ratios: np.ndarray, rewards: np.ndarray, shares: np.ndarray) -> Surrogate:
        if len(rewards) >= _GROWTH * self._fitted:
            self._setting, self._fitted = None, len(rewards)
        surrogate = Surrogate(ratios, rewards, shares, self._setting, parts=len(self._space.parts))
        self._setting = surrogate.setting
        return surrogate

    def _ratios(self, allocations: list[Allocation]) -> np.ndarray:
        return np.array([allocation.ratios(self._space) for allocation in allocations])


def _scale(rewards: np.ndarray) -> np.ndarray:
    """Damages, which are rewards below zero, multiply rather than add: by their logarithm."""
    scaled: np.ndarray = -np.log(-rewards) if (rewards < 0).all() else rewards
    return scaled


def _shares(scored: list[int | None]) -> np.ndarray:
    """What part of the samples each reward is of: all of them, or at most half where a race was given up."""
    most = max((count for count in scored if count is not None), default=1)
    return np.array([1.0 if count is None else count / (2 * most) for count in scored])
