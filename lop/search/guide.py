"""Which of many moves to take: the one that the rewards so far promise most of."""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from lop.search.moves import MOVES
from lop.search.surrogate import Setting, Surrogate
from lop.space.allocation import Allocation, Space

# Expected rewards [n], scaled, of allocations with ratios [n, axes]; any constant may be added.
Prior = Callable[[np.ndarray], np.ndarray]

# Rewards to know before any is predicted from them alone; until then moves are taken as they are drawn, one kind after
# the other, or by what is expected.
_LEAST, _LEAST_WITH_PRIOR = 8, 2
# Moves to choose from: as long as the tree asks for, and shorter ones.
_SIZES = (1.0, 1.0, 0.4, 0.15)
_EACH = 6
# The process's setting is chosen anew with so many more rewards.
_GROWTH = 1.25


class Guide:
    """Proposes moves to allocations of a budget, a function of what it is asked, in order.

    Args:
        prior: what is expected before anything is measured; the rewards tell by how much it is wrong, and once they are
            enough, whether they are likelier without it.
    """

    def __init__(self, space: Space, budget: int, prior: Prior | None = None) -> None:
        self._space, self._budget = space, budget
        self._least = _LEAST if prior is None else _LEAST_WITH_PRIOR
        self._prior = prior or _nothing
        self._settings: dict[Prior, Setting] = {}
        self._fitted = 0

    def move(
        self,
        starts: Sequence[Allocation],
        size: float,
        random: np.random.Generator,
        rewards: Mapping[Allocation, float],
        scored: Mapping[Allocation, int | None],
        asked: Collection[Allocation],
    ) -> Allocation:
        """Where to go from some allocations, of which the first is the best known.

        Args:
            size: the largest change of an axis's ratio, about.
            rewards: so far; more is better.
            scored: on how many samples each is known, None for all.
            asked: what is known or on its way, and not to be asked for again.
        """
        if len(rewards) < self._least:
            return MOVES[len(asked) % len(MOVES)](starts[0], self._space, self._budget, random, size)
        kinds = [(start, move, size * part) for start in starts for part in _SIZES for move in MOVES]
        draws = [kind for kind in kinds for _ in range(_EACH)]
        moves = [move(start, self._space, self._budget, random, length) for start, move, length in draws]
        new = [move for move in dict.fromkeys(moves) if move not in asked]
        if not new:
            return moves[0]
        values, shares = _scale(np.array(list(rewards.values()))), _shares(list(scored.values()))
        known, there = self._ratios(list(rewards)), self._ratios(new)
        if len(rewards) >= _GROWTH * self._fitted:
            self._settings, self._fitted = {}, len(rewards)
        priors = dict.fromkeys([self._prior, _nothing] if len(rewards) >= _LEAST else [self._prior])
        fits = [(prior, self._surrogate(prior, known, values, shares)) for prior in priors]
        prior, surrogate = max(fits, key=lambda fit: fit[1].likelihood)
        # To surpass the best by what is expected anyway is no merit.
        return new[int(np.argmax(surrogate.improvement(there, float(values.max()) - prior(there))))]

    def _surrogate(self, prior: Prior, known: np.ndarray, values: np.ndarray, shares: np.ndarray) -> Surrogate:
        """Of what a prior does not say of the values."""
        setting = self._settings.get(prior)
        surrogate = Surrogate(known, values - prior(known), shares, setting, parts=len(self._space.parts))
        self._settings[prior] = surrogate.setting
        return surrogate

    def _ratios(self, allocations: list[Allocation]) -> np.ndarray:
        return np.array([allocation.ratios(self._space) for allocation in allocations])


def _nothing(ratios: np.ndarray) -> np.ndarray:
    return np.zeros(len(ratios))


def _scale(rewards: np.ndarray) -> np.ndarray:
    """Damages, which are rewards below zero, multiply rather than add: by their logarithm."""
    scaled: np.ndarray = -np.log(-rewards) if (rewards < 0).all() else rewards
    return scaled


def _shares(scored: list[int | None]) -> np.ndarray:
    """What part of the samples each reward is of: all of them, or at most half where a race was given up."""
    most = max((count for count in scored if count is not None), default=1)
    return np.array([1.0 if count is None else count / (2 * most) for count in scored])
