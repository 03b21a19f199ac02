"""How the network that writes ratios directly learns from what searches found on other models."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lop.predictor.direct import GIVEN, given_before, odds, step_inputs
from lop.predictor.ensemble import BLUR, SIZE, WIDTH, Ensemble
from lop.predictor.training import Pair
from lop.space.features import Features

# By how much its own ratios, which it is fed with when it answers, are expected to be wrong.
_ERROR = 0.1


@dataclass(frozen=True)
class Lesson:
    """A model, and the allocations that its own search found good."""

    features: Features
    pairs: Sequence[Pair]


class Writers(Ensemble):
    """Each turns the inputs of a step into by how much its ratio's log-odds differ from the target's.

    Untrained, they answer the target itself for every layer. Their arrays are what `lop.predictor.direct` takes.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__({"enter": (inputs, WIDTH), "inner": (WIDTH, WIDTH), "out": (WIDTH, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """[e, N, inputs] to [e, N]."""
        for name in ("enter", "inner"):
            x = torch.tanh(self._linear(name, x))
        return self._linear("out", x)[..., 0]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}/weight"].transpose(1, 2) + self.weights[f"{name}/bias"]


def fit_direct(lessons: Sequence[Lesson], decay: float, seed: int) -> dict[str, np.ndarray]:
    """What `lop.predictor.direct.ratios` answers with.

    Every step of every pair is a row: it sees the true ratios of the layers before it (teacher forcing). Models count
    alike, however deep they are and however many pairs they have.

    Args:
        decay: of the weights.
    """
    steps = [_steps(lesson) for lesson in lessons]
    rows, truth, starts = (np.concatenate(columns) for columns in zip(*steps))
    weights = np.concatenate([np.full(len(found), 1 / len(found) / len(steps)) for _, found, _ in steps])
    own = rows[:, :-GIVEN]
    centre, scale = own.mean(0), own.std(0) + 1e-6
    rows[:, :-GIVEN] = ((own - centre) / scale).clip(-4, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        writers = Writers(rows.shape[1])
        x, y, start, weight = (torch.from_numpy(part).float() for part in (rows, truth, starts, weights))
        _train(writers, x, y, start, weight, decay)
    return {"centre": centre, "scale": scale, **writers.arrays()}


def _steps(lesson: Lesson) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all pairs' steps the inputs [N, 22], the true ratios [N] and the log-odds of their targets [N]."""
    inputs, truth, starts = [], [], []
    for pair in lesson.pairs:
        found = np.array(pair.ratios)
        before = given_before(found, pair.target)
        inputs.append(np.concatenate([step_inputs(lesson.features, pair.target), before], axis=1))
        truth.append(found)
        starts.append(np.full(len(found), odds(pair.target)))
    return np.concatenate(inputs), np.concatenate(truth), np.concatenate(starts)


def _train(writers: Writers, x: Tensor, y: Tensor, start: Tensor, weight: Tensor, decay: float) -> None:
    """By the squared error, as the paper's predictors; inputs are blurred."""

    def loss() -> Tensor:
        blur = BLUR * torch.randn(SIZE, *x.shape)
        blur[..., -GIVEN:] *= _ERROR / BLUR
        return (weight * (torch.sigmoid(writers(x + blur) + start) - y).square()).sum()

    writers.learn(loss, decay)
