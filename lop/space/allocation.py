"""Allocations: how many FFN neurons each layer keeps, and the exact budget they meet."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from lop.errors import LopError


@dataclass(frozen=True)
class Space:
    """All allocations of a model.

    Attributes:
        layers: decoder layers, `L`.
        neurons: FFN neurons of each layer, `F`; a multiple of the granularity.
        granularity: widths are multiples of this.
        max_ratio: `p_max`, the largest pruning ratio of a layer, 0 ≤ p_max < 1.
        max_width_ratio: no layer is wider than this many times the mean width, at least 1; bounds what padding all
            layers to the widest costs. None sets no bound.
    """

    layers: int
    neurons: int
    granularity: int
    max_ratio: float
    max_width_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.granularity < 1 or self.neurons % self.granularity:
            raise LopError(f"granularity {self.granularity} does not divide the {self.neurons} neurons of a layer")
        if not 0 <= self.max_ratio < 1:
            raise LopError(f"max_ratio {self.max_ratio} is not in [0, 1)")
        if self.max_width_ratio is not None and not self.max_width_ratio >= 1:
            raise LopError(f"max_width_ratio {self.max_width_ratio} is below 1: no layer could have the mean width")

    @cached_property
    def min_width(self) -> int:
        """The least width of a layer: the smallest multiple of the granularity, at least one, that p_max allows."""
        units = math.ceil((1 - Fraction(str(self.max_ratio))) * self.neurons / self.granularity)
        return max(units, 1) * self.granularity

    @property
    def max_target(self) -> float:
        """The largest target ratio that widths of this granularity can meet, at most p_max."""
        return 1 - self.min_width / self.neurons

    def budget(self, target: float) -> int:
        """The neurons that every allocation of a target ratio keeps in all.

        The largest multiple of the granularity that does not exceed `(1 − target)·L·F`. The target is taken as the
        decimal number that it prints as, so that 0.3 means three tenths.

        Raises:
            LopError: the target is not in [0, max_target].
        """
        if not (math.isfinite(target) and 0 <= target <= self.max_target + 1e-12):
            raise LopError(f"target {target} is outside [0, {self.max_target:.4g}]")
        kept = (1 - Fraction(str(float(target)))) * self.layers * self.neurons
        return max(math.floor(kept / self.granularity) * self.granularity, self.layers * self.min_width)

    def max_width(self, budget: int) -> int:
        """The most that a layer of an allocation of `budget` may keep, at least the mean rounded up."""
        if self.max_width_ratio is None:
            return self.neurons
        mean = Fraction(budget, self.layers * self.granularity)
        units = max(math.floor(Fraction(str(self.max_width_ratio)) * mean), math.ceil(mean))
        return min(units * self.granularity, self.neurons)

    def ratio(self, budget: int) -> float:
        """The mean pruning ratio of the allocations that keep `budget` neurons in all."""
        return 1 - budget / (self.layers * self.neurons)


@dataclass(frozen=True, order=True)
class Allocation:
    """The width (neurons kept) of each layer, first to last."""

    widths: tuple[int, ...]

    @property
    def budget(self) -> int:
        """Neurons kept in all layers together."""
        return sum(self.widths)

    def ratios(self, space: Space) -> tuple[float, ...]:
        """The pruning ratio of each layer, `1 − k_l / F`."""
        return tuple(1 - width / space.neurons for width in self.widths)


def uniform(space: Space, budget: int) -> Allocation:
    """The allocation of `budget` whose widths differ least."""
    return project([space.ratio(budget)] * space.layers, space, budget)


def dense(space: Space) -> Allocation:
    """The allocation that prunes nothing."""
    return Allocation((space.neurons,) * space.layers)


def project(ratios: Sequence[float] | np.ndarray, space: Space, budget: int) -> Allocation:
    """The allocation of `budget` that is nearest, in Euclidean distance, to the given pruning ratios.

    Widths are multiples of the granularity between `min_width` and `max_width` that sum to `budget`. The distance is a
    sum of one convex function a layer, so greedy exchange of single units, started from a Lagrangian optimum, is exact
    (Federgruen & Groenevelt 1986). Ties go to the earlier layer.

    Args:
        ratios: L finite pruning ratios; they may lie outside [0, p_max].

    Raises:
        LopError: the ratios are not L finite numbers, or the budget is not one of the space's.
    """
    wanted = np.asarray(ratios, dtype=np.float64)
    if wanted.shape != (space.layers,) or not np.isfinite(wanted).all():
        raise LopError(f"an allocation needs {space.layers} finite ratios, not {wanted.tolist()}")
    total, rest = divmod(budget, space.granularity)
    low, high = space.min_width // space.granularity, space.max_width(budget) // space.granularity
    if rest or not space.layers * low <= total <= space.layers * high:
        raise LopError(f"{budget} neurons cannot be kept: not a multiple of {space.granularity} within the limits")
    units = (1 - wanted) * (space.neurons / space.granularity)
    start = _lagrangian_start(units, low, high, total)
    return Allocation(tuple(int(u) * space.granularity for u in _exchange(units, start, low, high, total)))


def _lagrangian_start(units: np.ndarray, low: int, high: int, total: int) -> np.ndarray:
    """Integers clip(round(units + shift)) whose sum is `total` or the next above it; optimal for the sum they have."""
    span = float(high - low) + 1
    least, most = float(low - units.max()) - span, float(high - units.min()) + span
    # Where no layer meets a limit, the shift is within one half of this; that saves most of the halvings.
    middle = (total - float(units.sum())) / len(units)
    probes = [middle + 0.5, middle - 0.5]
    for _ in range(64):
        middle = probes.pop() if probes else (least + most) / 2
        # Not `np.clip`, which takes twice as long on so few numbers; a search spends most of its own time here.
        found = np.minimum(np.maximum(np.rint(units + middle), low), high)
        excess = found.sum() - total
        if excess == 0:
            return found.astype(np.int64)
        if excess < 0:
            least = max(least, middle)
        else:
            most = min(most, middle)
    return np.clip(np.rint(units + most), low, high).astype(np.int64)


def _exchange(units: np.ndarray, start: np.ndarray, low: int, high: int, total: int) -> np.ndarray:
    """Adds or takes the unit that costs least until the sum is `total`."""
    current = start.copy()
    step = 1 if current.sum() < total else -1
    limit = high if step > 0 else low

    def cost(layer: int) -> float:
        return 1 + 2 * step * (float(current[layer]) - float(units[layer]))

    # `step * layer` breaks ties: the earlier layer is the first to be given a unit and the last to lose one.
    heap = [(cost(layer), step * layer) for layer in range(len(current)) if current[layer] != limit]
    heapq.heapify(heap)
    for _ in range(abs(total - int(current.sum()))):
        _, key = heapq.heappop(heap)
        layer = step * key
        current[layer] += step
        if current[layer] != limit:
            heapq.heappush(heap, (cost(layer), key))
    return current
