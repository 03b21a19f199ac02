"""Allocations: how many units each axis keeps, and the budget that they meet.

An axis is one part of one layer. FFNs are always open, in neurons; attention may be, in groups (a key/value head with
the query heads that share it). Axes stand in this order: the FFNs of all layers, then their attention.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from lop.errors import LopError

FFN, ATTENTION = PARTS = "ffn", "attention"
# A ratio that no width comes near, so that all which can be is taken from whoever is asked for it.
_FAR = 1e6


@dataclass(frozen=True)
class Attention:
    """What opens attention beside the FFNs.

    Attributes:
        groups: of each dense layer.
        group_parameters: that one holds: its rows of the projections of queries, keys and values, with their biases,
            and its columns of `o_proj`.
        neuron_parameters: that one FFN neuron holds.
    """

    groups: int
    group_parameters: int
    neuron_parameters: int


@dataclass(frozen=True)
class Part:
    """One part of every layer: an axis a layer, all alike.

    Attributes:
        name: `ffn` or `attention`.
        width: of the dense layer, in units: neurons or groups.
        step: widths are multiples of this.
        min_width: the least that a layer keeps.
        cost: of a unit: its parameters where several parts are open, else 1.
    """

    name: str
    width: int
    step: int
    min_width: int
    cost: int

    @cached_property
    def widths(self) -> np.ndarray:
        """[n] all that an axis may keep, the least first."""
        return np.arange(self.min_width, self.width + 1, self.step)


@dataclass(frozen=True)
class Space:
    """All allocations of a model.

    Attributes:
        layers: decoder layers, `L`.
        neurons: FFN neurons of each layer, `F`; a multiple of the granularity.
        granularity: FFN widths are multiples of this.
        max_ratio: `p_max`, the largest pruning ratio of an axis, 0 ≤ p_max < 1.
        max_width_ratio: no layer is wider than this many times the mean width, at least 1; bounds what padding all
            layers to the widest costs. None sets no bound.
        attention: what its groups are; None leaves attention alone.
        vanishing: an axis may go to width 0, whatever p_max says.
    """

    layers: int
    neurons: int
    granularity: int
    max_ratio: float
    max_width_ratio: float | None = None
    attention: Attention | None = None
    vanishing: bool = False

    def __post_init__(self) -> None:
        if self.granularity < 1 or self.neurons % self.granularity:
            raise LopError(f"granularity {self.granularity} does not divide the {self.neurons} neurons of a layer")
        if not 0 <= self.max_ratio < 1:
            raise LopError(f"max_ratio {self.max_ratio} is not in [0, 1)")
        if self.max_width_ratio is not None and not self.max_width_ratio >= 1:
            raise LopError(f"max_width_ratio {self.max_width_ratio} is below 1: no layer could have the mean width")
        if self.max_width_ratio is not None and self.attention is not None:
            raise LopError("max_width_ratio is of FFNs alone: leave it out, or open no attention (parts)")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; without what spaces before there was attention did not have, where it is as it was."""
        values = asdict(self)
        if self.attention is None:
            del values["attention"]
        if not self.vanishing:
            del values["vanishing"]
        return values

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What is open, in the order of axes."""
        attention = self.attention
        cost = attention.neuron_parameters if attention else 1
        ffn = Part(FFN, self.neurons, self.granularity, self.min_width, cost)
        if attention is None:
            return (ffn,)
        least = self._least(attention.groups, 1)
        return ffn, Part(ATTENTION, attention.groups, 1, least, attention.group_parameters)

    @property
    def shape(self) -> str:
        """Layers and the neurons of each, as `LxF`; with attention what a unit costs, too: `LxF of 8 + LxK of 99`."""
        if self.attention is None:
            return f"{self.layers}x{self.neurons}"
        return " + ".join(f"{self.layers}x{part.width} of {part.cost}" for part in self.parts)

    @property
    def axes(self) -> int:
        """How many there are."""
        return self.layers * len(self.parts)

    @cached_property
    def min_width(self) -> int:
        """The least width of an FFN: the smallest multiple of the granularity, at least one, that p_max allows."""
        return self._least(self.neurons, self.granularity)

    def _least(self, width: int, step: int) -> int:
        if self.vanishing:
            return 0
        return max(math.ceil((1 - Fraction(str(self.max_ratio))) * width / step), 1) * step

    @cached_property
    def whole(self) -> int:
        """What the dense model costs: its neurons, or the parameters of all that is open."""
        return self.layers * sum(part.cost * part.width for part in self.parts)

    @cached_property
    def least(self) -> int:
        """What the leanest allocation costs."""
        return self.layers * sum(part.cost * part.min_width for part in self.parts)

    @property
    def max_target(self) -> float:
        """The largest target ratio that widths of this granularity can meet."""
        return 1 - self.least / self.whole

    def budget(self, target: float) -> int:
        """What allocations of a target ratio may cost.

        Of FFNs alone it is the neurons that every allocation keeps in all, the largest multiple of the granularity that
        does not exceed `(1 − target)·L·F`. With attention it is parameters, `(1 − target)` of all that is open: no
        allocation costs more, and what is left pays for no further unit. The target is taken as the decimal number that
        it prints as, so that 0.3 means three tenths.

        Raises:
            LopError: the target is not in [0, max_target].
        """
        if not (math.isfinite(target) and 0 <= target <= self.max_target + 1e-12):
            raise LopError(f"target {target} is outside [0, {self.max_target:.4g}]")
        kept = (1 - Fraction(str(float(target)))) * self.whole
        step = self.granularity if self.attention is None else 1
        return max(math.floor(kept / step) * step, self.least)

    def max_width(self, budget: int) -> int:
        """The most that an FFN of an allocation of `budget` may keep, at least the mean rounded up."""
        if self.max_width_ratio is None:
            return self.neurons
        mean = Fraction(budget, self.layers * self.granularity)
        units = max(math.floor(Fraction(str(self.max_width_ratio)) * mean), math.ceil(mean))
        return min(units * self.granularity, self.neurons)

    def ratio(self, budget: int) -> float:
        """The pruning ratio of what costs `budget`: of FFNs alone, the mean of all layers'."""
        return 1 - budget / self.whole

    def cost(self, widths: Sequence[int]) -> int:
        """What the widths of all axes cost together."""
        return sum(part.cost * sum(kept) for part, kept in zip(self.parts, self.by_part(widths), strict=True))

    def ratio_of(self, widths: Sequence[int]) -> float:
        """The pruning ratio of the widths of all axes."""
        return self.ratio(self.cost(widths))

    def by_part(self, widths: Sequence[int]) -> list[Sequence[int]]:
        """The widths of all axes, by part."""
        return [widths[start : start + self.layers] for start in range(0, len(widths), self.layers)]

    @property
    def ffns(self) -> "Space":
        """The same with attention left alone; its budgets count neurons."""
        return Space(
            self.layers, self.neurons, self.granularity, self.max_ratio, self.max_width_ratio, None, self.vanishing
        )


