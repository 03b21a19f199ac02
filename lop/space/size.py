"""What a model of any allocation comes to in parameters and bytes, and targets as users name them."""

import re
from dataclasses import dataclass

from lop.errors import LopError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "B": 10**9}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class ModelSize:
    """The dense model's numbers that any target is answered from.

    Attributes:
        layers: decoder layers, `L`.
        neurons: FFN neurons of each, `F`.
        parameters: of the whole checkpoint, vision tower included.
        bytes: of all its tensors.
        neuron_parameters: that one neuron holds: its rows of gate and up and its column of down.
        neuron_bytes: the same in bytes.
    """

    layers: int
    neurons: int
    parameters: int
    bytes: int
    neuron_parameters: int
    neuron_bytes: int

    def pruned_parameters(self, budget: int) -> int:
        """Parameters of the checkpoint that keeps `budget` neurons."""
        return self.parameters - (self.layers * self.neurons - budget) * self.neuron_parameters

    def pruned_bytes(self, budget: int) -> int:
        """Tensor bytes of the checkpoint that keeps `budget` neurons."""
        return self.bytes - (self.layers * self.neurons - budget) * self.neuron_bytes


@dataclass(frozen=True)
class Target:
    """What somebody asks for: exactly one of a pruning ratio, and the most parameters or bytes of the checkpoint."""

    ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.ratio, self.parameters, self.bytes)) != 1:
            raise LopError("name exactly one target: a ratio, a number of parameters or a number of bytes")


def parse_count(text: str, *, what: str) -> int:
    """Reads `5B`, `350M`, `8GiB`, `2.5GB` or a plain number.

    Raises:
        LopError: the text is no such number, or not above zero.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else ""
    if what == "bytes" and unit.endswith("B"):
        unit = unit[:-1]
    scale = (_BINARY_UNITS | _UNITS if what == "bytes" else _UNITS).get(unit)
    if not found or scale is None or not 1 <= float(found.group(1)) * scale < 2**63:
        raise LopError(f"{text!r} is not a number of {what}: write for instance {'8GiB' if what == 'bytes' else '5B'}")
    return int(float(found.group(1)) * scale)
