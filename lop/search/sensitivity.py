"""The sensitivity programme: each axis pruned alone, and the best allocation if damages simply added up."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from lop.errors import LopError
from lop.search.ledger import Ledger
from lop.search.loop import Watcher, Workers, evaluate_recorded
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, Space, dense, shares


def measure_damages(
    space: Space, levels: int, workers: Workers, ledger: Ledger, *, watcher: Watcher | None = None
) -> np.ndarray:
    """[axes, n] the damage of each of an axis's widths, least to dense, of each axis alone.

    Damage is the KL divergence from the dense model on the reward samples, measured at `levels` widths. What the ledger
    holds is not evaluated again. Parts of fewer widths than others have infinite damages behind their own.

    Args:
        workers: must measure divergences.
    """
    widths = [scan_widths(space, levels, part) for part in range(len(space.parts))]
    found = damages_at(space, widths, workers, ledger, watcher=watcher)
    tables = [damage_table(space, chosen, damages, part) for part, (chosen, damages) in enumerate(zip(widths, found))]
    most = max(table.shape[1] for table in tables)
    return np.concatenate(
        [np.pad(table, ((0, 0), (0, most - table.shape[1])), constant_values=np.inf) for table in tables]
    )


def damages_at(
    space: Space,
    widths: Sequence[Sequence[int]],
    workers: Workers,
    ledger: Ledger,
    *,
    watcher: Watcher | None = None,
) -> list[np.ndarray]:
    """By part [L, len(widths)] the damage of each axis alone at some widths below the dense one.

    Args:
        widths: of each part; see `measure_damages`.
    """
    alone = [allocation for part, chosen in enumerate(widths) for allocation in scan(space, chosen, part)]

    def progress(done: int) -> None:
        if watcher:
            watcher.prepared("scan", done, len(alone))
            watcher.tick(workers)

    found = evaluate_recorded(list(map(Candidate, alone)), workers, ledger, progress)
    damages = iter([-found[allocation].worth("divergence") for allocation in alone])
    return [np.reshape(list(islice(damages, space.layers * len(chosen))), (space.layers, -1)) for chosen in widths]


def scan_widths(space: Space, levels: int, part: int = 0) -> list[int]:
    """At most `levels` widths of an axis, evenly spread from the least to the one before the dense one."""
    units = space.parts[part].widths[:-1]
    chosen = np.unique(np.linspace(0, len(units) - 1, min(levels, len(units))).round().astype(int))
    return [int(width) for width in units[chosen]]


def scan(space: Space, widths: Sequence[int], part: int = 0) -> list[Allocation]:
    """The allocations to measure: each axis of a part alone at each width, all others dense; layer by layer."""
    full, first = dense(space).widths, part * space.layers
    return [
        Allocation((*full[:axis], width, *full[axis + 1 :]))
        for axis in range(first, first + space.layers)
        for width in widths
    ]


def damage_table(space: Space, widths: Sequence[int], damages: np.ndarray, part: int = 0) -> np.ndarray:
    """[L, n] the damage at each of the widths of a part's axes, least to dense, linear between the measured ones.

    Args:
        damages: [L, len(widths)], measured at `widths` (ascending); the dense model's is 0.
    """
    every, measured = space.parts[part].widths, np.append(widths, space.parts[part].width)
    return np.stack([np.interp(every, measured, np.append(row, 0.0)) for row in damages])


def best_additive(space: Space, table: np.ndarray, budget: int, *, exactly: bool = True) -> Allocation:
    """The allocation of `budget` with the least sum of damages: an exact dynamic programme over the axes.

    `best[l, b] = min_w best[l − 1, b − w] + table[l, w]` over widths in units of the part's step; ties go to the
    narrower width of the later layer. O(L · n · budget / granularity). No layer is wider than the space's `max_width`.
    Axes of one part cost alike, so the sums of each part are found by themselves, for any number of its steps, and then
    all ways to share the budget between the parts are looked at: exact, whatever their units cost.

    Args:
        table: [axes, n] from `measure_damages`; infinite at widths that an axis must not have.
        exactly: otherwise it may keep fewer neurons, of FFNs alone; among equal sums, the fewest.

    Raises:
        LopError: no allocation keeps `budget`.
    """
    ffn = space.parts[0]
    lows = [space.layers * part.min_width // part.step for part in space.parts]
    options = [len(part.widths) for part in space.parts]
    options[0] = (space.max_width(budget) - ffn.min_width) // ffn.step + 1
    if space.attention is None:
        ways: tuple[np.ndarray, ...] = (np.array([budget // ffn.step]),)
        if budget % ffn.step or not 0 <= ways[0][0] - lows[0] <= space.layers * (options[0] - 1):
            raise LopError(f"{budget} neurons cannot be kept: not a multiple of {ffn.step} within the limits")
    else:
        ways = shares(space, budget)
    spare = [kept - low for kept, low in zip(ways, lows)]
    rows = np.split(table, len(space.parts))
    programmes = [
        _programme(row[:, :most], int(extra.max())) for row, most, extra in zip(rows, options, spare, strict=True)
    ]
    sums = sum(best[extra] for (best, _), extra in zip(programmes, spare))
    assert isinstance(sums, np.ndarray)
    chosen = int(sums.argmin())
    ends = [int(extra[chosen]) for extra in spare]
    if not exactly:
        ends[0] = int(programmes[0][0].argmin())
    if not all(np.isfinite(best[end]) for (best, _), end in zip(programmes, ends)):
        raise LopError(f"{budget} neurons cannot be kept: no layers' widths that are allowed come to that")
    widths = [
        part.min_width + extra * part.step
        for part, (_, choices), end in zip(space.parts, programmes, ends)
        for extra in _walked_back(choices, end)
    ]
    return Allocation(tuple(widths))


def _programme(table: np.ndarray, spare: int) -> tuple[np.ndarray, np.ndarray]:
    """The least sums [spare + 1] of damages by the steps kept above the least, and how many [L, spare + 1] are whose.

    Args:
        table: [L, n], by the steps that a layer keeps above the least.
    """
    best = np.full(spare + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(table), spare + 1), dtype=np.int64)
    for layer, row in enumerate(table):
        options = np.full((len(row), spare + 1), np.inf)
        for extra in range(min(len(row), spare + 1)):
            options[extra, extra:] = best[: spare + 1 - extra] + row[extra]
        choices[layer] = options.argmin(axis=0)
        best = options.min(axis=0)
    return best, choices


def _walked_back(choices: np.ndarray, spare: int) -> list[int]:
    """[L] the steps that each layer keeps above the least where all keep `spare`."""
    extras = []
    for row in reversed(choices):
        extras.append(int(row[spare]))
        spare -= extras[-1]
    return extras[::-1]
