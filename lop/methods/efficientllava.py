"""EfficientLLaVA (Liang et al., CVPR 2025): an allocation that generalises from few samples, found by evolution.

By structural risk minimisation the loss on unseen data is bounded by that on the samples searched on and a term for the
complexity of what was chosen, which for a network is bounded by the norms of its weights. So the search minimises

    loss(a) + η·Σ_l ‖W_l(a)‖_F

over pruning policies a, on few samples, W_l(a) being what a leaves of layer l. In each round the best policies are
crossed and mutated. Here the loss is the search's reward with its sign turned, on a quarter of the reward samples; the
two terms are those of `a` over those of the uniform allocation, which makes η a number without a unit.

Source: arXiv 2503.15369 and the reviews of its earlier version, "SlimLLaVA", which name the two terms (its eq. 4).
Neither code nor values of η, of the population and of the rounds were to be found: η = 0.1, and those below, are ours.
Not covered: the vision projector, which the paper trains between rounds to open the search space further, and sparsity
that is not of whole neurons.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lop.methods.evolution import mutate
from lop.methods.method import Discovery, Method, Need, Reward, Search, Side, look_up
from lop.space.allocation import Allocation, Space, project, uniform

ETA = 0.1
_SHARE = 0.25
_POPULATION = 16
_PARENTS = 4
_SPREAD = 0.3  # Ratios of the first policies lie so far around the target.


def weight_norm(weights: np.ndarray, allocation: Allocation) -> float:
    """`Σ_l ‖W_l‖_F` of what an allocation leaves.

    Args:
        weights: [L, F], the sum of squares of each neuron's weights, in the order in which neurons are kept.
    """
    return float(sum(np.sqrt(row[:width].sum()) for row, width in zip(weights, allocation.widths)))


def cross(first: Allocation, second: Allocation, space: Space, random: np.random.Generator) -> Allocation:
    """Each layer's ratio from one of two allocations of a budget, then projected onto it."""
    ratios = np.where(random.random(space.layers) < 0.5, first.ratios(space), second.ratios(space))
    return project(ratios, space, first.budget)


def minimise_risk(space: Space, reward: Reward, budgets: Sequence[int], seed: int) -> Iterator[Discovery]:
    """One search for each budget; what it finds is evaluated on all samples at the end."""
    for budget in budgets:
        yield _search(space, reward, budget, np.random.default_rng([seed, budget]))


def _search(space: Space, reward: Reward, budget: int, random: np.random.Generator) -> Discovery:
    start = uniform(space, budget)
    risk = _risk(reward, start)
    known = {start: risk(start)}
    most = max(int((reward.evaluations - 1) / _SHARE), 1)
    fresh = [_anywhere(space, budget, random) for _ in range(_POPULATION)]
    while len(known) < most:
        for candidate in dict.fromkeys(fresh[: most - len(known)]):
            if candidate not in known:
                known[candidate] = risk(candidate)
        parents = sorted(known, key=known.__getitem__)[:_PARENTS]
        drawn = [[parents[index] for index in random.integers(len(parents), size=2)] for _ in range(_POPULATION)]
        children = [
            cross(first, second, space, random) if at % 2 else first for at, (first, second) in enumerate(drawn)
        ]
        fresh = [mutate(child, space, random, step=space.granularity) for child in children]
        if known.keys() >= set(fresh):
            break  # There is nothing around that it does not know.
    best = min(known, key=known.__getitem__)
    worth = reward.worth(best)
    return Discovery(budget, best, worth, ((_SHARE * len(known) + 1, worth[0]),))


def _risk(reward: Reward, start: Allocation) -> Callable[[Allocation], float]:
    """Loss and norm of allocations, as shares of a first one's."""

    def loss(allocation: Allocation) -> float:
        return -reward.reward(reward.evaluate(allocation, _SHARE))

    weights = reward.weights()
    losses, norms = abs(loss(start)) or 1.0, weight_norm(weights, start)
    return lambda allocation: loss(allocation) / losses + ETA * weight_norm(weights, allocation) / norms


def _anywhere(space: Space, budget: int, random: np.random.Generator) -> Allocation:
    return project(space.ratio(budget) + random.uniform(-_SPREAD, _SPREAD, space.layers), space, budget)


METHOD = Method(
    "efficientllava",
    Side.RIVAL,
    look_up,
    needs=frozenset({Need.ACTIVATIONS, Need.EVALUATIONS}),
    search=Search(minimise_risk, shares=(_SHARE, 1.0)),
    has_profile=True,
    label="EfficientLLaVA",
    in_curves="EfficientLLaVA",
)
