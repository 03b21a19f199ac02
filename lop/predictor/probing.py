"""A few evaluations on a new model: which are worth making, and what they say of all the others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lop.predictor.curves import Curves, rising
from lop.search.evaluation import Evaluation
from lop.search.guide import Guide
from lop.search.racing import unpack_values
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
_DOUBT = 1.0
# Of the allocations evaluated so far, from which moves are made.
_BEST = 3
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


def probe_layers(
    curves: Curves,
    space: Space,
    count: int,
    allocate: Callable[[Sequence[Probe]], Allocation],
    measure: Callable[[Allocation], float],
    made: Sequence[Probe] = (),
) -> list[Probe]:
    """Spends two fifths of `count` evaluations on layers alone, at what an allocation of the target asks of each.

    The layer that is measured next is the one whose damage there is least certain, in nats, given those before.

    Args:
        allocate: the target's allocation, given probes.
        measure: as in `probe`.
        made: what is known already; these count.

    Returns:
        Those made before and now.
    """

    def choose(known: Curves, probes: Sequence[Probe]) -> tuple[int, float] | None:
        seen = {probe.layer for probe in probes}
        places = enumerate(_asked_shares(space, allocate(probes)))
        return _least_certain(known, [place for place in places if place[0] not in seen])

    return [*made, *probe(curves, space, int(_ALONE * count) - len(made), measure, made, choose)]


def _asked_shares(space: Space, allocation: Allocation) -> list[float]:
    """What each layer is pruned by, but for what is so little or so much that curves say nothing of it."""
    shares = (1 - width / space.neurons for width in allocation.widths[: space.layers])
    inside = (min(max(share, PRUNED[1]), PRUNED[-1]) for share in shares)
    return [1 - alone(space, layer, share).widths[layer] / space.neurons for layer, share in enumerate(inside)]


def look_around(
    space: Space,
    curves: Curves,
    starts: Sequence[Allocation],
    budget: int,
    count: int,
    evaluate: Callable[[Allocation], Evaluation],
    *,
    size: float,
    seed: int,
) -> dict[Allocation, Evaluation]:
    """Evaluates allocations of a budget one after the other: first the starts, then always the most promising move.

    That is, of many from the three best so far, the one that is expected to surpass the best by most, by what the
    curves say together and a Gaussian process through how far they were wrong (`lop.search.guide`). So few evaluations
    are better spent where most is expected than on a tree.

    Args:
        curves: given all probes.
        starts: what is predicted, with and without them; none comes after one that is the same.
        count: evaluations in all.
        evaluate: on each sample, too.
        size: about the largest change of a layer's ratio.

    Returns:
        What was evaluated, in that order; less than `count` where no move leads anywhere new.
    """
    guide = Guide(space, budget, prior=lambda ratios: -curves.together(ratios[:, : space.layers]))
    random = np.random.default_rng([seed, budget])
    found = {start: evaluate(start) for start in starts[:count]}
    while len(found) < count:
        rewards = {allocation: evaluation.worth("divergence") for allocation, evaluation in found.items()}
        best = sorted(rewards, key=lambda allocation: rewards[allocation], reverse=True)[:_BEST]
        move = guide.move(best, size, random, rewards, dict.fromkeys(found), found)
        if move in found:
            break
        found[move] = evaluate(move)
    return found


def surest(found: Mapping[Allocation, Evaluation], starts: Sequence[Allocation]) -> Allocation:
    """The allocation that is ahead of the better start by most, of which a standard error is taken off.

    The best of thirty means over some hundred samples is mostly the luckiest: what is predicted is left only for what
    is better on the same samples, sample by sample, by more than that; else it is the answer.

    Args:
        found: what `look_around` found from the starts.
    """
    worth = {allocation: unpack_values(known.values) for allocation, known in found.items() if known.values}
    able = [start for start in starts if start in worth]
    if not able:  # None could be evaluated.
        return starts[0]
    first = worth[max(able, key=lambda start: float(worth[start].mean()))]

    def lead(allocation: Allocation) -> float:
        gains = worth[allocation] - first
        return float(gains.mean() - _DOUBT * gains.std() / np.sqrt(len(gains)))

    return max([*able, *worth], key=lead)


def probe_for(
    space: Space,
    curves: Curves,
    budget: int,
    count: int,
    allocate: Callable[[Sequence[Probe]], Allocation],
    measure: Callable[[Allocation], float],
    evaluate: Callable[[Allocation], Evaluation],
    *,
    size: float,
    seed: int,
    made: Sequence[Probe] = (),
) -> tuple[list[Probe], Allocation]:
    """Spends `count` evaluations on a budget: two fifths on layers alone, of which others' probes count as many.

    Args: as in `probe_layers` and `look_around`.

    Returns:
        All probes, and the answer.
    """
    probes = probe_layers(curves, space, count, allocate, measure, made)
    starts = list(dict.fromkeys([allocate(probes), allocate(())]))
    left = count - min(len(probes), int(_ALONE * count))
    known = corrected(curves, probes)
    return probes, surest(look_around(space, known, starts, budget, left, evaluate, size=size, seed=seed), starts)
