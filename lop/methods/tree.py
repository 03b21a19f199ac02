"""LOP's own search from the uniform allocation alone: what the roots are worth."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lop.methods.method import Discovery, Method, Need, Reward, Search, Side, look_up
from lop.search.tree import SearchTree
from lop.space.allocation import Space, uniform


def tree_search(space: Space, reward: Reward, budgets: Sequence[int], seed: int) -> Iterator[Discovery]:
    """One tree for each budget."""
    # Not before a search: the ledger has pyarrow behind it.
    from lop.methods.scratch import temporary_ledger
    from lop.search.loop import run_search

    for budget in budgets:
        tree = SearchTree(
            space,
            [uniform(space, budget)],
            replace(reward.options, opponent=0),  # Whoever is compared scores all samples: no races.
            seed=(seed, budget),
            budget=budget,
            reward=reward.reward,
            tie_breaker=reward.tie_breaker,
        )
        with temporary_ledger() as ledger:
            run_search([tree], reward.workers(), ledger)
        rewards = np.maximum.accumulate([reward.reward(evaluation) for evaluation in tree.results.values()])
        best, evaluation = tree.best
        curve = tuple((count + 1.0, float(value)) for count, value in enumerate(rewards))
        yield Discovery(budget, best, reward.rank(evaluation), curve)


METHOD = Method(
    "mcts-noroots",
    Side.RIVAL,
    look_up,
    needs=frozenset({Need.ACTIVATIONS, Need.EVALUATIONS}),
    is_of_axes=True,
    search=Search(tree_search),
    is_compared=False,  # LOP itself, less its roots.
    in_curves="MCTS without roots",
)
