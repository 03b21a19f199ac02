"""Downhill from the uniform allocation: what each axis's next units are worth there, and a step towards equal worth.

The sensitivity programme prunes each axis of the dense model alone and adds the damages up; but they do not add up:
what an axis can spare depends on what the others have lost. Here every axis is narrowed by one step where the
allocation is, on few samples, which are the same for all:

    m_a = (D(k − s_a) − D(k)) / cost of s_a,    D the KL divergence from the dense model.

In the best allocation of a budget all m_a are equal. If damage falls off exponentially with an axis's width, as
`D_a ∝ exp(−k_a / (η·F_a))`, the allocation with least damage has the ratios

    p_a − η·(log m_a − mean of log m),

projected onto the budget: a step of mirror descent with the entropy (Beck & Teboulle 2003). Few samples are noisy, and
neighbouring layers are alike, so the logarithms are taken as they are, and smoothed over depth; either with several η.
Which of these steps is best, and whether it is better than where it began, is judged on as many other samples.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum

import numpy as np

from lop.search.ledger import Ledger
from lop.search.loop import Watcher, Workers, evaluate_recorded
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, Space, project, uniform

# Of an axis, which is narrowed by so much, in whole steps.
_PART = 1 / 12
_RATES = (0.2, 0.08, 0.03)
# Of the logarithms of a layer and its neighbours, before a step.
_KERNELS = (np.ones(1), np.array([1, 2, 3, 2, 1]) / 9)
# What hardly hurts on so few samples, or seems to help, counts as this quantile of all.
_FLOOR = 0.1


class Few(IntEnum):
    """Which of a descent's samples, as ledgers have it."""

    MEASURE = 1
    JUDGE = 2


Damage = Callable[[Sequence[Allocation], Few], list[float]]


def descend(space: Space, budget: int, rounds: int, damage: Damage) -> list[Allocation]:
    """The allocations of `budget` that each round ended at, where it found a better one than the one before.

    Args:
        damage: of allocations; those that do not depend on each other are asked for together.
    """
    known: dict[tuple[Allocation, Few], float] = {}

    def look(allocations: Iterable[Allocation], few: Few) -> list[float]:
        asked = list(allocations)
        new = [allocation for allocation in dict.fromkeys(asked) if (allocation, few) not in known]
        known.update(zip(((allocation, few) for allocation in new), damage(new, few), strict=True))
        return [known[allocation, few] for allocation in asked]

    now = uniform(space, budget)
    path: list[Allocation] = []
    for _ in range(rounds):
        moves = [_narrowed(space, now, axis) for axis in range(space.axes)]
        base, *worse = look([now, *moves], Few.MEASURE)
        saved = [space.cost(now.widths) - space.cost(move.widths) for move in moves]
        steps = [now, *_steps(space, budget, now, (np.array(worse) - base) / [less or 1 for less in saved])]
        best = steps[int(np.argmin(look(steps, Few.JUDGE)))]
        if best == now:
            break
        now = best
        path.append(now)
    return path


class RecordedDamages:
    """Damages as workers find them; what the ledger holds is not evaluated again.

    Args:
        planned: the most that are asked for.

    Attributes:
        scored: evaluations asked for so far.
    """

    def __init__(self, workers: Workers, ledger: Ledger, planned: int, *, watcher: Watcher | None = None) -> None:
        self._workers, self._ledger, self._planned, self._watcher = workers, ledger, planned, watcher
        self.scored = 0

    def __call__(self, allocations: Sequence[Allocation], few: Few) -> list[float]:
        candidates = [Candidate(allocation, few=few) for allocation in allocations]
        found = evaluate_recorded(candidates, self._workers, self._ledger, self._tell)
        self.scored += len(allocations)
        return [-found[allocation].worth("divergence") for allocation in allocations]

    def finish(self) -> None:
        """No more are asked for."""
        self._planned = self.scored
        self._tell(0)

    def _tell(self, done: int) -> None:
        if self._watcher:
            self._watcher.prepared("descent", self.scored + done, self._planned)
            self._watcher.tick(self._workers)


def most_evaluations(space: Space, rounds: int) -> int:
    """The most damages that a descent asks for."""
    return rounds * (2 + space.axes + len(_RATES) * len(_KERNELS))


def _narrowed(space: Space, now: Allocation, axis: int) -> Allocation:
    """The allocation with an axis narrower by a step; wider where it has the least width."""
    part, width = space.parts[axis // space.layers], now.widths[axis]
    step = max(round(_PART * part.width / part.step), 1) * part.step
    change = min(step, width - part.min_width) or -min(step, part.width - width)
    return Allocation((*now.widths[:axis], width - change, *now.widths[axis + 1 :]))


def _steps(space: Space, budget: int, now: Allocation, worth: np.ndarray) -> list[Allocation]:
    """Where steps of each kind and length lead.

    Args:
        worth: [axes], m.
    """
    least = max(float(np.quantile(np.abs(worth), _FLOOR)), np.finfo(float).tiny)
    logs = np.log(np.maximum(worth, least)).reshape(len(space.parts), space.layers)
    ratios = np.array(now.ratios(space))
    steps = []
    for kernel in _KERNELS:
        around = np.pad(logs, ((0, 0), (len(kernel) // 2,) * 2), mode="edge")
        smooth = np.concatenate([np.convolve(part, kernel, mode="valid") for part in around])
        steps += [project(ratios - rate * (smooth - smooth.mean()), space, budget) for rate in _RATES]
    return list(dict.fromkeys(steps))
