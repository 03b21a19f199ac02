"""Evolution: EvoPress (Sieberling et al., 2024) over the same allocations, with the exact budget."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lop.methods.method import Discovery, Method, Need, Reward, Root, Search, Side, Worth, look_up
from lop.space.allocation import Allocation, Space, uniform

_MOST_MOVES = 3


@dataclass(frozen=True)
class Selection:
    """One round of a generation's selection: how many survive, judged on which share of the samples."""

    survivors: int
    share: float


# A generation costs 16/16 + 4/4 + 1 evaluations on all samples: growing samples for fewer candidates.
OFFSPRING = 16
ROUNDS = (Selection(survivors=4, share=1 / 16), Selection(survivors=1, share=1 / 4), Selection(survivors=1, share=1))


@dataclass(frozen=True)
class Step:
    """How far an evolution is: evaluations spent, in units of all samples, and the best allocation with its worth."""

    spent: float
    best: Allocation
    worth: Worth


@dataclass(frozen=True)
class Reach:
    """How far widths may be from those of a centre."""

    centre: Allocation
    most: int


def mutate(
    allocation: Allocation,
    space: Space,
    random: np.random.Generator,
    *,
    step: int,
    moves: int = _MOST_MOVES,
    reach: Reach | None = None,
) -> Allocation:
    """A neighbour of the same budget: up to `moves` times, one layer gives `step` neurons to another.

    The number of moves is the lesser of two uniform draws, as EvoPress has it. A move that a layer's limits forbid is
    drawn again; an allocation that allows none is returned as it is.
    """
    widths = list(allocation.widths)
    least, most = [space.min_width] * space.layers, [space.max_width(allocation.budget)] * space.layers
    if reach is not None:
        least = [max(low, width - reach.most) for low, width in zip(least, reach.centre.widths)]
        most = [min(high, width + reach.most) for high, width in zip(most, reach.centre.widths)]
    for _ in range(min(random.integers(1, moves + 1, 2))):
        givers = [layer for layer, width in enumerate(widths) if width - step >= least[layer]]
        takers = [layer for layer, width in enumerate(widths) if width + step <= most[layer]]
        pairs = [(giver, taker) for giver in givers for taker in takers if giver != taker]
        if pairs:
            giver, taker = pairs[random.integers(len(pairs))]
            widths[giver] -= step
            widths[taker] += step
    return Allocation(tuple(widths))


def evolve(
    start: Allocation,
    space: Space,
    worth: Callable[[Allocation, float], Worth],
    *,
    evaluations: float,
    seed: Sequence[int],
    step: int,
    offspring: int = OFFSPRING,
    rounds: Sequence[Selection] = ROUNDS,
    moves: int = _MOST_MOVES,
    reach: Reach | None = None,
    known: Worth | None = None,
) -> Iterator[Step]:
    """(1 + λ) evolution with paired ± moves; yields the state after the start and after each generation.

    Each generation makes λ children of the best allocation and selects among them in rounds, on more samples for fewer
    of them. The last survivor takes its parent's place if it is worth at least as much on all samples.

    Args:
        worth: of an allocation on the first share of the samples.
        evaluations: to spend, in units of all samples; a generation that would exceed it is not begun.
        step: neurons that a move takes from one layer and gives to another; a multiple of the granularity.
        moves, reach: as in `mutate`.
        known: what the start is worth, if it has been evaluated.
    """
    random = np.random.default_rng(list(seed))
    best, best_worth = start, worth(start, 1.0) if known is None else known
    spent = 1.0 if known is None else 0.0
    yield Step(spent, best, best_worth)
    sizes = [offspring, *(selection.survivors for selection in rounds)]
    cost = sum(size * selection.share for size, selection in zip(sizes, rounds))
    while spent + cost <= evaluations + 1e-9:
        candidates = [mutate(best, space, random, step=step, moves=moves, reach=reach) for _ in range(offspring)]
        worths: list[Worth] = []
        for selection in rounds:
            worths = [worth(candidate, selection.share) for candidate in candidates]
            ranked = sorted(range(len(worths)), key=worths.__getitem__, reverse=True)[: selection.survivors]
            candidates, worths = [candidates[i] for i in ranked], [worths[i] for i in ranked]
        spent += cost
        if worths[0] >= best_worth:
            best, best_worth = candidates[0], worths[0]
        yield Step(spent, best, best_worth)


def evolution(space: Space, reward: Reward, budgets: Sequence[int], seed: int) -> Iterator[Discovery]:
    """From the uniform allocation, for each budget."""
    for budget in budgets:
        steps = list(
            evolve(
                uniform(space, budget),
                space,
                reward.worth,
                evaluations=reward.evaluations,
                seed=(seed, budget),
                step=space.granularity,
            )
        )
        curve = tuple((step.spent, step.worth[0]) for step in steps)
        yield Discovery(budget, steps[-1].best, steps[-1].worth, curve)


METHOD = Method(
    "evolution",
    Side.RIVAL,
    look_up,
    needs=frozenset({Need.ACTIVATIONS, Need.EVALUATIONS}),
    root=Root.FOUND,
    search=Search(evolution, shares=tuple(selection.share for selection in ROUNDS)),
    has_profile=True,
    in_curves="evolution",
)