def parse_space(data: Mapping[str, Any]) -> Space:
    """The inverse of `Space.as_dict`.

    Raises:
        LopError: it is no space.
        TypeError: keys are missing or unknown.
    """
    values = dict(data)
    if values.get("attention") is not None:
        values["attention"] = Attention(**values["attention"])
    return Space(**values)


def parse_shape(text: str) -> tuple[list[int], list[int]]:
    """Of each axis the dense width, and what a unit costs, as `Space.shape` has them."""
    widths, costs = [], []
    for part in text.split(" + "):
        numbers, _, cost = part.partition(" of ")
        layers, _, width = numbers.partition("x")
        widths += [int(width)] * int(layers)
        costs += [int(cost or 1)] * int(layers)
    return widths, costs


@dataclass(frozen=True, order=True)
class Allocation:
    """The width (units kept) of each axis: of the layers' FFNs, first to last, then of their attention if open."""

    widths: tuple[int, ...]

    @property
    def budget(self) -> int:
        """Units kept on all axes together: what an allocation of FFNs alone costs; `Space.cost` knows any."""
        return sum(self.widths)

    def ratios(self, space: Space) -> tuple[float, ...]:
        """The pruning ratio of each axis, `1 − k_l / F` of an FFN."""
        dense = [part.width for part in space.parts for _ in range(space.layers)]
        return tuple(1 - width / whole for width, whole in zip(self.widths, dense, strict=True))


def uniform(space: Space, budget: int) -> Allocation:
    """The allocation of `budget` whose axes' ratios differ least."""
    return project([space.ratio(budget)] * space.axes, space, budget)


def dense(space: Space) -> Allocation:
    """The allocation that prunes nothing."""
    return Allocation(tuple(part.width for part in space.parts for _ in range(space.layers)))


def leanest(space: Space) -> Allocation:
    """The allocation that prunes the most."""
    return Allocation(tuple(part.min_width for part in space.parts for _ in range(space.layers)))


