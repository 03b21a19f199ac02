"""What each layer alone costs at every width, as far as it is known, and the allocation that follows from it."""

from dataclasses import dataclass

import numpy as np

from lop.space.allocation import Allocation, Space
from lop.space.features import PRUNED
from lop.space.programme import least_damage, pruned_shares

_AT = np.log(PRUNED)
_LEAST = 1e-6


@dataclass(frozen=True)
class Rule:
    """What corrects the programme for damages that do not just add up.

    Attributes:
        power: of the damages, at most 1; less than that evens out what layers cost, and with it their widths.
        cap: no layer loses more than this beyond the target.
    """

    power: float = 1.0
    cap: float = 1.0


PLAIN = Rule()


@dataclass(frozen=True)
class Curves:
    """Logarithms of damages (KL in nats of a layer pruned alone) at `lop.space.features.PRUNED`.

    Attributes:
        mean: [L, 9], expected; never falls along a row.
        deviation: [L, 9], the standard deviation of what is measured about it.
    """

    mean: np.ndarray
    deviation: np.ndarray

    def interval(self, width: float = 1.645) -> tuple[np.ndarray, np.ndarray]:
        """Least and most damage in nats, each [L, 9]; of so many deviations, 90% by default."""
        return np.exp(self.mean - width * self.deviation), np.exp(self.mean + width * self.deviation)

    def at(self, shares: np.ndarray) -> np.ndarray:
        """[L, n] the expected logarithms at pruned shares [n], linear in the logarithm of the share."""
        return read_at(self.mean, shares)

    def together(self, ratios: np.ndarray) -> np.ndarray:
        """[n] the logarithm of what layers cost together at ratios [n, L] if damages add up; −∞ for nothing pruned."""
        shares = ratios.T.clip(_LEAST)
        logs = np.array([np.interp(np.log(row), _AT, curve) for curve, row in zip(self.mean, shares, strict=True)])
        # Below all that is known by its square, as what is small is.
        logs += 2 * np.minimum(np.log(shares) - _AT[0], 0)
        return np.asarray(np.logaddexp.reduce(np.where(ratios.T > 0, logs, -np.inf), axis=0))

    def allocate(self, space: Space, budget: int, rule: Rule) -> Allocation:
        """The allocation of `budget` that costs least.

        Raises:
            LopError: the budget is not one of the space's.
        """
        damages = np.exp(rule.power * self.at(pruned_shares(space)))
        return least_damage(space, damages, budget, max_share=space.ratio(budget) + rule.cap)


def read_at(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[..., n] what has the values [..., 9] at `PRUNED`, at shares [n]: linear in the logarithm of the share."""
    where = np.log(shares)
    left = np.clip(np.searchsorted(_AT, where) - 1, 0, len(_AT) - 2)
    part = (where - _AT[left]) / (_AT[left + 1] - _AT[left])
    return np.asarray(values[..., left] + part * (values[..., left + 1] - values[..., left]))


def rising(mean: np.ndarray) -> np.ndarray:
    """Curves [L, 9] that never fall: the mean of the least such above and the greatest such below."""
    above = np.maximum.accumulate(mean, axis=1)
    below = np.minimum.accumulate(mean[:, ::-1], axis=1)[:, ::-1]
    return np.asarray((above + below) / 2)
