"""Racing: an allocation that will not beat its opponent is given up before all samples are scored.

Samples are scored in rounds, in a random order that never changes. After each round the candidate is compared with its
opponent, an allocation that has been scored on all samples, on the samples that both have answered, as in Hoeffding
races (Maron & Moore 1994) and F-Race (Birattari et al. 2002). The opponent's answers to the samples still to come are
known: where right answers are counted, the candidate can only gain where the opponent is wrong and only lose where it
is right, and what it will gain and lose there is predicted from what it gained and lost so far. Where the reward is a
real number, the differences on the samples to come are predicted from those so far.
"""

import base64
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lop.search.rewards import REWARDS
from lop.space.allocation import Allocation


@dataclass(frozen=True)
class Racing:
    """How candidates race.

    Attributes:
        rounds: parts in which the samples are scored: equal ones where right answers are counted; else the first is one
            of so many, and each later one as large as all before it, as in successive halving.
        confidence: a candidate is given up once it loses to its opponent with this probability.
        reward: what they race for, a key of `REWARDS`.
    """

    rounds: int
    confidence: float
    reward: str = "accuracy"

    @property
    def counts(self) -> bool:
        """Whether right answers are counted."""
        return REWARDS[self.reward].is_count

    def parts(self, samples: int, *, seed: int) -> list[np.ndarray]:
        """The samples of each round: a random partition."""
        parts = sample_rounds(samples, self.rounds, seed=seed)
        if self.counts:
            return parts
        ends = [0, *(2**power for power in range(len(parts).bit_length())), len(parts)]
        return [np.concatenate(parts[start:end]) for start, end in pairwise(ends) if start < end]


@dataclass(frozen=True)
class Opponent:
    """Whom a candidate has to beat.

    Attributes:
        allocation: the opponent's.
        record: what it made of each of all samples: which it answers exactly (`pack`), or what each is worth
            (`pack_values`).
    """

    allocation: Allocation
    record: str


@dataclass(frozen=True)
class Candidate:
    """An allocation to evaluate: against an opponent, or on all samples.

    Attributes:
        confirms: on the samples that are kept back from the search.
        few: on which of the few samples of a descent (`lop.search.descent.Few`); 0 if on none.
        itemised: whether what each sample is worth is asked for (`Evaluation.values`), with races or without.
    """

    allocation: Allocation
    opponent: Opponent | None = None
    confirms: bool = False
    few: int = 0
    itemised: bool = False


def sample_rounds(samples: int, rounds: int, *, seed: int) -> list[np.ndarray]:
    """The samples of each round: a random partition, equal to within one sample."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(samples)
    return np.array_split(order, min(rounds, samples))


def split(items: int, count: int, *, seed: int) -> list[int]:
    """`count` of the items, drawn at random."""
    return [int(index) for index in np.random.Generator(np.random.PCG64([seed, items])).permutation(items)[:count]]


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


def trails(racing: Racing, gains: np.ndarray, samples: int) -> bool:
    """Whether a candidate loses to its opponent with the confidence asked for, by a reward that is a real number.

    The sum of what it gains on the `m` samples to come is taken for normal, with `m` times the mean gain so far and the
    variance `s²·(m + m²/n)`: that of the samples, and of the mean of the n seen.

    Args:
        gains: [n] by how much more each sample seen is worth to the candidate than to its opponent.
        samples: how many there are, those to come included.
    """
    seen, coming = len(gains), samples - len(gains)
    deviation = float(gains.std(ddof=1)) * math.sqrt(coming + coming**2 / seen) if seen > 1 else 0.0
    total = samples * float(gains.mean())
    if deviation == 0:
        return seen > 1 and total < 0
    return (1 + math.erf(total / deviation / math.sqrt(2))) / 2 < 1 - racing.confidence


def pack_values(values: np.ndarray) -> str:
    """[n] numbers as text: float16, in Base64."""
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def unpack_values(text: str) -> np.ndarray:
    """The inverse of `pack_values`, but for rounding: [n] float64."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)


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
