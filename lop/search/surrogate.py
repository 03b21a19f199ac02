"""What a tree's evaluations say of allocations not evaluated yet: a Gaussian process over their ratios.

Its covariance is that of a function that is nearly linear in the ratios, with coefficients that are alike in
neighbouring layers (each part's by itself), plus a smooth remainder; how much there is of each is what makes the
rewards seen likeliest (Rasmussen & Williams 2006, equation 5.8), on a grid, so that nothing is drawn by chance.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.linalg import LinAlgError

# Of the grid: what neighbouring layers share, how far that reaches (layers), what part of the variance is no linear
# one, on which distance that part varies (root mean square of ratios), and the noise.
_SHARED = (0.5, 0.9)
_REACH = (2.0, 6.0)
_REMAINDER = (0.05, 0.3)
_LENGTH = (0.15,)
_NOISE = (1e-4, 1e-2, 1e-1)
_JITTER = 1e-9


@dataclass(frozen=True)
class Setting:
    """One point of the grid."""

    shared: float
    reach: float
    remainder: float
    length: float
    noise: float


GRID = tuple(Setting(*values) for values in product(_SHARED, _REACH, _REMAINDER, _LENGTH, _NOISE))


class Surrogate:
    """A Gaussian process through rewards.

    Args:
        ratios: [n, axes] of the allocations evaluated, of one budget.
        rewards: [n], of which more is better.
        shares: [n] of the samples that each was scored on: what was given up early is known the less well.
        setting: of the grid; the likeliest if None.
        parts: how many of equally many axes there are.

    Attributes:
        setting: the given one, or the likeliest.
        likelihood: the logarithm of the rewards' with it, up to a constant of their number.
    """

    def __init__(
        self,
        ratios: np.ndarray,
        rewards: np.ndarray,
        shares: np.ndarray,
        setting: Setting | None = None,
        *,
        parts: int = 1,
    ) -> None:
        self._parts = parts
        self._mean, scale = float(rewards.mean()), float(rewards.std())
        self._scale = scale if scale > 0 else 1.0
        self._center = ratios.mean(axis=0)
        self._ratios = ratios - self._center
        values = (rewards - self._mean) / self._scale
        fits = [fit for each in (GRID if setting is None else (setting,)) if (fit := self._fit(each, values, shares))]
        # By likelihood; the first of equals.
        likelihood, self.setting, self._factor, self._weights = max(fits, key=lambda fit: fit[0])
        # Of the rewards as they are, not as they were scaled.
        self.likelihood = likelihood - len(rewards) * math.log(self._scale)

    def predict(self, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean [m] and standard deviation [m] of the rewards of allocations [m, axes], if they were known exactly."""
        there = ratios - self._center
        unit = self._unit(self.setting)
        across = self._covariance(self.setting, there, self._ratios, unit)
        own = np.array([self._covariance(self.setting, row, row, unit)[0, 0] for row in there[:, None]])
        solved = np.linalg.solve(self._factor, across.T)
        deviation = np.sqrt(np.maximum(own - (solved**2).sum(axis=0), 0))
        return self._mean + self._scale * (across @ self._weights), self._scale * deviation

    def improvement(self, ratios: np.ndarray, best: float | np.ndarray) -> np.ndarray:
        """[m] by how much each of the allocations [m, axes] is expected to surpass the reward `best` (Mockus 1975).

        Args:
            best: of all of them, or [m] of each.
        """
        mean, deviation = self.predict(ratios)
        deviation = np.maximum(deviation, 1e-12)
        z = (mean - best) / deviation
        below = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z])
        return (mean - best) * below + deviation * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    def _unit(self, setting: Setting) -> float:
        """What makes the mean variance of the linear part at the allocations seen one."""
        metric = self._metric(setting)
        return float(np.einsum("nl,lm,nm->n", self._ratios, metric, self._ratios).mean()) or 1.0

    def _fit(
        self, setting: Setting, values: np.ndarray, shares: np.ndarray
    ) -> tuple[float, Setting, np.ndarray, np.ndarray] | None:
        covariance = self._covariance(setting, self._ratios, self._ratios, self._unit(setting))
        covariance[np.diag_indices_from(covariance)] += setting.noise / np.maximum(shares, 1e-3) + _JITTER
        try:
            factor = np.linalg.cholesky(covariance)
        except LinAlgError:
            return None
        half = np.linalg.solve(factor, values)
        # The overall scale that is likeliest is put in its place.
        scale = max(float(half @ half) / len(values), _JITTER)
        likelihood = -len(values) / 2 * math.log(scale) - np.log(np.diag(factor)).sum()
        return float(likelihood), setting, factor, np.linalg.solve(factor.T, half)

    def _metric(self, setting: Setting) -> np.ndarray:
        return _metric(setting, self._ratios.shape[1] // self._parts, self._parts)

    def _covariance(self, setting: Setting, a: np.ndarray, b: np.ndarray, unit: float) -> np.ndarray:
        """[n, m] between allocations [n, axes] and [m, axes]."""
        linear = a @ self._metric(setting) @ b.T / unit
        distances = ((a[:, None] - b) ** 2).mean(axis=2)
        smooth = np.exp(-distances / (2 * setting.length**2))
        return (1 - setting.remainder) * linear + setting.remainder * smooth


@cache  # A move is predicted with the same one dozens of times.
def _metric(setting: Setting, layers: int, parts: int) -> np.ndarray:
    """[axes, axes], how alike the coefficients of two axes are; not to be written to."""
    depth = np.arange(layers)
    near = np.exp(-(np.abs(depth[:, None] - depth) / setting.reach))
    one = (1 - setting.shared) * np.eye(layers) + setting.shared * near
    return np.kron(np.eye(parts), one)
