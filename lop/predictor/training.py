"""How predictors learn from what the search found."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lop.errors import LopError
from lop.predictor.inference import predict
from lop.predictor.networks import build, weights_of


@dataclass(frozen=True)
class Pair:
    """A target ratio with the ratios of an allocation that the search found good for it.

    `weight`, above zero, says how much the pair counts in training beside the others; validation counts all alike.
    """

    target: float
    ratios: tuple[float, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Fit:
    """A trained network: the weights of its best epoch, the mean squared errors by epoch and the seconds it took."""

    architecture: str
    learning_rate: float
    weights: dict[str, np.ndarray]
    validation_error: float
    training_errors: tuple[float, ...]
    validation_errors: tuple[float, ...]
    seconds: float


def check_targets(targets: Collection[float]) -> None:
    """Looks whether there are enough distinct targets to hold one out.

    Raises:
        LopError: there are fewer than three.
    """
    if len(set(targets)) < 3:
        raise LopError(f"{len(set(targets))} targets are too few: training needs three, to hold one out")


def split_pairs(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs; about `share` of the targets, evenly spread, are held out with all their pairs.

    The first and last target are always trained on, so that validation asks for interpolation.

    Raises:
        LopError: there are fewer than three targets.
    """
    targets = sorted({pair.target for pair in pairs})
    check_targets(targets)
    inner = targets[1:-1]
    count = min(max(1, round(share * len(targets))), len(inner))
    held = {inner[(2 * index + 1) * len(inner) // (2 * count)] for index in range(count)}
    return [p for p in pairs if p.target not in held], [p for p in pairs if p.target in held]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in the same order everywhere; and networks this small gain nothing from more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def fit(
    architecture: str,
    training: Sequence[Pair],
    validation: Sequence[Pair],
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, error: None,
) -> Fit:
    """Trains one network (LOP 4.3: MSE, Adam) and keeps the epoch with the least validation error.

    The validation error is that of free predictions, each step fed with the network's own, as the predictor is used.
    If no epoch improves on the untrained network, which answers the uniform allocation, that one is returned. The same
    arguments give the same weights, whatever the process's random state and its number of threads.

    Args:
        on_epoch: called with each epoch's number, from 0, and its validation error.

    Raises:
        LopError: there are no pairs to train on or to validate with, or their ratios differ in number.
    """
    _check(training, validation)
    started = time.perf_counter()
    targets, ratios, weights = _tensors(training)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(architecture, ratios.shape[1])
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
    best = weights_of(network)
    least = validation_error(architecture, best, validation)
    history: list[tuple[float, float]] = []
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(targets), generator=generator).split(batch):
            errors = (network(targets[chosen], ratios[chosen]) - ratios[chosen]).square().mean(1)
            loss = (weights[chosen] * errors).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(chosen)
        now = weights_of(network)
        error = validation_error(architecture, now, validation)
        history.append((total / len(targets), error))
        if error < least:
            best, least = now, error
        on_epoch(epoch, error)
    training_errors, validation_errors = zip(*history)
    seconds = time.perf_counter() - started
    return Fit(architecture, learning_rate, best, least, training_errors, validation_errors, seconds)


def validation_error(architecture: str, weights: Mapping[str, np.ndarray], pairs: Sequence[Pair]) -> float:
    """The mean squared error of free predictions."""
    layers = len(pairs[0].ratios)
    predicted = {target: predict(architecture, weights, layers, target) for target in {pair.target for pair in pairs}}
    return float(np.mean([np.square(predicted[pair.target] - pair.ratios).mean() for pair in pairs]))


def _check(training: Sequence[Pair], validation: Sequence[Pair]) -> None:
    if not training or not validation:
        raise LopError(f"{len(training)} pairs to train on, {len(validation)} to validate with: there must be some")
    if len(layers := {len(pair.ratios) for pair in [*training, *validation]}) > 1:
        raise LopError(f"the pairs are of different models: {min(layers)} and {max(layers)} layers")


def _tensors(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Targets [N], ratios [N, L] and weights [N] with mean 1."""
    weights = torch.tensor([pair.weight for pair in pairs])
    targets, ratios = torch.tensor([pair.target for pair in pairs]), torch.tensor([pair.ratios for pair in pairs])
    return targets, ratios, weights / weights.mean()
