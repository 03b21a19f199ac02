"""How trained predictors answer: the networks of `lop.predictor.networks` in NumPy alone, one target at a time.

They are so small that importing torch takes a thousand times as long as an answer. Arithmetic is float32, as in
training; weights go by torch's names for them.
"""

from collections.abc import Callable, Mapping
from math import sqrt

import numpy as np

from lop.errors import LopError

DIMENSION = 128
HEADS = 4
ENCODER_LAYERS = 2
_EPSILON = np.float32(1e-5)  # torch's, of every LayerNorm.
_ERF_SCALE = np.float32(0.3275911)
_ERF_SERIES = np.array([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592], np.float32)

Weights = Mapping[str, np.ndarray]
Vector = np.ndarray


def predict(architecture: str, weights: Weights, layers: int, target: float) -> np.ndarray:
    """[L] pruning ratios, float32, for a target in [0, 1].

    Raises:
        LopError: no architecture has that name, or the weights are another's.
    """
    if architecture not in NETWORKS:
        raise LopError(f"architecture {architecture!r} is not one of {', '.join(NETWORKS)}")
    try:
        ratios = NETWORKS[architecture](weights, layers, np.array([target], np.float32))
    except (KeyError, ValueError) as error:
        raise LopError(f"the weights do not fit a network {architecture!r}: {error}") from None
    if ratios.shape != (layers,):
        raise LopError(f"the weights are of a network for {ratios.size} layers, not {layers}")
    return ratios


def mlp(weights: Weights, layers: int, target: Vector) -> Vector:
    """`lop.predictor.networks.Mlp`."""
    x = _relu(_linear(weights, "body.0", target))
    x = _relu(_linear(weights, "body.2", x))
    return sigmoid(_linear(weights, "out", x) + log_odds(target))


def lstm(weights: Weights, layers: int, target: Vector) -> Vector:
    """`lop.predictor.networks.BiLstm`; each step's input is the same."""
    x = _linear(weights, "project", target)
    forth = _lstm(weights, layers, x, "l0")
    back = _lstm(weights, layers, x, "l0_reverse")
    states = np.concatenate([forth, back[::-1]], axis=1)
    return sigmoid(_linear(weights, "out", states)[:, 0] + log_odds(target))


def transformer(weights: Weights, layers: int, target: Vector) -> Vector:
    """`networks.ArTransformer`, each ratio fed back into the next step; earlier steps' keys and values are kept."""
    x = _relu(_linear(weights, "target.0", target))
    tokens = _linear(weights, "target.2", x) + weights["position"]
    feed, odds = weights["ratio.weight"][:, 0], log_odds(target)
    steps = [_block(weights, f"blocks.{index}", len(tokens)) for index in range(ENCODER_LAYERS)]
    ratios = np.zeros(len(tokens), np.float32)
    for layer, token in enumerate(tokens):
        x = token + feed * ratios[layer - 1] if layer else token
        for step in steps:
            x = step(x, layer)
        ratios[layer] = sigmoid(_linear(weights, "out", _norm(weights, "norm", x)) + odds)[0]
    return ratios


NETWORKS: dict[str, Callable[[Weights, int, Vector], Vector]] = {
    "mlp": mlp, "lstm": lstm, "transformer": transformer
}  # fmt: skip


def _lstm(weights: Weights, layers: int, x: Vector, name: str) -> np.ndarray:
    """[L, d] states of one direction, in the order of its steps."""
    given = weights[f"lstm.weight_ih_{name}"] @ x + weights[f"lstm.bias_ih_{name}"] + weights[f"lstm.bias_hh_{name}"]
    again = weights[f"lstm.weight_hh_{name}"]
    hidden = cell = np.zeros(again.shape[1], np.float32)
    states = []
    for _ in range(layers):
        entry, forget, candidate, out = np.split(given + again @ hidden, 4)
        cell = sigmoid(forget) * cell + sigmoid(entry) * np.tanh(candidate)
        hidden = sigmoid(out) * np.tanh(cell)
        states.append(hidden)
    return np.stack(states)


def _block(weights: Weights, name: str, layers: int) -> Callable[[Vector, int], Vector]:
    """A causal encoder layer as a function of one step [d] and its number, which remembers the steps before it."""
    size = DIMENSION // HEADS
    keys, values = np.zeros((2, HEADS, layers, size), np.float32)
    scale = np.float32(1 / sqrt(size))

    def step(x: Vector, number: int) -> Vector:
        qkv = _linear(weights, f"{name}.qkv", _norm(weights, f"{name}.before_attention", x)).reshape(3, HEADS, size)
        query, keys[:, number], values[:, number] = qkv
        seen = slice(number + 1)
        scores = (keys[:, seen] @ query[:, :, None])[..., 0] * scale
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        attended = (shares[:, None] @ values[:, seen]).reshape(DIMENSION)
        x = x + _linear(weights, f"{name}.mix", attended)
        inner = _gelu(_linear(weights, f"{name}.ffn.0", _norm(weights, f"{name}.before_ffn", x)))
        return x + _linear(weights, f"{name}.ffn.2", inner)

    return step


def _linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """[..., inputs] to [..., outputs]."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: Vector) -> Vector:
    centred = x - x.sum() / DIMENSION
    deviation = np.sqrt(centred @ centred / DIMENSION + _EPSILON)
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _relu(x: Vector) -> Vector:
    return np.maximum(x, 0)


def _gelu(x: Vector) -> Vector:
    return x * (0.5 + 0.5 * _erf(x * np.float32(sqrt(0.5))))


def _erf(x: Vector) -> Vector:
    """The error function within 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26), which NumPy lacks."""
    size = np.abs(x)
    t = 1 / (1 + _ERF_SCALE * size)
    series = np.zeros_like(t)
    for coefficient in _ERF_SERIES:
        series = (series + coefficient) * t
    return np.copysign(1 - series * np.exp(-size * size), x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # Which overflows nowhere.


def log_odds(target: Vector) -> Vector:
    """Added to what a network says, so that it learns in which direction a layer differs from uniform.

    Clamped, as the log-odds of nothing and of everything are infinite; the projection makes up for the difference.
    """
    clamped = target.clip(0.01, 0.99)
    return np.log(clamped / (1 - clamped))
