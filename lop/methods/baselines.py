"""Other ways to prune the same neurons to the same budget: what LOP is compared with, and what it may start from.

All of them read off an allocation from the shared statistics, without an evaluation; those that search are in
`lop.methods.rivals`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lop.errors import LopError
from lop.model.importance import activation, flap, fluctuation, magnitude, wanda
from lop.model.statistics import NeuronStatistics
from lop.space.allocation import Allocation, Space, project, uniform

_OWL_OUTLIER = 5.0
_OWL_SPREAD = 0.08
_ALPHA_SPREAD = 0.3

Score = Callable[[NeuronStatistics], np.ndarray]
Spread = Callable[[NeuronStatistics, Space, int], Allocation]


@dataclass(frozen=True)
class Baseline:
    """A published way to choose what to prune.

    Attributes:
        score: the neurons' scores [L, F].
        is_global: one threshold over all layers' standardised scores; otherwise equal ratios in all layers, unless
            there is a `spread`.
        bias: replaces the pruned neurons by their mean contribution, as a bias of `down_proj`.
        spread: how the budget is spread over the layers, where it is neither of the two.
        by_spectra: the spread wants `NeuronStatistics.exponents`.
    """

    score: Score
    is_global: bool = False
    bias: bool = False
    spread: Spread | None = None
    by_spectra: bool = False

    def allocate(self, statistics: NeuronStatistics, space: Space, budget: int) -> Allocation:
        """The allocation of `budget` that this method chooses."""
        if self.spread is not None:
            return self.spread(statistics, space, budget)
        if not self.is_global:
            return uniform(space, budget)
        return global_threshold(self.score(statistics), space, budget)


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


def owl(statistics: NeuronStatistics, space: Space, budget: int) -> Allocation:
    """OWL (Yin et al., ICML 2024): a layer with more outliers among its scores keeps more.

    `D_l` is the share of layer l's scores above M = 5 times their mean. The density is `1 − R + d_l − mean(d)`, where
    `d` is D mapped linearly onto [0, 2λ], λ = 0.08: with LOP's neuron scores in place of Wanda's weight scores.
    """
    scores = activation(statistics)
    outliers = (scores > _OWL_OUTLIER * scores.mean(axis=1, keepdims=True)).mean(axis=1)
    densities = 2 * _OWL_SPREAD * _unit_range(outliers)
    return project(space.ratio(budget) - densities + densities.mean(), space, budget)


def alpha_pruning(statistics: NeuronStatistics, space: Space, budget: int) -> Allocation:
    """AlphaPruning (Lu et al., NeurIPS 2024): a layer with a heavier-tailed spectrum keeps more.

    The ratios are proportional to the tail exponents (mean over the FFN's three matrices) mapped linearly onto
    [1 − ε, 1 + ε], ε = 0.3, and have the target as their mean.

    Raises:
        LopError: the statistics have no exponents; `lop.run.spectra.statistics_for` has them.
    """
    if statistics.exponents is None:
        raise LopError("these statistics have no spectra, which alphapruning needs")
    wanted = 1 - _ALPHA_SPREAD + 2 * _ALPHA_SPREAD * _unit_range(statistics.exponents)
    return project(space.ratio(budget) * wanted / wanted.mean(), space, budget)


def _unit_range(values: np.ndarray) -> np.ndarray:
    """Mapped linearly onto [0, 1]; equal values to the middle."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


# Those that the tables of a short comparison show. FLAP as published: WIFV, AL-AM, with bias.
BASELINES = {
    "uniform": Baseline(activation),
    "magnitude": Baseline(magnitude),
    "wanda": Baseline(wanda),
    "flap": Baseline(flap, is_global=True, bias=True),
}
# FLAP's other settings: three scores, UL-UM (equal ratios) or AL-AM (one threshold), with and without bias. One of
# them, WIFN with equal ratios and no bias, is Wanda-sp.
VARIANTS = {
    f"flap-{metric}-{'al-am' if is_global else 'ul-um'}{'-bias' if bias else ''}": Baseline(score, is_global, bias)
    for metric, score in (("wifv", flap), ("wifn", wanda), ("ifv", fluctuation))
    for is_global in (True, False)
    for bias in (True, False)
    if Baseline(score, is_global, bias) not in BASELINES.values()
}
ALLOCATIONS = {
    "owl": Baseline(activation, spread=owl),
    "alphapruning": Baseline(activation, spread=alpha_pruning, by_spectra=True),
}
ALL_BASELINES = {**BASELINES, **VARIANTS, **ALLOCATIONS}


def root_allocation(name: str, statistics: NeuronStatistics, space: Space, budget: int) -> Allocation:
    """The allocation that a baseline suggests, for the search to start from.

    Methods that prune all layers alike when used by themselves set one threshold over their standardised scores here,
    which tells layers apart; but for `uniform`, which is equal ratios.
    """
    baseline = ALL_BASELINES[name]
    if name == "uniform" or baseline.spread is not None:
        return baseline.allocate(statistics, space, budget)
    return global_threshold(baseline.score(statistics), space, budget)
