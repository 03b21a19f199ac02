"""What a pruned checkpoint weighs in its format and with its recovery, and the allocation that a target then allows."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lop.checkpoint.edge.types import KINDS
from lop.checkpoint.edge.weight import Weight, weigh
from lop.checkpoint.formats import FORMATS, Format, check_format
from lop.checkpoint.recoveries import RECOVERIES, Recovery
from lop.errors import LopError
from lop.space.allocation import Allocation, Space, uniform
from lop.space.size import ModelSize, Target


@dataclass(frozen=True)
class Footprint:
    """What the tensors of any pruned checkpoint of one model come to, exactly.

    Attributes:
        size: the dense model's numbers.
        format: `padded` stores each layer as wide as the widest.
        recovery: `bias` adds one to each layer's `down_proj`, the unpruned layers' included.
        source: the dense checkpoint's folder. Formats of other types than its own weigh by its headers.

    Raises:
        LopError: the format has no place for what the recovery adds.
    """

    size: ModelSize
    format: Format = "hf"
    recovery: Recovery = "none"
    source: Path | None = None

    def __post_init__(self) -> None:
        check_format(self.format, self.recovery)

    def parameters(self, widths: Sequence[int]) -> int:
        """Of the checkpoint whose layers keep `widths` [L] neurons."""
        stored = FORMATS[self.format].stored(widths)
        if self._weight:
            return self._weight.parameters + sum(map(self._weight.ffn_parameters, stored))
        # A bias is as long as a neuron's column of `down_proj`, one of the three vectors that a neuron holds.
        return self.size.pruned_parameters(sum(stored)) + self._biases * self.size.neuron_parameters // 3

    def bytes(self, widths: Sequence[int]) -> int:
        """Of the tensors of the checkpoint whose layers keep `widths` [L] neurons."""
        stored = FORMATS[self.format].stored(widths)
        if self._weight:
            return self._weight.bytes + sum(map(self._weight.ffn_bytes, stored))
        return self.size.pruned_bytes(sum(stored)) + self._biases * self.size.neuron_bytes // 3

    def is_uniform(self, target: Target) -> bool:
        """Whether all layers keep alike, whatever a predictor says.

        Zeros that pad a layer to the widest one take as much room as neurons would. Where the room is what is limited,
        every allocation that fits is therefore part of the uniform one of the greatest width that does.
        """
        return FORMATS[self.format].is_padded and target.ratio is None

    def budget(self, target: Target, space: Space) -> int:
        """The neurons to keep: the most that the target allows.

        Raises:
            LopError: no checkpoint of the model is that small, or that large; says what is possible.
        """
        if target.ratio is not None:
            return space.budget(target.ratio)
        if target.parameters is not None:
            measure, asked, unit = self.parameters, target.parameters, "parameters"
        else:
            assert target.bytes is not None
            measure, asked, unit = self.bytes, target.bytes, "bytes"
            self._check_linear(space)
        least, whole = (measure([width] * space.layers) for width in (space.min_width, space.neurons))
        if not least <= asked <= whole:
            biased = " with recovery 'bias'" if self._biases else ""
            raise LopError(f"target of {asked} {unit} is outside what this model can have{biased}: {least} to {whole}")
        step = space.granularity * (space.layers if self.is_uniform(target) else 1)
        smallest, largest = (space.layers * width for width in (space.min_width, space.neurons))
        # Padded, all layers are alike here; else only their sum matters.
        parts = space.layers if self.is_uniform(target) else 1
        budgets = range(smallest, largest + 1, step)
        return budgets[bisect_right(budgets, asked, key=lambda budget: measure([budget // parts] * parts)) - 1]

    def allocate(self, target: Target, space: Space, predict: Callable[[int], Allocation]) -> Allocation:
        """The allocation for a target; its checkpoint never exceeds parameters or bytes that were asked for.

        Args:
            predict: the predictor's allocation of a budget.

        Raises:
            LopError: as `budget`.
        """
        budget = self.budget(target, space)
        return uniform(space, budget) if self.is_uniform(target) else predict(budget)

    def describe(self, allocation: Allocation, space: Space) -> dict[str, Any]:
        """The answer to a target as plain JSON values."""
        return {
            "ratio": space.ratio(allocation.budget),
            "ratios": list(allocation.ratios(space)),
            "widths": list(allocation.widths),
            "kept_neurons": allocation.budget,
            "parameters": self.parameters(allocation.widths),
            "bytes": self.bytes(allocation.widths),
        }

    @property
    def _biases(self) -> int:
        return self.size.layers if RECOVERIES[self.recovery].adds_bias else 0

    @cached_property
    def _weight(self) -> Weight | None:
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
