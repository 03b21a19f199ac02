"""The sensitivity programme: each layer alone at each level, KL to the dense model; then the additive optimum."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lop.methods.method import Discovery, Method, Need, Reward, Root, Search, Side, look_up
from lop.space.allocation import Allocation, Space

if TYPE_CHECKING:
    from lop.search.ledger import Ledger


def scanned_once(
    reward: Reward,
    budgets: Sequence[int],
    scan: "Callable[[Ledger], np.ndarray]",
    best_of: Callable[[np.ndarray, int], Allocation],
) -> Iterator[Discovery]:
    """What a method finds whose one scan serves all budgets.

    Args:
        scan: fills a ledger that is kept for so long only, and makes a table of it.
        best_of: what the table says for a budget.
    """
    # Not before a search: the ledger has pyarrow behind it.
    from lop.methods.scratch import temporary_ledger

    with temporary_ledger() as ledger:
        table = scan(ledger)
        scanned = len(ledger)
    for budget in budgets:
        best = best_of(table, budget)
        worth = reward.worth(best)
        yield Discovery(budget, best, worth, ((scanned + 1.0, worth[0]),))


def sensitivity_programme(space: Space, reward: Reward, budgets: Sequence[int], _: int) -> Iterator[Discovery]:
    """One scan serves all budgets; nothing is drawn by chance."""
    from lop.search.sensitivity import best_additive, measure_damages

    return scanned_once(
        reward,
        budgets,
        lambda ledger: measure_damages(space, reward.levels, reward.with_divergence(), ledger),
        lambda table, budget: best_additive(space, table, budget),
    )


METHOD = Method(
    "sensitivity",
    Side.RIVAL,
    look_up,
    needs=frozenset({Need.ACTIVATIONS, Need.EVALUATIONS}),
    root=Root.SCANNED,
    is_of_axes=True,
    search=Search(sensitivity_programme, is_shared=True),
    has_profile=True,
    in_curves="sensitivity programme",
)
