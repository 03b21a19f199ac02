"""AlphaPruning (Lu et al., NeurIPS 2024): a layer with a heavier-tailed spectrum keeps more."""

from typing import TYPE_CHECKING

from lop.errors import LopError
from lop.methods.method import Method, Need, Root, Side, reading
from lop.methods.spread import unit_range
from lop.space.allocation import Allocation, Space, project

if TYPE_CHECKING:
    from lop.model.statistics import NeuronStatistics

_SPREAD = 0.3


def alpha_pruning(statistics: "NeuronStatistics", space: Space, budget: int) -> Allocation:
    """The ratios are proportional to the tail exponents (mean over the FFN's three matrices) mapped linearly onto
    [1 − ε, 1 + ε], ε = 0.3, and have the target as their mean.

    Raises:
        LopError: the statistics have no exponents; `lop.run.surveys.statistics_for` has them.
    """
    if statistics.exponents is None:
        raise LopError("these statistics have no spectra, which alphapruning needs")
    wanted = 1 - _SPREAD + 2 * _SPREAD * unit_range(statistics.exponents)
    return project(space.ratio(budget) * wanted / wanted.mean(), space, budget)


METHOD = Method(
    "alphapruning",
    Side.BASELINE,
    reading(alpha_pruning),
    needs=frozenset({Need.ACTIVATIONS, Need.SPECTRA}),
    root=Root.READ,
    start=alpha_pruning,
    has_profile=True,
    label="AlphaPruning",
)
