"""What a pruned checkpoint takes in its format and with its recovery, and the allocation that a target then allows."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lop.checkpoint.bits import BITS, Weight
from lop.checkpoint.edge.types import KINDS
from lop.checkpoint.edge.weight import GgufWeight, weigh
from lop.checkpoint.formats import FORMATS, Format, check_format, check_heads
from lop.checkpoint.recoveries import RECOVERIES, Recovery
from lop.errors import LopError
from lop.space.allocation import Allocation, Attention, Space, dense, leanest, of_ffns, uniform
from lop.space.memory import Load, Shape, working_bytes
from lop.space.size import ModelSize, Target


@dataclass(frozen=True)
class _Limit:
    """The most that an allocation may take of something.

    Attributes:
        most: as asked for.
        cost: of widths [L].
        bounds: the least and the most that allocations of a budget cost; both grow with it.
        refusal: what to say where that is outside of what the leanest and the dense model cost; None if it is not.
    """

    most: float
    cost: Callable[[Sequence[int]], float]
    bounds: Callable[[int], tuple[float, float]]
    refusal: Callable[[float, float], str | None]


@dataclass(frozen=True)
class Footprint:
    """What any pruned checkpoint of one model takes: its tensors exactly, memory and time as predicted.

    Attributes:
        size: the dense model's numbers.
        format: `padded` stores each layer as wide as the widest.
        recovery: `bias` adds one to each layer's `down_proj`, the unpruned layers' included.
        shape: the model's; without it no memory can be asked for.
        source: the dense checkpoint's folder. Formats of other types than its own weigh by its headers.
        quantised: the model with its weights in fewer bits, if they are to be; see `lop.checkpoint.bits`.
        attention: what its groups are, where attention is pruned.

    Widths are of all axes: [L], or [2·L] where attention is pruned.

    Raises:
        LopError: the format has no place for what the recovery adds, or weights of a type of its own; or one of them
            does not go with pruned attention.
    """

    size: ModelSize
    format: Format = "hf"
    recovery: Recovery = "none"
    shape: Shape | None = None
    source: Path | None = None
    quantised: Weight | None = None
    attention: Attention | None = None

    def __post_init__(self) -> None:
        check_format(self.format, self.recovery, self.bits)
        if self.attention is not None:
            check_heads(self.format)

    @property
    def bits(self) -> int:
        """Of the weights, 16 standing for the type that the dense model or the format has."""
        return self.quantised.bits if self.quantised else BITS[0]

    def parameters(self, widths: Sequence[int]) -> int:
        """Of the checkpoint whose axes keep `widths`."""
        stored = self._stored(widths)
        if self._gguf:
            return self._gguf.parameters + sum(map(self._gguf.ffn_parameters, stored))
        # A bias is as long as a neuron's column of `down_proj`, one of the three vectors that a neuron holds.
        lost = self._lost_heads(widths)
        return self.size.pruned_parameters(sum(stored)) - lost + self._biases * self.size.neuron_parameters // 3

    def bytes(self, widths: Sequence[int]) -> int:
        """Of the tensors of the checkpoint whose axes keep `widths`."""
        if self._gguf:
            return self._gguf.bytes + sum(map(self._gguf.ffn_bytes, self._stored(widths)))
        return self._bytes(widths, self.quantised or self._plain)

    def memory(self, widths: Sequence[int], load: Load) -> int:
        """Bytes at the worst moment of a run: the weights, and all that is held beside them (`lop.space.memory`).

        The run is one of transformers, which unpacks quantised weights when it loads them: whatever their bits, they
        count as those of the dense model's type that they are then.

        Raises:
            LopError: the load's images do not fit its context.
        """
        assert self.shape is not None
        widest, lost = max(widths[: self.size.layers]), self._lost_groups(widths)
        return self._bytes(widths, self._plain) + working_bytes(self.shape, load, widest, lost_groups=lost)

    def is_uniform(self, target: Target) -> bool:
        """Whether all layers keep alike, whatever a predictor says.

        Zeros that pad a layer to the widest one take as much room, and time, as neurons would. Where these are what is
        limited, every allocation that fits is therefore part of the uniform one of the greatest width that does, with
        all of the attention, whose heads are stored whether they are kept or not.
        """
        return FORMATS[self.format].is_padded and target.ratio is None

    def even(self, space: Space, budget: int) -> Allocation:
        """The allocation of a budget whose layers keep alike, and all of their attention if the budget pays for it."""
        return of_ffns(space, budget, uniform)

    def budgets(self, target: Target, space: Space) -> Iterator[int]:
        """What to keep, as `Space.budget` counts it, the most first: the first that `meets` the target is the answer.

        There is more than one only where it matters how an allocation spreads its neurons; the last surely meets it.

        Raises:
            LopError: no checkpoint of the model can meet the target; says what is possible.
        """
        if target.ratio is not None:
            return iter([space.budget(target.ratio)])
        limit = self._limit(target, space)
        least, whole = (limit.cost(widths.widths) for widths in (leanest(space), dense(space)))
        if refusal := limit.refusal(least, whole):
            raise LopError(refusal)
        ffn, smallest, largest = space.parts[0], space.least, space.whole
        step = ffn.cost * ffn.step
        if self.is_uniform(target):
            step *= space.layers
            smallest = largest - space.layers * ffn.cost * (ffn.width - ffn.min_width)
        elif self.attention is not None and (target.parameters or (target.bytes and not self.quantised)):
            step = 1  # Where a budget, of parameters, says what a checkpoint takes, none of them is given away.
        most_first = range(smallest + (largest - smallest) // step * step, smallest - 1, -step)
        first = bisect_left(most_first, True, key=lambda budget: limit.bounds(budget)[0] <= limit.most)
        sure = bisect_left(most_first, True, lo=first, key=lambda budget: limit.bounds(budget)[1] <= limit.most)
        return iter(most_first[first : sure + 1])

    def meets(self, target: Target, widths: Sequence[int], space: Space) -> bool:
        """Whether a checkpoint whose layers keep `widths` [L] is within what was asked for; a ratio always is."""
        if target.ratio is not None:
            return True
        limit = self._limit(target, space)
        return limit.cost(widths) <= limit.most

    def allocate(self, target: Target, space: Space, predict: Callable[[int], Allocation]) -> Allocation:
        """The allocation for a target, the largest of those predicted that meet it.

        Args:
            predict: the predictor's allocation of a budget.

        Raises:
            LopError: as `budgets`.
        """
        alike = self.is_uniform(target)
        allocations = (self.even(space, budget) if alike else predict(budget) for budget in self.budgets(target, space))
        return next(found for found in allocations if self.meets(target, found.widths, space))

    def describe(self, allocation: Allocation, space: Space, target: Target) -> dict[str, Any]:
        """The answer to a target as plain JSON values; with `memory` or `latency` where these were asked for.

        `widths` and `ratios` are the FFNs'; what is kept of attention, where it is open, are `groups`.
        """
        widths, *attention = space.by_part(allocation.widths)
        answer = {
            "ratio": space.ratio_of(allocation.widths),
            "ratios": list(allocation.ratios(space)[: space.layers]),
            "widths": list(widths),
            "kept_neurons": sum(widths),
            "parameters": self.parameters(allocation.widths),
            "bytes": self.bytes(allocation.widths),
            "bits": self.bits,
        }
        if attention:
            answer["groups"] = list(attention[0])
        if target.load is not None:
            answer["memory"] = self.memory(allocation.widths, target.load)
        if target.profile is not None:
            answer["latency"] = target.profile.phases[target.phase].of(*self._computed(allocation.widths))
        return answer

    def _limit(self, target: Target, space: Space) -> _Limit:
        if target.memory is not None:
            limit = self._memory_limit(target, space)
        elif target.latency is not None:
            limit = self._latency_limit(target, space)
        else:
            limit = self._weight_limit(target, space)
        if not self.is_uniform(target):
            return limit

        def bounds(budget: int) -> tuple[float, float]:
            exact = limit.cost(self.even(space, budget).widths)
            return exact, exact

        return replace(limit, bounds=bounds)

    def _weight_limit(self, target: Target, space: Space) -> _Limit:
        unit, weigh = ("bytes", self.bytes) if target.parameters is None else ("parameters", self.parameters)
        asked = getattr(target, unit)
        if unit == "bytes":
            self._check_linear(space)

        def bounds(budget: int) -> tuple[float, float]:
            if self.attention is not None:  # Of parameters, which is never exceeded.
                lost, whole = space.whole - budget, weigh(dense(space).widths)
                least, most = (1, 1) if unit == "parameters" else self._parameter_bytes(self.attention)
                return whole - lost * most, whole - lost * least
            weight = weigh(uniform(space, budget).widths)  # However it is spread.
            return weight, weight

        def refusal(least: float, whole: float) -> str | None:
            if least <= asked <= whole:
                return None
            biased = " with recovery 'bias'" if self._biases else ""
            rounded = f" with {self.bits} bits" if self.quantised and unit == "bytes" else ""
            return f"target of {asked} {unit} is outside what this model can have{biased}{rounded}: {least} to {whole}"

        return _Limit(asked, weigh, bounds, refusal)

    def _memory_limit(self, target: Target, space: Space) -> _Limit:
        load, asked = target.load, target.memory
        if FORMATS[self.format].gguf:
            raise LopError(f"memory is told of transformers' runs, not of llama.cpp's: format {self.format!r} has none")
        shape = self.shape
        assert load is not None
        assert asked is not None
        assert shape is not None

        def bounds(budget: int) -> tuple[int, int]:
            if self.attention is not None:
                weight = self.bytes(dense(space).widths) - (space.whole - budget) * self._item
                none = space.layers * self.attention.groups
                least = working_bytes(shape, load, space.min_width, lost_groups=none)
                return weight + least, weight + working_bytes(shape, load, space.neurons)
            even, widest = uniform(space, budget).widths, space.max_width(budget)
            return self.memory(even, load), self._bytes(even, self._plain) + working_bytes(shape, load, widest)

        def refusal(least: float, whole: float) -> str | None:
            doing = f"with a context of {load.context}, {load.images} images and a batch of {load.batch}"
            return None if least <= asked else _too_little("memory", _size(asked), doing, _size(least))

        return _Limit(asked, lambda widths: self.memory(widths, load), bounds, refusal)

    def _latency_limit(self, target: Target, space: Space) -> _Limit:
        profile, asked = target.profile, target.latency
        if FORMATS[self.format].gguf:
            raise LopError(f"a device profile times transformers, not llama.cpp: format {self.format!r} has no latency")
        assert profile is not None
        assert asked is not None
        if (profile.layers, profile.neurons) != (space.layers, space.neurons):
            found, here = f"{profile.layers}x{profile.neurons}", f"{space.layers}x{space.neurons}"
            raise LopError(f"the device profile is of a model of {found} FFN neurons, and this one has {here}")
        times = profile.phases[target.phase]

        def cost(widths: Sequence[int]) -> float:
            return times.of(*self._computed(widths))

        def bounds(budget: int) -> tuple[float, float]:
            if space.attention is None:
                low, high = times.bounds(budget, space.layers)
                return float(low), float(high)
            # However the budget is shared: for any number of groups the neurons that it pays for then.
            ffn, attention = space.parts
            groups = np.arange(space.layers * attention.min_width, space.layers * attention.width + 1)
            paid = (budget - groups * attention.cost) / ffn.cost
            is_paid = paid >= space.layers * ffn.min_width

            def within(neurons: np.ndarray) -> np.ndarray:
                return neurons.clip(space.layers * ffn.min_width, space.layers * ffn.width)

            # What is left pays for no further step of an FFN.
            low, _ = times.bounds(within(paid - ffn.step), space.layers, groups)
            _, high = times.bounds(within(paid[is_paid]), space.layers, groups[is_paid])
            return float(low.min()), float(high.max())

        def refusal(least: float, whole: float) -> str | None:
            doing = f"in {target.phase} on {profile.device}"
            return None if least <= asked else _too_little("latency", _ms(asked), doing, _ms(least))

        return _Limit(asked, cost, bounds, refusal)

    def _stored(self, widths: Sequence[int]) -> Sequence[int]:
        """[L] neurons on disk, those of zeros included."""
        return FORMATS[self.format].stored(widths[: self.size.layers])

    def _computed(self, widths: Sequence[int]) -> tuple[Sequence[int], Sequence[int] | None]:
        """[L] neurons and [L] groups of attention that are computed, zeros included; None where attention is dense."""
        groups = None if FORMATS[self.format].is_padded else widths[self.size.layers :]
        return self._stored(widths), groups or None

    def _lost_groups(self, widths: Sequence[int]) -> int:
        """The attention's groups that are not on disk."""
        if self.attention is None or FORMATS[self.format].is_padded:
            return 0
        return sum(self.attention.groups - width for width in widths[self.size.layers :])

    def _empty_matrices(self, widths: Sequence[int]) -> int:
        """How many there are on disk: three of an FFN that keeps nothing, four of attention."""
        _, groups = self._computed(widths)
        return 3 * list(self._stored(widths)).count(0) + 4 * list(groups or ()).count(0)

    def _lost_heads(self, widths: Sequence[int]) -> int:
        """Parameters of the attention's groups that are not on disk."""
        return self._lost_groups(widths) * (self.attention.group_parameters if self.attention else 0)

    def _parameter_bytes(self, attention: Attention) -> tuple[float, float]:
        """The least and the most that a parameter of any part takes on disk."""
        weight = self.quantised or self._plain
        parts = (weight.neuron_bits, self.size.neuron_parameters), (weight.group_bits, attention.group_parameters)
        each = [bits / 8 / parameters for bits, parameters in parts]
        return min(each), max(each)

    @property
    def _item(self) -> int:
        """Bytes of a number of the dense model's type."""
        return self.size.neuron_bytes // self.size.neuron_parameters

    def _bytes(self, widths: Sequence[int], weight: Weight) -> int:
        """In safetensors, with weights of a type; biases have always the dense model's."""
        pruned = self.size.layers * self.size.neurons - sum(self._stored(widths))
        lost = (pruned * weight.neuron_bits + self._lost_groups(widths) * weight.group_bits) // 8
        empty = weight.matrix_bytes * self._empty_matrices(widths)
        return weight.bytes - lost - empty + self._biases * self.size.neuron_bytes // 3

    @property
    def _plain(self) -> Weight:
        group = 8 * self.attention.group_parameters * self._item if self.attention else 0
        return Weight(BITS[0], self.size.bytes, 8 * self.size.neuron_bytes, group)

    @cached_property
    def _gguf(self) -> GgufWeight | None:
        kind = FORMATS[self.format].gguf
        if kind is None:
            return None
        assert self.source is not None
        return weigh(self.source, kind)

    def _check_linear(self, space: Space) -> None:
        """What a layer weighs must not depend on how neurons are spread, or a budget would not say what fits."""
        layout = FORMATS[self.format]
        block = KINDS[layout.gguf].block if layout.gguf else 1
        if not layout.is_padded and space.granularity % block:
            padded = self.format.replace("-true", "")
            raise LopError(
                f"format {self.format!r} stores layers in blocks of {block} neurons, and widths come in steps of "
                f"{space.granularity}: name a --target ratio, or take format {padded!r}"
            )

    @property
    def _biases(self) -> int:
        return self.size.layers if RECOVERIES[self.recovery].adds_bias else 0


def _too_little(what: str, asked: str, doing: str, least: str) -> str:
    return f"{what} of {asked} is less than any size of this model takes {doing}: at least {least}"


def _size(value: float) -> str:
    # Rounded up: what is named can be asked for.
    scale, unit = (2**30, "GiB") if value >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(value / scale * 1000) / 1000:.3f}{unit}"


def _ms(value: float) -> str:
    return f"{math.ceil(value * 1e6) / 1000:.3f}ms"
