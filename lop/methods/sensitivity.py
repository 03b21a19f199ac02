"""The sensitivity programme: each layer alone at each level, KL to the dense model; then the additive optimum."""

from collections.abc import Iterator, Sequence

from lop.methods.method import Discovery, Method, Need, Reward, Root, Search, Side, look_up
from lop.space.allocation import Space


def sensitivity_programme(space: Space, reward: Reward, budgets: Sequence[int], _: int) -> Iterator[Discovery]:
    """One scan serves all budgets; nothing is drawn by chance."""
    # Not before a search: the ledger has pyarrow behind it.
    from lop.methods.scratch import temporary_ledger
    from lop.search.sensitivity import best_additive, measure_damages

    with temporary_ledger() as ledger:
        table = measure_damages(space, reward.levels, reward.with_divergence(), ledger)
        scanned = len(ledger)
    for budget in budgets:
        best = best_additive(space, table, budget)
        worth = reward.worth(best)
        yield Discovery(budget, best, worth, ((scanned + 1.0, worth[0]),))


METHOD = Method(
    "sensitivity",
    Side.RIVAL,
    look_up,
    needs=frozenset({Need.ACTIVATIONS, Need.EVALUATIONS}),
    root=Root.SCANNED,
    search=Search(sensitivity_programme, is_shared=True),
    has_profile=True,
    in_curves="sensitivity programme",
)
