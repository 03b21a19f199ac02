"""How long a model takes on one device, from what was measured there: the sum of its parts' times."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
        attention: of one layer with all its heads, its norm with it.
        head: the last layer's state to the next token.
        other: the rest: embedding, positions, and what lies between the parts.
        widths: FFN widths that were measured, ascending.
        ffn: of one layer's FFN of each width; never less than of a narrower one.
        groups: of attention heads that a layer was measured with, ascending to all; empty where all were kept always.
        of_groups: as `attention`, with so many groups; never less than with fewer.
    """

    attention: float
    head: float
    other: float
    widths: tuple[int, ...]
    ffn: tuple[float, ...]
    groups: tuple[int, ...] = ()
    of_groups: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.attention, self.head, self.other, *self.ffn, *self.of_groups)
        if not (self.widths and _is_rising(self.widths, self.ffn)):
            raise LopError("the FFN's times are not by ascending widths and never shorter for a wider one")
        if not _is_rising(self.groups, self.of_groups) or self.of_groups[-1:] not in ((), (self.attention,)):
            raise LopError("the attention's times are not by ascending groups and never shorter for more, up to all")
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise LopError(f"times are finite and not below 0, and not {numbers}")

    def of(self, widths: Sequence[int], groups: Sequence[int] | None = None) -> float:
        """One token's seconds in a model of these widths: linear between what was measured.

        Args:
            widths: [L], of the FFNs.
            groups: [L], of attention; all if None.
        """
        attention = len(widths) * self.attention if groups is None else np.interp(groups, *self._attention).sum()
        return self.other + self.head + float(attention) + float(np.interp(widths, self.widths, self.ffn).sum())

    def bounds(
        self, neurons: float | np.ndarray, layers: int, groups: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The least and the most that any widths of these sums could take.

        By Jensen's inequality: all layers at the mean width, on the greatest convex and the least concave function
        around the measured times.

        Args:
            neurons: that all FFNs keep together, [...].
            groups: of attention, the same, [...]; all if None.
        """
        least = most = np.array(self.other + self.head)
        for kept, measured in ((groups, self._attention), (neurons, (self.widths, self.ffn))):
            mean = measured[0][-1] if kept is None else np.divide(kept, layers)
            low, high = (layers * np.interp(mean, *_hull(*measured, sign)) for sign in (1, -1))
            least, most = least + low, most + high
        return least, most

    @property
    def _attention(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        return (self.groups, self.of_groups) if self.groups else ((1,), (self.attention,))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; without groups where all were kept."""
        return {name: value for name, value in vars(self).items() if self.groups or "groups" not in name}


def _is_rising(widths: Sequence[int], seconds: Sequence[float]) -> bool:
    ascending = all(a < b for a, b in pairwise(widths))
    growing = all(a <= b for a, b in pairwise(seconds))
    return len(widths) == len(seconds) and ascending and growing and min(widths, default=0) >= 0


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
        phases = {name: times.as_dict() for name, times in self.phases.items()}
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
            name: Times(**{part: _frozen(value) for part, value in times.items()})
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


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
