"""A few evaluations on a new model: which are worth making, and what they say of all the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lop.predictor.curves import Curves, rising
from lop.search.evaluation import Evaluation
from lop.search.racing import unpack_values
from lop.search.tree import SearchTree, TreeOptions
from lop.space.allocation import Allocation, Space, dense
from lop.space.features import PRUNED

# Shares at which layers are probed: where targets are, and far enough apart to say different things.
SHARES = (0.25, 0.5, 0.75)
# What a probe says of other layers, of layers so many places away, and of shares so many e-folds away.
_COMMON, _REACH, _FOLDS = 0.3, 1.0, 1.5
# Of a measured logarithm, beside what is predicted: the samples are some hundred.
_NOISE = 0.05
_TINY = 1e-9
# Standard errors.
_DOUBT = 2.0
# Of the evaluations for a target, those of layers alone.
_ALONE = 0.4


@dataclass(frozen=True)
class Probe:
    """A layer pruned alone.

    Attributes:
        share: of its neurons that were pruned.
        damage: KL to the dense model, in nats.
    """

    layer: int
    share: float
    damage: float


def corrected(curves: Curves, probes: Sequence[Probe]) -> Curves:
    """The curves given what was measured: a Gaussian process on the errors of their logarithms.

    The covariance of two errors is the product of the curves' deviations there, of a factor that falls with the
    distance of the layers to what all layers have in common, and of one that falls with the ratio of the shares.
    """
    if not probes:
        return curves
    layers = np.array([probe.layer for probe in probes])
    logs = np.log([probe.share for probe in probes])
    grid = np.log(PRUNED)
    mean = np.array([np.interp(log, grid, curves.mean[layer]) for layer, log in zip(layers, logs)])
    deviation = np.array([np.interp(log, grid, curves.deviation[layer]) for layer, log in zip(layers, logs)])
    error = np.log([max(probe.damage, _TINY) for probe in probes]) - mean
    known = _alike(layers, logs, layers, logs) * np.outer(deviation, deviation) + _NOISE**2 * np.eye(len(error))
    count = len(curves.mean)
    rows, columns = np.repeat(np.arange(count), len(grid)), np.tile(grid, count)
    across = _alike(rows, columns, layers, logs) * np.outer(curves.deviation.ravel(), deviation)
    gain = np.linalg.solve(known, across.T).T
    variance = curves.deviation.ravel() ** 2 - (gain * across).sum(1)
    return Curves(
        rising(curves.mean + (gain @ error).reshape(curves.mean.shape)),
        np.sqrt(variance.clip(_NOISE**2)).reshape(curves.mean.shape),
    )


def next_probe(curves: Curves, made: Sequence[Probe]) -> tuple[int, float] | None:
    """The layer and share whose measurement is worth most: by the deviation of what it costs, in nats.

    None if all have been made.
    """
    taken = {(probe.layer, probe.share) for probe in made}
    everywhere = [(layer, share) for share in SHARES for layer in range(len(curves.mean))]
    return _least_certain(curves, [place for place in everywhere if place not in taken])


def _least_certain(curves: Curves, places: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """Of layers and shares the one whose damage deviates most, in nats."""

    def deviation(place: tuple[int, float]) -> float:
        layer, share = place
        mean, spread = (np.interp(np.log(share), np.log(PRUNED), of[layer]) for of in (curves.mean, curves.deviation))
        return float(np.exp(mean) * spread)

    return max(places, key=deviation, default=None)


def _alike(layers: np.ndarray, logs: np.ndarray, others: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The correlation of the errors at two lists of points, [n, m]."""
    near = _COMMON + (1 - _COMMON) * np.exp(-np.abs(layers[:, None] - others) / _REACH)
    return np.asarray(near * np.exp(-0.5 * ((logs[:, None] - theirs) / _FOLDS) ** 2))


def alone(space: Space, layer: int, share: float) -> Allocation:
    """The allocation that prunes one layer's FFN by the share, or as near to it as its widths come."""
    units = round((1 - share) * space.neurons / space.granularity)
    widths = list(dense(space).widths)
    widths[layer] = min(max(units * space.granularity, space.min_width), space.neurons)
    return Allocation(tuple(widths))