def of_ffns(space: Space, budget: int, allocate: Callable[[Space, int], Allocation]) -> Allocation:
    """What somebody allocates who knows FFNs alone: attention stays dense where the budget allows.

    Where it does not, FFNs keep the least and the layers' attention shares the rest.

    Args:
        allocate: given a space of FFNs alone, and a budget of neurons.
    """
    if space.attention is None:
        return allocate(space, budget)
    ffn, attention = space.parts
    rest = budget - space.layers * attention.cost * attention.width
    if rest >= space.layers * ffn.cost * ffn.min_width:
        neurons = min(rest // (ffn.cost * ffn.step) * ffn.step, space.layers * space.neurons)
        return Allocation(allocate(space.ffns, neurons).widths + (attention.width,) * space.layers)
    left = budget - space.layers * ffn.cost * ffn.min_width
    shared = 1 - left / (space.layers * attention.cost * attention.width)
    return project([_FAR] * space.layers + [shared] * space.layers, space, budget)


def project(ratios: Sequence[float] | np.ndarray, space: Space, budget: int) -> Allocation:
    """The allocation of `budget` that is nearest, in Euclidean distance, to the given pruning ratios.

    Widths are multiples of their part's step within its limits. Of FFNs alone they sum to `budget`; with attention they
    cost no more, and what is left pays for no further unit. The distance is a sum of one convex function an axis, so
    for given units of each part greedy exchange of single units, started from a Lagrangian optimum, is exact
    (Federgruen & Groenevelt 1986), and with several parts all ways to share the budget among them are looked at. Ties
    go to the earlier layer, and to more attention.

    Args:
        ratios: of each axis, finite; they may lie outside [0, p_max].

    Raises:
        LopError: the ratios are not as many finite numbers, or the budget is not one of the space's.
    """
    wanted = np.asarray(ratios, dtype=np.float64)
    if wanted.shape != (space.axes,) or not np.isfinite(wanted).all():
        raise LopError(f"an allocation needs {space.axes} finite ratios, not {wanted.tolist()}")
    limits = [(part.min_width // part.step, part.width // part.step) for part in space.parts]
    limits[0] = limits[0][0], space.max_width(budget) // space.granularity
    units = [
        (1 - asked) * (part.width / part.step) for part, asked in zip(space.parts, np.split(wanted, len(space.parts)))
    ]
    widths: tuple[int, ...] = ()
    for part, asked, (low, high), total in zip(space.parts, units, limits, _totals(space, budget, units, limits)):
        start = _lagrangian_start(asked, low, high, total)
        widths += tuple(int(u) * part.step for u in _exchange(asked, start, low, high, total))
    return Allocation(widths)


def shares(space: Space, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """All ways to share a budget of parameters: steps of the FFNs [n] and groups [n], more attention first.

    Each costs no more than the budget, and what is left pays for no further unit of either.

    Raises:
        LopError: the budget is below the leanest allocation's.
    """
    ffn, attention = space.parts
    if budget < space.least:
        raise LopError(f"{budget} parameters cannot be kept: the least is {space.least}")
    unit, most = ffn.cost * ffn.step, space.layers * ffn.width // ffn.step
    groups = np.arange(space.layers * attention.width, space.layers * attention.min_width - 1, -1)
    steps = np.minimum((budget - groups * attention.cost) // unit, most)
    left = budget - groups * attention.cost - steps * unit
    is_full = (steps == most) | (left < unit)
    is_full &= (groups == space.layers * attention.width) | (left < attention.cost)
    chosen = is_full & (steps >= space.layers * ffn.min_width // ffn.step)
    return steps[chosen], groups[chosen]


def _totals(
    space: Space, budget: int, units: Sequence[np.ndarray], limits: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """How many steps each part keeps in all in the allocation nearest to `units`, [L] a part."""
    if len(space.parts) == 1:
        (low, high), (total, rest) = limits[0], divmod(budget, space.granularity)
        if rest or not space.layers * low <= total <= space.layers * high:
            raise LopError(f"{budget} neurons cannot be kept: not a multiple of {space.granularity} within the limits")
        return (total,)
    kept = shares(space, budget)
    distances = [
        _distances(asked, low, high)[total - low * space.layers] * (part.step / part.width) ** 2
        for part, asked, (low, high), total in zip(space.parts, units, limits, kept)
    ]
    nearest = int(np.argmin(sum(distances)))
    return tuple(int(total[nearest]) for total in kept)


def _distances(units: np.ndarray, low: int, high: int) -> np.ndarray:
    """[L·(high − low) + 1] the least squared distance to `units` of integers within limits, by their sum."""
    steps = np.arange(low, high)
    marginal = np.sort((1 + 2 * (steps - units[:, None])).ravel())
    return np.append(0.0, marginal.cumsum()) + float(((low - units) ** 2).sum())


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
