"""How long a model takes on one device, from what was measured there: the sum of its parts' times."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lop.errors import LopError

PHASES = ("decode", "prefill")
# Of a profile's JSON, for when it changes.
VERSION = 1


@dataclass(frozen=True)
class Times:
    """Seconds for one token, by what computes it.

    Attributes:
        attention: of one layer, its norm with it.
        head: the last layer's state to the next token.
        other: the rest: embedding, positions, and what lies between the parts.
        widths: FFN widths that were measured, ascending.
        ffn: of one layer's FFN of each width; never less than of a narrower one.
    """

    attention: float
    head: float
    other: float
    widths: tuple[int, ...]
    ffn: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (self.attention, self.head, self.other, *self.ffn)
        rising = all(a < b for a, b in zip(self.widths, self.widths[1:]))
        growing = all(a <= b for a, b in zip(self.ffn, self.ffn[1:]))
        if not (self.widths and len(self.widths) == len(self.ffn) and rising and growing and self.widths[0] > 0):
            raise LopError("the FFN's times are not by ascending widths and never shorter for a wider one")
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise LopError(f"times are finite and not below 0, and not {numbers}")

    def fixed(self, layers: int) -> float:
        """What does not depend on the widths."""
        return self.other + self.head + layers * self.attention

    def of(self, widths: Sequence[int]) -> float:
        """One token's seconds in a model of these FFN widths [L]: linear between what was measured."""
        return self.fixed(len(widths)) + float(np.interp(widths, self.widths, self.ffn).sum())

    def bounds(self, budget: int, layers: int) -> tuple[float, float]:
        """The least and the most that any widths of this sum could take.

        By Jensen's inequality: all layers at the mean width, on the greatest convex and the least concave function
        around the measured times.
        """
        mean = budget / layers
        low, high = (float(np.interp(mean, *_hull(self.widths, self.ffn, sign))) for sign in (1, -1))
        return self.fixed(layers) + layers * low, self.fixed(layers) + layers * high


@dataclass(frozen=True)
class Profile:
    """What `lop profile` measured.

    Attributes:
        model: the dense model's fingerprint.
        layers, neurons: the dense model's.
        device: on what, in words.
        settings: under which conditions: type of numbers, threads, context, versions.
        phases: by name, the times of a token.
        checks: by phase, for some pruning ratios, what models of mixed widths took (`measured`) and what the sum of
            their parts says (`predicted`), in seconds a token.
    """

    model: str
    layers: int
    neurons: int
    device: str
    settings: Mapping[str, Any]
    phases: Mapping[str, Times]
    checks: Mapping[str, Sequence[Mapping[str, float]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        phases = {name: {**vars(times)} for name, times in self.phases.items()}
        return {"version": VERSION, **vars(self), "phases": phases}


def parse_profile(data: Mapping[str, Any]) -> Profile:
    """The inverse of `Profile.as_dict`.

    Raises:
        LopError: it is none, or damaged.
    """
    try:
        values = dict(data)
        if values.pop("version") != VERSION:
            raise LopError(f"it is of version {data['version']}, where this LOP reads {VERSION}: measure again")
        phases = {
            name: Times(**{**times, "widths": tuple(times["widths"]), "ffn": tuple(times["ffn"])})
            for name, times in values.pop("phases").items()
        }
        profile = Profile(phases=phases, **values)
        if not (isinstance(profile.layers, int) and isinstance(profile.device, str)):
            raise LopError("its layers are no number, or its device has no name")
        if set(phases) != set(PHASES) or any(times.widths[-1] != profile.neurons for times in phases.values()):
            raise LopError(f"it has not the phases {' and '.join(PHASES)} of a model, up to its dense width")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LopError(f"it is no device profile ({type(error).__name__}: {error})") from None
    return profile


def _hull(xs: Sequence[float], ys: Sequence[float], sign: int) -> tuple[list[float], list[float]]:
    """The corners of the convex hull below the points (sign 1) or above them (sign −1); xs ascend.

    Beyond the outermost points the times stay as they are there, so the hull starts with a level piece from 0.
    """
    corners: list[tuple[float, float]] = []
    for x, y in zip((0.0, *xs), (ys[0], *ys)):
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if sign * ((y1 - y0) * (x - x0) - (y - y0) * (x1 - x0)) < 0:
                break
            corners.pop()
        corners.append((x, y))
    return [x for x, _ in corners], [y for _, y in corners]
