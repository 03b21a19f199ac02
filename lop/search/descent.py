"""Downhill from the uniform allocation: what each axis's next units are worth there, and a step towards equal worth.

The sensitivity programme prunes each axis of the dense model alone and adds the damages up; but they do not add up:
what an axis can spare depends on what the others have lost. Here every axis is narrowed by one step where the
allocation is, on few samples, which are the same for all:

    m_a = (D(k − s_a) − D(k)) / cost of s_a,    D the KL divergence from the dense model.

In the best allocation of a budget all m_a are equal. If damage falls off exponentially with an axis's width, as
`D_a ∝ exp(−k_a / (η·F_a))`, the allocation with least damage has the ratios

    p_a − η·(log m_a − mean of log m),

projected onto the budget: a step of mirror descent with the entropy (Beck & Teboulle 2003). Several η are tried, the
best is kept if it is better than before, and the next round begins there.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lop.search.ledger import Ledger
from lop.search.loop import Watcher, Workers, evaluate_recorded
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, Space, project, uniform

# Of an axis, which is narrowed by so much, in whole steps.
_PART = 1 / 12
_RATES = (0.2, 0.08, 0.03)
# What hardly hurts on so few samples, or seems to help, counts as this quantile of all.
_FLOOR = 0.1

Damage = Callable[[Sequence[Allocation]], list[float]]


def descend(space: Space, budget: int, rounds: int, damage: Damage) -> list[Allocation]:
    """The allocations of `budget` that each round ended at, where it found a better one than the one before.

    Args:
        damage: of allocations, on few samples; those of a round are asked for together.
    """
    known: dict[Allocation, float] = {}

    def look(allocations: Iterable[Allocation]) -> None:
        new = [allocation for allocation in dict.fromkeys(allocations) if allocation not in known]
        known.update(zip(new, damage(new), strict=True))

    now = uniform(space, budget)
    path: list[Allocation] = []
    for _ in range(rounds):
        moves = [_narrowed(space, now, axis) for axis in range(space.axes)]
        look([now, *moves])
        saved = [space.cost(now.widths) - space.cost(move.widths) for move in moves]
        worth = [(known[move] - known[now]) / (less or 1) for move, less in zip(moves, saved, strict=True)]
        steps = _steps(space, budget, now, np.array(worth))
        look(steps)
        best = min([now, *steps], key=known.__getitem__)
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

    def __call__(self, allocations: Sequence[Allocation]) -> list[float]:
        candidates = [Candidate(allocation, few=True) for allocation in allocations]
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
    return rounds * (1 + space.axes + len(_RATES))


def _narrowed(space: Space, now: Allocation, axis: int) -> Allocation:
    """The allocation with an axis narrower by a step; wider where it has the least width."""
    part, width = space.parts[axis // space.layers], now.widths[axis]
    step = max(round(_PART * part.width / part.step), 1) * part.step
    change = min(step, width - part.min_width) or -min(step, part.width - width)
    return Allocation((*now.widths[:axis], width - change, *now.widths[axis + 1 :]))


def _steps(space: Space, budget: int, now: Allocation, worth: np.ndarray) -> list[Allocation]:
    """Where steps of each length lead, without `now` itself."""
    logs = np.log(np.maximum(worth, max(float(np.quantile(np.abs(worth), _FLOOR)), np.finfo(float).tiny)))
    ratios = np.array(now.ratios(space))
    found = [project(ratios - rate * (logs - logs.mean()), space, budget) for rate in _RATES]
    return [allocation for allocation in dict.fromkeys(found) if allocation != now]
