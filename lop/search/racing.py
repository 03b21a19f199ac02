"""Racing: an allocation that will not beat its opponent is given up before all samples are scored.

Samples are scored in rounds, in a random order that never changes. After each round the candidate is compared with its
opponent, an allocation that has been scored on all samples, on the samples that both have answered, as in Hoeffding
races (Maron & Moore 1994) and F-Race (Birattari et al. 2002). The opponent's answers to the samples still to come are
known: the candidate can only gain where the opponent is wrong and only lose where it is right. What it will gain and
lose there is predicted from what it gained and lost so far.
"""

import base64
from dataclasses import dataclass

import numpy as np

from lop.space.allocation import Allocation


@dataclass(frozen=True)
class Racing:
    """How candidates race.

    Attributes:
        rounds: equal parts in which the samples are scored.
        confidence: a candidate is given up once it loses to its opponent with this probability.
    """

    rounds: int
    confidence: float


@dataclass(frozen=True)
class Opponent:
    """Whom a candidate has to beat.

    Attributes:
        allocation: the opponent's.
        hits: which of all samples it answers exactly; see `pack`.
    """

    allocation: Allocation
    hits: str


@dataclass(frozen=True)
class Candidate:
    """An allocation to evaluate: against an opponent, or on all samples."""

    allocation: Allocation
    opponent: Opponent | None = None


def sample_rounds(samples: int, rounds: int, *, seed: int) -> list[np.ndarray]:
    """The samples of each round: a random partition, equal to within one sample."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(samples)
    return np.array_split(order, min(rounds, samples))


def gives_up(racing: Racing, correct: np.ndarray, seen: np.ndarray, opponent: np.ndarray) -> bool:
    """Whether a candidate loses to its opponent with the confidence asked for.

    Args:
        correct: [n] bool, the candidate's hits; false where it has not been asked yet.
        seen: [n] bool, the samples that it has been asked.
        opponent: [n] bool, the opponent's hits on all samples.
    """
    return chance(correct, seen, opponent) < 1 - racing.confidence


def chance(correct: np.ndarray, seen: np.ndarray, opponent: np.ndarray) -> float:
    """The probability that the candidate will have at least as many hits as its opponent on all samples.

    What it wins of the opponent's misses still to come, and what it loses of the opponent's hits, are independent and
    Beta-binomial, with Jeffreys' prior. Zero once the opponent's misses still to come are too few.

    Args:
        correct, seen, opponent: as in `gives_up`.
    """
    wins, losses = int((seen & correct & ~opponent).sum()), int((seen & ~correct & opponent).sum())
    gained = _beta_binomial(int((~seen & ~opponent).sum()), wins, int((seen & ~opponent).sum()) - wins)
    lost = _beta_binomial(int((~seen & opponent).sum()), losses, int((seen & opponent).sum()) - losses)
    # P(gained − lost ≥ losses − wins), summed over what is lost.
    at_least = np.append(gained[::-1].cumsum()[::-1], 0.0)
    needed = np.clip(np.arange(len(lost)) + losses - wins, 0, len(gained))
    return float(lost @ at_least[needed])


def pack(hits: np.ndarray) -> str:
    """[n] bool as text: bits, eight to a byte, in Base64."""
    return base64.b64encode(np.packbits(hits).tobytes()).decode()


def unpack(text: str, samples: int) -> np.ndarray:
    """The inverse of `pack`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=samples).astype(bool)


def _beta_binomial(trials: int, successes: int, failures: int) -> np.ndarray:
    """[trials + 1], the probability of each number of successes in trials to come, after those of the past."""
    a, b = successes + 0.5, failures + 0.5
    count = np.arange(trials)
    ratios = (trials - count) * (count + a) / ((count + 1) * (trials - 1 - count + b))
    logarithms = np.append(0.0, np.log(ratios).cumsum())
    weights = np.exp(logarithms - logarithms.max())
    return weights / weights.sum()
