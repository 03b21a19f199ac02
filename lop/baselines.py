"""Other ways to prune the same neurons to the same budget: what LOP is compared with, and what it may start from."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lop.allocation import Allocation, Space, project, uniform
from lop.importance import activation, flap, magnitude, wanda
from lop.statistics import NeuronStatistics


@dataclass(frozen=True)
class Baseline:
    """A published way to choose what to prune.

    Attributes:
        score: the neurons' scores [L, F].
        is_global: one threshold over all layers' standardised scores; otherwise equal ratios in all layers.
        bias: replaces the pruned neurons by their mean contribution, as a bias of `down_proj`.
    """

    score: Callable[[NeuronStatistics], np.ndarray]
    is_global: bool = False
    bias: bool = False

    def allocate(self, statistics: NeuronStatistics, space: Space, budget: int) -> Allocation:
        """The allocation of `budget` that this method chooses."""
        if not self.is_global:
            return uniform(space, budget)
        return global_threshold(self.score(statistics), space, budget)


BASELINES = {
    "uniform": Baseline(activation),
    "magnitude": Baseline(magnitude),
    "wanda": Baseline(wanda),
    "flap": Baseline(flap, is_global=True, bias=True),
}


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


def root_allocation(name: str, statistics: NeuronStatistics, space: Space, budget: int) -> Allocation:
    """The allocation that a baseline's scores suggest, for the search to start from.

    `uniform` is equal ratios. The others set one threshold over their standardised scores, which is what tells layers
    apart also for the methods that prune all layers alike when used by themselves.
    """
    if name == "uniform":
        return uniform(space, budget)
    return global_threshold(BASELINES[name].score(statistics), space, budget)
