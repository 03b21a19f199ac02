"""Puzzle (Bercovich et al., 2024; ModelOpt's Puzzletron): one-block scores, and an exact programme over them.

A library of FFNs is made for each layer, here at the paper's shares of the width (87, 75, 50, 25, 20 and
10%), and each is scored in the dense model in place of that layer's own, by KL to the dense model's distributions.
The widths are those of the least sum of scores that fits: a mixed-integer programme there (`modelopt/torch/puzzletron`
of github.com/NVIDIA/Model-Optimizer), an exact dynamic programme here.

It is what `sensitivity` does but for three things that are kept as published: a layer may only have a width that was
scored, where `sensitivity` interpolates between an even spread of them; the sum of widths is bounded by the budget, not
equal to it; and the library is fixed, whatever `search.sensitivity_levels` says. What the programme leaves of the
budget is shared out evenly, so that all methods keep equally many neurons. In place of a block's own distillation
before it is scored stands the recovery that all candidates are scored with. Neurons are in the run's own order; its
code ranks them by what they add to the output, nearly as the importance `contribution` does, with which
`benchmarks/company.py` has it, too. Not covered: attention, linear layers and empty ones in the library (the narrowest
FFN that `max_ratio` allows stands for those), throughput and memory as bounds, and the distillation of the whole.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lop.methods.method import Discovery, Method, Need, Reward, Root, Search, Side, look_up
from lop.methods.sensitivity import scanned_once
from lop.space.allocation import Allocation, Space, project

LIBRARY = (0.87, 0.75, 0.5, 0.25, 0.2, 0.1)


def library(space: Space) -> list[int]:
    """The widths below the dense one that a layer may have, ascending: the narrowest, and the library's."""
    near = {round(share * space.neurons / space.granularity) * space.granularity for share in LIBRARY}
    return sorted({space.min_width, *(width for width in near if space.min_width < width < space.neurons)})


def fitting(space: Space, widths: Sequence[int], scores: np.ndarray, budget: int) -> Allocation:
    """The allocation of `budget` nearest to the best choice of the library's widths.

    Args:
        widths: ascending, all below the dense one.
        scores: [L, len(widths)], more is worse; a dense layer's is 0.
    """
    from lop.search.sensitivity import best_additive

    every = np.arange(space.min_width, space.neurons + 1, space.granularity)
    table = np.full((space.layers, len(every)), np.inf)
    table[:, np.searchsorted(every, widths)] = scores
    table[:, -1] = 0.0
    chosen = best_additive(space, table, budget, exactly=False)
    return project(chosen.ratios(space), space, budget)


def puzzle(space: Space, reward: Reward, budgets: Sequence[int], _: int) -> Iterator[Discovery]:
    """One library serves all budgets; nothing is drawn by chance."""
    from lop.search.sensitivity import damages_at

    widths = library(space)
    return scanned_once(
        reward,
        budgets,
        lambda ledger: damages_at(space, [widths], reward.with_divergence(), ledger)[0],
        lambda scores, budget: fitting(space, widths, scores, budget),
    )


METHOD = Method(
    "puzzletron",
    Side.RIVAL,
    look_up,
    needs=frozenset({Need.ACTIVATIONS, Need.EVALUATIONS}),
    root=Root.FOUND,
    search=Search(puzzle, is_shared=True),
    has_profile=True,
    label="Puzzletron",
    in_curves="Puzzletron",
)
