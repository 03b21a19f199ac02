"""What a method that searches has found for a run: as its job leaves it, and as the tables show it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a rival found for a target.

    Attributes:
        widths: of the best allocation.
        reward: its reward on all reward samples.
        curve: pairs (evaluations spent, best reward so far); evaluations in units of all reward samples.
        seconds: that the job took, for all its targets.
    """

    rival: str
    target: float
    seed: int
    widths: tuple[int, ...]
    reward: float
    curve: tuple[tuple[float, float], ...]
    seconds: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Outcome":
        """The inverse of `asdict`, read from JSON."""
        curve = tuple((spent, reward) for spent, reward in data["curve"])
        return cls(**{**data, "widths": tuple(data["widths"]), "curve": curve})
