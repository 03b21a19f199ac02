"""What a model of any allocation comes to in parameters and bytes, and targets as users name them."""

import math
import re
from dataclasses import dataclass

from lop.errors import LopError
from lop.space.latency import PHASES, Profile
from lop.space.memory import Load

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "B": 10**9}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


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


@dataclass(frozen=True)
class Target:
    """What somebody asks for: exactly one of a pruning ratio and the most that a model may take of something.

    Attributes:
        ratio: share of the FFN neurons to remove.
        parameters, bytes: of the checkpoint's tensors.
        memory: bytes that are held while the model does `load`.
        latency: seconds a token in `phase` on the device of `profile`.
    """

    ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    memory: int | None = None
    latency: float | None = None
    load: Load | None = None
    profile: Profile | None = None
    phase: str = PHASES[0]

    def __post_init__(self) -> None:
        named = (self.ratio, self.parameters, self.bytes, self.memory, self.latency)
        if sum(value is not None for value in named) != 1:
            raise LopError("name exactly one target: a ratio, parameters, bytes, memory or a latency")
        if (self.memory is None) != (self.load is None):
            raise LopError("a memory needs a context, and a context, images and a batch are for a memory")
        if (self.latency is None) != (self.profile is None):
            raise LopError("a latency needs the profile of a device, and a profile is for a latency")
        if self.phase not in PHASES:
            raise LopError(f"latency of {self.phase!r} is not one of {', '.join(PHASES)}")
        if self.latency is not None and not 0 < self.latency < math.inf:
            raise LopError(f"latency {self.latency} is not a number of seconds above 0")


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
        example = {"bytes": "8GiB", "pixels": "5M"}.get(what, "5B")
        raise LopError(f"{text!r} is not a number of {what}: write for instance {example}")
    return int(float(found.group(1)) * scale)


def parse_seconds(text: str) -> float:
    """Reads `40ms`, `0.2s` or `800us`.

    Raises:
        LopError: the text is no such time, or not above zero.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(us|µs|ms|s)\s*", text)
    seconds = float(found.group(1)) * _SECONDS[found.group(2)] if found else 0.0
    if not 0 < seconds < math.inf:
        raise LopError(f"{text!r} is not a time: write for instance 40ms")
    return seconds
