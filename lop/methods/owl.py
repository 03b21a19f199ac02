"""OWL (Yin et al., ICML 2024): a layer with more outliers among its scores keeps more."""

from typing import TYPE_CHECKING

from lop.methods.method import Method, Root, Side, reading
from lop.methods.spread import unit_range
from lop.model.importance import activation
from lop.space.allocation import Allocation, Space, project

if TYPE_CHECKING:
    from lop.model.statistics import NeuronStatistics

_OUTLIER = 5.0
_SPREAD = 0.08


def owl(statistics: "NeuronStatistics", space: Space, budget: int) -> Allocation:
    """`D_l` is the share of layer l's scores above M = 5 times their mean.

    The density is `1 − R + d_l − mean(d)`, where `d` is D mapped linearly onto [0, 2λ], λ = 0.08: with LOP's neuron
    scores in place of Wanda's weight scores.
    """
    scores = activation(statistics)
    outliers = (scores > _OUTLIER * scores.mean(axis=1, keepdims=True)).mean(axis=1)
    densities = 2 * _SPREAD * unit_range(outliers)
    return project(space.ratio(budget) - densities + densities.mean(), space, budget)


METHOD = Method("owl", Side.BASELINE, reading(owl), root=Root.READ, start=owl, has_profile=True, label="OWL")
