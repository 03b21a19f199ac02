"""Scores of FFN neurons, and of groups of attention heads: which to keep first.

Each takes the statistics and returns [L, F], or [L, K] of groups; higher is kept longer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lop.errors import LopError

# The settings of a run name importances, so their registry is read with no torch behind it.
if TYPE_CHECKING:
    from lop.model.statistics import NeuronStatistics


def activation(statistics: "NeuronStatistics") -> np.ndarray:
    """`sqrt(Σ h_j²)`, the L2 norm of the neuron's activation over calibration tokens (LOP, A.2)."""
    return np.sqrt(statistics.squares)


def contribution(statistics: "NeuronStatistics") -> np.ndarray:
    """`sqrt(Σ h_j²)·‖W_down[:, j]‖₂`, the L2 norm over tokens of what the neuron adds to the residual stream."""
    return activation(statistics) * statistics.down_l2


def magnitude(statistics: "NeuronStatistics") -> np.ndarray:
    """`‖W_down[:, j]‖₂`."""
    return statistics.down_l2


def wanda(statistics: "NeuronStatistics") -> np.ndarray:
    """`mean_i |W_down[i, j]|·sqrt(E[h_j²])` (Wanda, Sun et al. 2023; structured as in An et al. 2023).

    The same as FLAP's weighted input feature norm, WIFN.
    """
    return statistics.down_l1 * np.sqrt(statistics.squares / statistics.count)


def fluctuation(statistics: "NeuronStatistics") -> np.ndarray:
    """`Var[h_j]`, the input feature variance IFV (FLAP, An et al. 2023)."""
    return statistics.variance


def flap(statistics: "NeuronStatistics") -> np.ndarray:
    """`Var[h_j]·‖W_down[:, j]‖₂²`, the weighted input feature variance WIFV (FLAP, An et al. 2023).

    The exact token-weighted variance, where FLAP's published code uses a running approximation.
    """
    return statistics.variance * statistics.down_l2**2


def taylor(statistics: "NeuronStatistics") -> np.ndarray:
    """`Σ_θ |θ·∂L/∂θ|` over a neuron's weights (LLM-Pruner, Ma et al. 2023: element-wise); see `lop.model.taylor`."""
    return statistics.surveyed("element")


def taylor_vector(statistics: "NeuronStatistics") -> np.ndarray:
    """`Σ |Σ_θ θ·∂L/∂θ|` over a neuron's two rows and its column (LLM-Pruner: vector-wise); see `lop.model.taylor`."""
    return statistics.surveyed("vector")


def sequences(statistics: "NeuronStatistics") -> np.ndarray:
    """`sqrt(Σ_s (E_t |h_j(x_st)|)²)`, the L2 norm over sequences of means over tokens (Minitron, 2024)."""
    return np.sqrt(statistics.surveyed("squares"))


def surgeon(statistics: "NeuronStatistics") -> np.ndarray:
    """How late the optimal brain surgeon removes the neuron (ZipLM, DarwinLM); see `lop.model.removal`."""
    return -np.argsort(statistics.surveyed("order"), axis=1).astype(np.float64)


IMPORTANCES: "dict[str, Callable[[NeuronStatistics], np.ndarray]]" = {
    "activation": activation,
    "contribution": contribution,
    "magnitude": magnitude,
    "wanda": wanda,
    "flap": flap,
    "fluctuation": fluctuation,
    "taylor": taylor,
    "taylor-vector": taylor_vector,
    "sequences": sequences,
    "surgeon": surgeon,
}


def flap_groups(statistics: "NeuronStatistics") -> np.ndarray:
    """FLAP's metric of heads, here the mean over the columns that `o_proj` has for a group of

        z_c,   m_c = (Var[a_c]·‖W_o[:, c]‖₂²)²,

    `a_c` being what the head says there, and z the columns' m standardised over all of a layer's, by the unbiased
    deviation (An et al. 2023; `lib/prune.py` of github.com/CASIA-IVA-Lab/FLAP: WIFV, squared for `o_proj`, AL-AM). A
    layer whose columns are all equal counts as average.
    """
    metric = (statistics.surveyed("said_variance") * statistics.surveyed("out_l2") ** 2) ** 2  # [L, K, columns]
    layers, groups, _ = metric.shape
    return standardised(metric.reshape(layers, -1)).reshape(layers, groups, -1).mean(2)


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores [L, n] less their layer's mean, by its unbiased deviation; a layer of equal scores counts as average."""
    deviation = scores.std(axis=1, ddof=1, keepdims=True)
    centred: np.ndarray = scores - scores.mean(axis=1, keepdims=True)
    return centred / np.where(deviation > 0, deviation, 1)


@dataclass(frozen=True)
class OfBoth:
    """An importance of groups of attention heads, too, as some methods have it.

    Attributes:
        neurons: of `IMPORTANCES`, that of FFNs.
        groups: the scores [L, K].
    """

    neurons: str
    groups: "Callable[[NeuronStatistics], np.ndarray]"


OF_BOTH = {
    "flap-heads": OfBoth("flap", flap_groups),
    "taylor-heads": OfBoth("taylor", lambda statistics: statistics.surveyed("head_element")),
    "taylor-heads-vector": OfBoth("taylor-vector", lambda statistics: statistics.surveyed("head_vector")),
}
# What an importance reads beside the statistics: the surveys (`lop.run.surveys`) that find it.
SURVEYS_OF = {
    "taylor": ("gradients",),
    "taylor-vector": ("gradients",),
    "sequences": ("sequences",),
    "surgeon": ("removal",),
    "flap-heads": ("heads",),
    "taylor-heads": ("gradients", "head-gradients"),
    "taylor-heads-vector": ("gradients", "head-gradients"),
}


def importance(name: str, statistics: "NeuronStatistics") -> np.ndarray:
    """The scores [L, F] of a named importance.

    Raises:
        LopError: no importance has that name.
    """
    name = OF_BOTH[name].neurons if name in OF_BOTH else name
    if name not in IMPORTANCES:
        raise LopError(f"importance {name!r} is not one of {', '.join(IMPORTANCES)}")
    return IMPORTANCES[name](statistics)


def of_groups(statistics: "NeuronStatistics", name: str) -> np.ndarray:
    """The scores [L, K] of groups of attention heads beside a named importance of neurons.

    Unless it has its own (`OF_BOTH`), the L2 norm over calibration tokens of what a group adds to the residual stream.

    Raises:
        LopError: the statistics are of FFNs alone.
    """
    if name in OF_BOTH:
        return OF_BOTH[name].groups(statistics)
    if statistics.groups is None:
        raise LopError("these statistics are of FFNs alone: run `lop calibrate` with parts [ffn, attention]")
    return np.sqrt(statistics.groups)


def order(scores: np.ndarray) -> np.ndarray:
    """[L, F] unit indices, the most important first; equal scores keep their order."""
    return np.argsort(-scores, axis=1, kind="stable")
