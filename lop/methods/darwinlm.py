"""DarwinLM (Tang et al., 2025) and ZipLM (Kurtic et al., NeurIPS 2023): the optimal brain surgeon for whole neurons.

Of each layer's neurons the one of least `Σ_i W_ij² / (G⁻¹)_jj` is removed, the others make up for it, and so on (ZipLM,
eq. 2 and 3; `src/fast_obc_struct.py` of github.com/IST-DASLab/DarwinLM: `step`): see `lop.model.removal`. The weights
that this leaves are those of recovery `refit` from one factor, in this order, and that is how they are made here; with
recovery `none` only the order counts.

Widths: the exact additive programme over each layer's error, as a share of its output, at each width: ZipLM's prior,
with the same weight for every layer. DarwinLM searches by evolution instead, with moves like those of
`evolution`, and trains each offspring a little before it is judged: that training is not covered, nor are attention
heads, ZipLM's speed-aware targets and its distillation, and gradual pruning: all layers see the dense model's inputs.
"""

from typing import TYPE_CHECKING

import numpy as np

from lop.methods.method import Method, Need, Side, reading
from lop.space.allocation import Allocation, Space

if TYPE_CHECKING:
    from lop.model.statistics import NeuronStatistics


def least_error(statistics: "NeuronStatistics", space: Space, budget: int) -> Allocation:
    """The widths whose relative errors have the least sum.

    Raises:
        LopError: the statistics have no errors; `lop.run.surveys.statistics_for` has them.
    """
    # Not before it is asked for: the ledger has pyarrow behind it.
    from lop.search.sensitivity import best_additive

    widths = np.arange(space.min_width, space.neurons + 1, space.granularity)
    return best_additive(space, statistics.surveyed("errors")[:, widths], budget)


METHOD = Method(
    "darwinlm",
    Side.BASELINE,
    reading(least_error),
    needs=frozenset({Need.ACTIVATIONS, Need.REMOVAL}),
    importance="surgeon",
    start=least_error,
    has_profile=True,
    label="DarwinLM",
)
