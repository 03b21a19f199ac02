"""What a pruned checkpoint weighs in its format and with its recovery, and the allocation that a target then allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lop.checkpoint.bits import BITS, Weight
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
        quantised: the model with its weights in fewer bits, if they are to be; see `lop.checkpoint.bits`.

    Raises:
        LopError: the format has no place for what the recovery adds.
    """

    size: ModelSize
    format: Format = "hf"
    recovery: Recovery = "none"
    quantised: Weight | None = None

    def __post_init__(self) -> None:
        check_format(self.format, self.recovery)

    def parameters(self, widths: Sequence[int]) -> int:
        """Of the checkpoint whose layers keep `widths` [L] neurons."""
        # A bias is as long as a neuron's column of `down_proj`, one of the three vectors that a neuron holds.
        return self.size.pruned_parameters(self._stored(widths)) + self._biases * self.size.neuron_parameters // 3

    def bytes(self, widths: Sequence[int]) -> int:
        """Of the tensors of the checkpoint whose layers keep `widths` [L] neurons."""
        pruned = self.size.layers * self.size.neurons - self._stored(widths)
        # Biases are not quantised.
        return self._weight.bytes - pruned * self._weight.neuron_bits // 8 + self._biases * self.size.neuron_bytes // 3

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
            weigh, each, asked, unit = self.parameters, 8 * self.size.neuron_parameters, target.parameters, "parameters"
        else:
            assert target.bytes is not None
            weigh, each, asked, unit = self.bytes, self._weight.neuron_bits, target.bytes, "bytes"
        least, whole = (weigh([width] * space.layers) for width in (space.min_width, space.neurons))
        if not least <= asked <= whole:
            biased = " with recovery 'bias'" if self._biases else ""
            rounded = f" with {self.bits} bits" if self.quantised and unit == "bytes" else ""
            raise LopError(
                f"target of {asked} {unit} is outside what this model can have{biased}{rounded}: {least} to {whole}"
            )
        step = space.granularity * (space.layers if self.is_uniform(target) else 1)
        smallest = space.layers * space.min_width
        return smallest + 8 * (asked - least) // (each * step) * step

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
            "bits": self.bits,
        }

    @property
    def bits(self) -> int:
        """Of the weights, 16 standing for those that the dense model has."""
        return self._weight.bits

    @property
    def _weight(self) -> Weight:
        return self.quantised or Weight(BITS[0], self.size.bytes, 8 * self.size.neuron_bytes)

    def _stored(self, widths: Sequence[int]) -> int:
        """Neurons on disk, those of zeros included."""
        return max(widths) * len(widths) if FORMATS[self.format].is_padded else sum(widths)

    @property
    def _biases(self) -> int:
        return self.size.layers if RECOVERIES[self.recovery].adds_bias else 0
