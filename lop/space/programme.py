"""The exact programme for damages that grow ever faster: what each layer alone costs, to the allocation of a budget."""

import numpy as np

from lop.errors import LopError
from lop.space.allocation import Allocation, Space


def pruned_shares(space: Space) -> np.ndarray:
    """[n] the pruned share of a layer after each unit of the granularity that it can lose, ascending."""
    units = (space.neurons - space.min_width) // space.granularity
    return np.arange(1, units + 1) * space.granularity / space.neurons


def least_damage(space: Space, damages: np.ndarray, budget: int, *, max_share: float = 1.0) -> Allocation:
    """The allocation of `budget` with the least sum of damages, each layer's made convex.

    A layer's next unit never costs less than the one before: where a curve flattens, it goes on as steep as it was.
    With that the cheapest units are the optimum (Federgruen & Groenevelt 1986), and are taken at once: O(L·n).

    Args:
        damages: [L, n], finite, at each of `pruned_shares`.
        max_share: no layer loses more, if the budget can be met so.

    Raises:
        LopError: the budget is not one of the space's.
    """
    layers, units = damages.shape
    cost = np.maximum.accumulate(np.diff(damages, axis=1, prepend=0.0).clip(min=0), axis=1)
    lost, rest = divmod(layers * space.neurons - budget, space.granularity)
    due = (space.neurons - space.max_width(budget)) // space.granularity
    if rest or not layers * due <= lost <= layers * units:
        raise LopError(f"{budget} neurons cannot be kept: not a multiple of {space.granularity} within the limits")
    allowed = int(np.searchsorted(pruned_shares(space), max_share + 1e-9, side="right"))
    if layers * allowed >= lost:
        cost[:, allowed:] = np.inf
    cost[:, :due] = -1.0
    # Of equal costs the unit that leaves its layer widest goes first, and then the later layer's.
    order = np.lexsort((-np.arange(cost.size) // units, np.tile(np.arange(units), layers), cost.ravel()))[:lost]
    removed = np.bincount(order // units, minlength=layers)
    return Allocation(tuple(int(space.neurons - count * space.granularity) for count in removed))
