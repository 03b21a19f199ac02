"""The network that writes ratios directly, for models of any depth: target and features to each layer's pruning ratio.

It is autoregressive over layers, as the paper's predictor is (LOP 4.2 and 4.3), but small: of the ratios that were
given before, a step sees the last one and what all of them have spent. Nothing here needs torch.
"""

from collections.abc import Mapping

import numpy as np

from lop.predictor.curves import read_at
from lop.predictor.inference import log_odds, sigmoid
from lop.space.features import PRUNED, SCALARS, Features

# Of the target: the shares at which a layer's curves are read.
_PARTS = np.array([0.5, 1.0, 1.5])
# What a model has but one value of tells its layers nothing.
_SCALARS = [index for index, name in enumerate(SCALARS) if name != "layers"]
# The last inputs of a step: what `given_before` says.
GIVEN = 2


def step_inputs(features: Features, target: float) -> np.ndarray:
    """[L, 20] what each layer is like beside the others of its model, and the target's log-odds.

    Only how layers differ tells how to share a budget among them: the mean over layers is taken away.
    """
    curves = read_at(features.curves, (target * _PARTS).clip(PRUNED[0], PRUNED[-1]))
    own = np.concatenate([*curves, features.scalars[:, _SCALARS]], axis=1)
    return np.concatenate([own - own.mean(0), np.full((len(own), 1), odds(target))], axis=1)


def given_before(ratios: np.ndarray, target: float) -> np.ndarray:
    """[L, 2] of true ratios [L]: by how much the layer before was pruned beyond the target, and all before, by L."""
    beyond = np.concatenate([[0.0], ratios[:-1] - target])
    return np.stack([beyond, beyond.cumsum() / len(ratios)], axis=1)


def ratios(arrays: Mapping[str, np.ndarray], features: Features, target: float) -> np.ndarray:
    """[L] pruning ratios for a target in [0, 1], before they are projected onto a budget.

    The mean of an ensemble of `lop.predictor.direct_training.Writers`, all computed at once, each fed with its own.
    """
    x = ((step_inputs(features, target) - arrays["centre"]) / arrays["scale"]).clip(-4, 4)
    enter, before, written = arrays["enter.weight"], np.zeros((len(arrays["enter.weight"]), GIVEN)), []
    for entering in np.einsum("eri,li->ler", enter[..., :-GIVEN], x) + arrays["enter.bias"]:
        hidden = np.tanh(entering + (enter[..., -GIVEN:] @ before[..., None])[..., 0])
        hidden = np.tanh((arrays["inner.weight"] @ hidden[..., None])[..., 0] + arrays["inner.bias"])
        said = (arrays["out.weight"] @ hidden[..., None])[..., 0] + arrays["out.bias"]
        written.append(sigmoid(said[:, 0] + odds(target)))
        beyond = written[-1] - target
        before = np.stack([beyond, before[:, 1] + beyond / len(x)], axis=1)
    return np.asarray(np.mean(written, axis=1))


def odds(target: float) -> float:
    """The target's log-odds: what an untrained network answers for every layer."""
    return float(log_odds(np.array(target)))
