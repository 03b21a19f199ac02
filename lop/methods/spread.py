"""How scores of neurons or layers become widths: what several methods share."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lop.model.importance import IMPORTANCES
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
    deviation = scores.std(axis=1, ddof=1, keepdims=True)
    standard = (scores - scores.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1)
    best = np.argsort(-standard, axis=None, kind="stable")[:budget]
    counts = np.bincount(best // space.neurons, minlength=space.layers)
    return project(1 - counts / space.neurons, space, budget)


def unit_range(values: np.ndarray) -> np.ndarray:
    """Mapped linearly onto [0, 1]; equal values to the middle."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
