"""How sure a measured accuracy is."""

import math
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
    means = []
    for form in np.unique(forms):
        chosen = forms == form
        sums = np.bincount(images[chosen], values[chosen], minlength=count)
        sizes = np.bincount(images[chosen], minlength=count)
        means.append((draws @ sums) / np.maximum(draws @ sizes, 1))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return Interval(mean_over_forms(values, forms), float(low), float(high))
