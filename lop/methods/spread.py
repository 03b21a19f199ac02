"""How scores of neurons or layers become widths: what several methods share."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lop.model.importance import IMPORTANCES, standardised
from lop.space.allocation import Allocation, Space, project, uniform

if TYPE_CHECKING:
    from lop.model.statistics import NeuronStatistics


def equal_ratios(_: "NeuronStatistics", space: Space, budget: int) -> Allocation:
    """The allocation whose widths differ least, whatever the statistics."""
    return uniform(space, budget)


def by_threshold(importance: str) -> "Callable[[NeuronStatistics, Space, int], Allocation]":
    """One threshold over all layers' scores of an importance."""

    def allocate(statistics: "NeuronStatistics", space: Space, budget: int) -> Allocation:
        return global_threshold(IMPORTANCES[importance](statistics), space, budget)

    return allocate


def global_threshold(scores: np.ndarray, space: Space, budget: int) -> Allocation:
    """FLAP's AL-AM: standardise scores within each layer, keep the best `budget` neurons of all layers.

    The counts are then projected to the space's widths (granularity, p_max).

    Args:
        scores: [L, F]; the deviation is the unbiased one. A layer whose scores are all equal counts as average.
    """
    best = np.argsort(-standardised(scores), axis=None, kind="stable")[:budget]
    counts = np.bincount(best // space.neurons, minlength=space.layers)
    return project(1 - counts / space.neurons, space, budget)


def joint_threshold(neurons: np.ndarray, groups: np.ndarray, space: Space, budget: int) -> Allocation:
    """FLAP's AL-AM over both parts: the best units of all layers, as many as the budget of parameters pays for.

    The counts are then projected to the space's widths.

    Args:
        neurons, groups: scores [L, F] and [L, K] that can be compared with each other. The best come first, of equal
            ones groups.
        space: with attention open.
    """
    scores = np.concatenate([groups.ravel(), neurons.ravel()])
    costs = np.repeat([space.parts[1].cost, space.parts[0].cost], [groups.size, neurons.size])
    best = np.argsort(-scores, kind="stable")
    kept = np.zeros(len(scores))
    kept[best[np.cumsum(costs[best]) <= budget]] = 1
    left = [part.reshape(space.layers, -1).mean(1) for part in np.split(kept, [groups.size])]
    return project(1 - np.concatenate(left[::-1]), space, budget)


def unit_range(values: np.ndarray) -> np.ndarray:
    """Mapped linearly onto [0, 1]; equal values to the middle."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
