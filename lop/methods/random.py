"""Random search: the moves that the tree makes at its root, always from the uniform allocation."""

from collections.abc import Iterator, Sequence

import numpy as np

from lop.methods.method import Discovery, Method, Need, Reward, Root, Search, Side, Worth, look_up
from lop.space.allocation import Space, project, uniform


def random_search(space: Space, reward: Reward, budgets: Sequence[int], seed: int) -> Iterator[Discovery]:
    """The first allocation is the uniform one."""
    step = reward.options.step
    for budget in budgets:
        random = np.random.default_rng([seed, budget])
        best = uniform(space, budget)
        worth: Worth = (-np.inf,)
        curve: list[tuple[float, float]] = []
        for count in range(reward.evaluations):
            move = random.uniform(-step, step, space.axes) if count else 0.0
            allocation = project(space.ratio(budget) + np.broadcast_to(move, space.axes), space, budget)
            best, worth = max((best, worth), (allocation, reward.worth(allocation)), key=lambda item: item[1])
            curve.append((count + 1.0, worth[0]))
        yield Discovery(budget, best, worth, tuple(curve))


METHOD = Method(
    "random",
    Side.RIVAL,
    look_up,
    needs=frozenset({Need.ACTIVATIONS, Need.EVALUATIONS}),
    root=Root.FOUND,
    is_of_axes=True,
    search=Search(random_search),
    in_curves="random search",
)
