"""What neighbouring targets have found, brought to each target's budget and mixed with what it has found itself.

Targets are searched apart, each with its own luck. What is good at one budget is nearly so, scaled, at the next: ratios
between the answers of a smaller and a larger target are often better than what the one between has come by (as in
multi-task Bayesian optimisation: Swersky, Snoek & Adams 2013, here without a model). So when the trees have ended, a
few such blends are scored for each target, round after round.
"""

from collections.abc import Sequence

import numpy as np

from lop.search.ledger import Ledger
from lop.search.loop import Watcher, Workers, evaluate_recorded
from lop.search.tree import SearchTree
from lop.space.allocation import Allocation, project


def blend(trees: Sequence[SearchTree], rounds: int, workers: Workers, ledger: Ledger, watcher: Watcher) -> None:
    """Scores blends of the trees' best allocations, and tells them to the trees; ends early where none is new.

    What the ledger holds is not evaluated again.

    Args:
        trees: that have ended, of different budgets.
    """
    ordered = sorted(trees, key=lambda tree: tree.budget, reverse=True)
    for _ in range(rounds):
        owners: dict[Allocation, SearchTree] = {}
        for index, tree in enumerate(ordered):
            smaller = ordered[index - 1] if index else None
            larger = ordered[index + 1] if index + 1 < len(ordered) else None
            owners |= {made: tree for made in blends(tree, smaller, larger) if made not in tree.results}
        if not owners:
            return
        wanted = [tree.candidate(allocation) for allocation, tree in owners.items()]
        found = evaluate_recorded(wanted, workers, ledger, lambda _: watcher.tick(workers))
        for allocation, tree in owners.items():
            tree.learn(allocation, found[allocation])
            watcher.advanced(tree)


def blends(tree: SearchTree, smaller: SearchTree | None, larger: SearchTree | None) -> list[Allocation]:
    """Allocations of a tree's budget from the best of the trees that prune a little less and a little more.

    With both neighbours: their ratios interpolated, these and the tree's own halved, and each neighbour's scaled; with
    one: its ratios scaled, and these and the tree's own halved.
    """
    space, target = tree.space, tree.space.ratio(tree.budget)
    own = np.array(tree.best[0].ratios(space))
    near = [(space.ratio(each.budget), np.array(each.best[0].ratios(space))) for each in (smaller, larger) if each]
    scaled = [ratios * (target / at) for at, ratios in near if at > 0]
    if len(near) == 2:
        (low, below), (high, above) = near
        between = below + (above - below) * (target - low) / (high - low)
        wanted = [between, (own + between) / 2, *scaled]
    else:
        wanted = [each for ratios in scaled for each in (ratios, (own + ratios) / 2)]
    return list(dict.fromkeys(project(ratios, space, tree.budget) for ratios in wanted))
