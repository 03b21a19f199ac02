"""How sure a measured accuracy is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def wilson(correct: int, total: int) -> Interval:
    """The share `correct / total` with Wilson's 95% score interval (Wilson 1927)."""
    share = correct / total
    spread = _Z95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # Rounding must not push the interval off the share it belongs to.
    return Interval(share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share))


def mean_over_forms(values: np.ndarray, forms: np.ndarray) -> float:
    """The mean over forms of each form's mean value.

    Args:
        values: [n], one number a sample.
        forms: [n], each sample's form as an index.
    """
    return float(np.mean([values[forms == form].mean() for form in np.unique(forms)]))


def paired_bootstrap(
    values: np.ndarray, forms: np.ndarray, images: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """The mean over forms of `values`, with the 95% percentile interval over resampled images (Efron 1979).

    Samples of one image are drawn together, for their errors go together. With the difference of two methods' hits
    as values, the interval is that of the paired difference.

    Args:
        values: [n], one number a sample.
        forms: [n], each sample's form as an index.
        images: [n], each sample's image as an index from 0.
    """
    count = int(images.max()) + 1
    random = np.random.default_rng(seed)
    draws = random.multinomial(count, np.full(count, 1 / count), size=resamples)
    return percentile_interval(mean_over_forms(values, forms), _resampled_means(draws, values, forms, images))


def keyed_bootstrap(values: np.ndarray, keys: Sequence[str]) -> Interval:
    """The mean of `values` [n], with the 95% interval of `paired_bootstrap` over keys: of images and texts."""
    groups = np.unique(keys, return_inverse=True)[1]
    return paired_bootstrap(values, np.zeros(len(groups), dtype=np.int64), groups)


class Resampler:
    """Bootstraps over images, the same draws for everything measured on them, so that differences are paired.

    Args:
        images: each image's name, once.
    """

    def __init__(self, images: Sequence[str], *, seed: int = 0, resamples: int = 2000) -> None:
        count = len(images)
        self._index = {image: number for number, image in enumerate(images)}
        random = np.random.default_rng(seed)
        self._draws = random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float32)

    def means(self, values: np.ndarray, strata: np.ndarray, images: Sequence[str]) -> np.ndarray:
        """[resamples], each the mean over strata of means over units; a unit comes as often as its image is drawn.

        Args:
            values: [n], one number a unit.
            strata: [n], each unit's stratum as an index.
            images: [n], each unit's image.
        """
        places = np.array([self._index[image] for image in images])
        return _resampled_means(self._draws, values, strata, places)


def _resampled_means(draws: np.ndarray, values: np.ndarray, strata: np.ndarray, images: np.ndarray) -> np.ndarray:
    """[resamples], each the mean over strata of means over values, each as often as draws [resamples, images] say."""
    count = draws.shape[1]
    parts = []
    for stratum in np.unique(strata):
        chosen = strata == stratum
        sums = np.bincount(images[chosen], values[chosen], minlength=count)
        sizes = np.bincount(images[chosen], minlength=count)
        parts.append((draws @ sums) / np.maximum(draws @ sizes, 1))
    return np.asarray(np.mean(parts, axis=0))


def percentile_interval(value: float, resampled: np.ndarray) -> Interval:
    """A value with the 95% percentile interval of its resampled selves."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def bootstrap_p(differences: np.ndarray) -> float:
    """The two-sided p-value of a difference, from its resampled selves: how rarely they lie beyond zero.

    `2·min(P(d ≤ 0), P(d ≥ 0))`, each with one more resample counted on either side (Davison & Hinkley 1997), at most 1.
    """
    count = len(differences) + 1
    below, above = np.sum(differences <= 0) + 1, np.sum(differences >= 0) + 1
    return float(min(1.0, 2 * min(below, above) / count))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The exact two-sided p-value of McNemar's test (1947): do two methods err on as many questions?

    Args:
        first, second: [n] bool, which questions each method answers right.
    """
    only = sorted((int((first & ~second).sum()), int((second & ~first).sum())))
    total = sum(only)
    tail = sum(math.comb(total, count) for count in range(only[0] + 1))
    return min(1.0, 2 * tail / 2**total)