def probe(
    curves: Curves,
    space: Space,
    count: int,
    measure: Callable[[Allocation], float],
    made: Sequence[Probe] = (),
    choose: Callable[[Curves, Sequence[Probe]], tuple[int, float] | None] = next_probe,
) -> list[Probe]:
    """As many further probes, each chosen by what those before it say; fewer where there are no more to make.

    Args:
        measure: the KL to the dense model of an allocation, in nats.
        made: what is known already.
        choose: the next one, as `next_probe` does.
    """
    probes = list(made)
    for _ in range(count):
        place = choose(corrected(curves, probes), probes)
        if place is None:
            break
        probes.append(Probe(*place, measure(alone(space, *place))))
    return probes[len(made) :]


@dataclass(frozen=True)
class Start:
    """What a small search for a target begins with.

    Attributes:
        probes: that were made for it.
        allocation: the better of what is predicted with all probes and with none.
        left: evaluations, the allocation's own included.
    """

    probes: tuple[Probe, ...]
    allocation: Allocation
    left: int


def start_for(
    curves: Curves,
    space: Space,
    count: int,
    allocate: Callable[[Sequence[Probe]], Allocation],
    measure: Callable[[Allocation], float],
    made: Sequence[Probe] = (),
) -> Start:
    """Spends the first of `count` evaluations on layers alone, at what an allocation of the target asks of each.

    The layer that is measured next is the one whose damage there is least certain, in nats, given those before.

    Args:
        allocate: the target's allocation, given probes.
        measure: as in `probe`.
        made: what is known already; these count.
    """

    def choose(known: Curves, probes: Sequence[Probe]) -> tuple[int, float] | None:
        seen = {probe.layer for probe in probes}
        places = enumerate(_asked_shares(space, allocate(probes)))
        return _least_certain(known, [place for place in places if place[0] not in seen])

    new = tuple(probe(curves, space, int(_ALONE * count) - len(made), measure, made, choose))
    starts = dict.fromkeys([allocate([*made, *new]), allocate(())])
    left = count - len(new)
    if len(starts) == 1 or left < 2:
        return Start(new, next(iter(starts)), left)
    return Start(new, min(starts, key=measure), left - 1)


def _asked_shares(space: Space, allocation: Allocation) -> list[float]:
    """What each layer is pruned by, but for what is so little or so much that curves say nothing of it."""
    shares = (1 - width / space.neurons for width in allocation.widths[: space.layers])
    inside = (min(max(share, PRUNED[1]), PRUNED[-1]) for share in shares)
    return [1 - alone(space, layer, share).widths[layer] / space.neurons for layer, share in enumerate(inside)]


def small_tree(
    space: Space,
    start: Allocation,
    budget: int,
    evaluations: int,
    options: TreeOptions,
    *,
    seed: int,
    reward: Callable[[Evaluation], float],
) -> SearchTree:
    """A search of a few evaluations from what the curves come to.

    Args:
        start: what is predicted.
        options: of a search; the tree has its moves, guided by all results so far, and fewer evaluations.
    """
    small = replace(options, evaluations=evaluations, simulations=2 * evaluations, guided=True, itemised=True)
    return SearchTree(space, [start], small, seed=(seed, budget), budget=budget, reward=reward)


def surest(tree: SearchTree) -> Allocation:
    """The allocation that is ahead of the tree's first by most, of which two standard errors are taken off.

    The best of thirty means over some hundred samples is mostly the luckiest: what is predicted is left only for what
    is better on the same samples, sample by sample, beyond chance; else it is the answer.
    """

    def lead(allocation: Allocation) -> float:
        gains = worth(allocation) - first
        return float(gains.mean() - _DOUBT * gains.std() / np.sqrt(len(gains)))

    def worth(allocation: Allocation) -> np.ndarray:
        return unpack_values(tree.results[allocation].values or "")

    start = tree.root.allocation
    told = [allocation for allocation in tree.ranked if tree.results[allocation].values]
    if start not in told:
        return tree.best[0]
    first = worth(start)
    return max([start, *told], key=lead)
