"""The sensitivity programme: each layer pruned alone, and the best allocation if damages simply added up."""

from collections.abc import Sequence

import numpy as np

from lop.errors import LopError
from lop.search.ledger import Ledger
from lop.search.loop import Watcher, Workers, evaluate_recorded
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, Space


def measure_damages(
    space: Space, levels: int, workers: Workers, ledger: Ledger, *, watcher: Watcher | None = None
) -> np.ndarray:
    """[L, n] the damage of each of the space's n widths, least to dense, of each layer alone.

    Damage is the KL divergence from the dense model on the reward samples, measured at `levels` widths. What the ledger
    holds is not evaluated again.

    Args:
        workers: must measure divergences.
    """
    widths = scan_widths(space, levels)
    return damage_table(space, widths, damages_at(space, widths, workers, ledger, watcher=watcher))


def damages_at(
    space: Space, widths: Sequence[int], workers: Workers, ledger: Ledger, *, watcher: Watcher | None = None
) -> np.ndarray:
    """[L, len(widths)] the damage of each layer alone at some widths below the dense one; see `measure_damages`."""
    alone = scan(space, widths)

    def progress(done: int) -> None:
        if watcher:
            watcher.scanned(done, len(alone))
            watcher.tick(workers)

    found = evaluate_recorded(list(map(Candidate, alone)), workers, ledger, progress)
    damages = [-found[allocation].worth("divergence") for allocation in alone]
    return np.reshape(damages, (space.layers, len(widths)))


def scan_widths(space: Space, levels: int) -> list[int]:
    """At most `levels` widths of a layer, evenly spread from the least to the one before the dense one."""
    units = np.arange(space.min_width, space.neurons, space.granularity)
    chosen = np.unique(np.linspace(0, len(units) - 1, min(levels, len(units))).round().astype(int))
    return [int(width) for width in units[chosen]]


def scan(space: Space, widths: Sequence[int]) -> list[Allocation]:
    """The allocations to measure: each layer alone at each width, all others dense; layer by layer."""
    full = [space.neurons] * space.layers
    return [Allocation((*full[:layer], width, *full[layer + 1 :])) for layer in range(space.layers) for width in widths]


def damage_table(space: Space, widths: Sequence[int], damages: np.ndarray) -> np.ndarray:
    """[L, n] the damage at each of the space's n widths, least to dense, linear between the measured ones.

    Args:
        damages: [L, len(widths)], measured at `widths` (ascending); the dense model's is 0.
    """
    every = np.arange(space.min_width, space.neurons + 1, space.granularity)
    measured = np.append(widths, space.neurons)
    return np.stack([np.interp(every, measured, np.append(row, 0.0)) for row in damages])


def best_additive(space: Space, table: np.ndarray, budget: int, *, exactly: bool = True) -> Allocation:
    """The allocation of `budget` with the least sum of damages: an exact dynamic programme over the layers.

    `best[l, b] = min_w best[l − 1, b − w] + table[l, w]` over widths in units of the granularity; ties go to the
    narrower width of the later layer. O(L · n · budget / granularity). No layer is wider than the space's `max_width`.

    Args:
        table: [L, n] from `damage_table`; infinite at widths that a layer must not have.
        exactly: otherwise it may keep fewer neurons; among equal sums, the fewest.

    Raises:
        LopError: no allocation keeps `budget` neurons.
    """
    low = space.min_width // space.granularity
    layers = len(table)
    widths = (space.max_width(budget) - space.min_width) // space.granularity + 1
    spare = budget // space.granularity - layers * low
    if budget % space.granularity or not 0 <= spare <= layers * (widths - 1):
        raise LopError(f"{budget} neurons cannot be kept: not a multiple of {space.granularity} within the limits")
    best = np.full(spare + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((layers, spare + 1), dtype=np.int64)
    for layer in range(layers):
        options = np.full((widths, spare + 1), np.inf)
        for extra in range(min(widths, spare + 1)):
            options[extra, extra:] = best[: spare + 1 - extra] + table[layer, extra]
        choices[layer] = options.argmin(axis=0)
        best = options.min(axis=0)
    if not exactly:
        spare = int(best.argmin())
    if not np.isfinite(best[spare]):
        raise LopError(f"{budget} neurons cannot be kept: no layers' widths that are allowed come to that")
    extras = []
    for layer in reversed(range(layers)):
        extras.append(int(choices[layer, spare]))
        spare -= extras[-1]
    return Allocation(tuple((low + extra) * space.granularity for extra in reversed(extras)))
