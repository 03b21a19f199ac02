"""One predictor for models that it has never seen: from the features of a model's layers to their damage curves.

What a curve would be by second order (`lop.space.features.Features`, `fisher`) is corrected by what was learned from
the models of a zoo. One kind writes ratios directly, without curves. Nothing here needs torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lop.errors import LopError
from lop.predictor.curves import Curves, Rule, rising
from lop.predictor.direct import ratios
from lop.predictor.probing import Probe, corrected
from lop.space.allocation import Allocation, Space, project
from lop.space.features import PRUNED, SCALARS, Features
from lop.storage.files import atomic_file

SHIPPED = Path(str(files("lop"))) / "assets" / "general" / "predictor.safetensors"
Arrays = Mapping[str, np.ndarray]
# Mean [L, 9] and variance [L, 9] of the correction.
Corrector = Callable[[Arrays, Features], tuple[np.ndarray, np.ndarray]]
# Pruning ratios [L] for a target.
Writer = Callable[[Arrays, Features, float], np.ndarray]
# A correction is no greater than this, however unlike the zoo a model is.
_MOST = 5.0


@dataclass(frozen=True)
class General:
    """A trained predictor.

    Attributes:
        kind: of `CORRECTORS`, and of `WRITERS` if it writes ratios.
        arrays: its weights.
        rule: how curves become allocations.
        members: the names of the models that it was trained on.
    """

    kind: str
    arrays: Arrays
    rule: Rule
    members: tuple[str, ...]

    def curves(self, features: Features) -> Curves:
        """What it expects of a model's layers."""
        mean, variance = CORRECTORS[self.kind](self.arrays, features)
        return Curves(rising(features.curve("fisher") + mean.clip(-_MOST, _MOST)), np.sqrt(variance))

    def answering(self, features: Features, probes: Sequence[Probe] = ()) -> Callable[[Space, int], Allocation]:
        """From a space and a budget to the allocation for a model: once layers were probed, always by its curves."""
        if self.kind in WRITERS and not probes:
            return partial(self._written, features)
        return partial(corrected(self.curves(features), probes).allocate, rule=self.rule)

    def _written(self, features: Features, space: Space, budget: int) -> Allocation:
        """The allocation of the budget that is nearest to the ratios it writes."""
        return project(WRITERS[self.kind](self.arrays, features, space.ratio(budget)), space, budget)

    def save(self, path: Path) -> None:
        """Writes one file."""
        about = {"kind": self.kind, "members": ",".join(self.members)}
        about |= {name: repr(value) for name, value in asdict(self.rule).items()}
        with atomic_file(path) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in self.arrays.items()}, temporary, about)


def load_general(path: Path = SHIPPED) -> General:
    """What `General.save` wrote; by default what ships.

    Raises:
        LopError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata()
        rule = Rule(float(about["power"]), float(about["cap"]))
        return General(about["kind"], arrays, rule, tuple(about["members"].split(",")))
    except FileNotFoundError:
        raise LopError(f"{path} is missing: `python -m training.zoo.fit` makes it") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise LopError(f"{path} is damaged: {error}") from None


def layer_inputs(features: Features) -> np.ndarray:
    """[L, 47] what a network reads of each layer."""
    fisher = features.curve("fisher")
    parts = [features.scalars, features.curve("refit"), features.curve("energy"), fisher, fisher - fisher.mean(0)]
    return np.concatenate(parts, axis=1)


def point_inputs(features: Features) -> np.ndarray:
    """[L, 9, n] what a regression reads of each layer at each of `PRUNED`."""
    fisher, share = features.curve("fisher"), np.array(PRUNED)
    shape = fisher.shape
    slope = np.gradient(fisher, np.log(share), axis=1)
    scalars = {name: np.broadcast_to(features.scalars[:, i, None], shape) for i, name in enumerate(SCALARS)}
    log_share = np.broadcast_to(np.log(share), shape)
    # What comes after a layer: how much the others add to what it hands on.
    change = np.log(np.exp(features.scalars[::-1, SCALARS.index("change")]).cumsum()[::-1])
    columns = [
        log_share,
        np.broadcast_to(np.log1p(-share), shape),
        features.curve("refit"),
        features.curve("energy"),
        fisher,
        fisher - fisher.mean(0),
        slope,
        *scalars.values(),
        scalars["depth"] ** 2,
        scalars["depth"] * log_share,
        scalars["change"] * log_share,
        fisher * log_share,
        np.broadcast_to(change[:, None], shape),
    ]
    return np.stack(columns, axis=2)


def _ridge(arrays: Arrays, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Bayesian linear regression: its variance grows with the distance from what it was trained on."""
    x = (point_inputs(features) - arrays["centre"]) / arrays["scale"]
    x = np.concatenate([np.ones((*x.shape[:2], 1)), x.clip(-4, 4)], axis=2)
    leverage = np.einsum("lpi,ij,lpj->lp", x, arrays["covariance"], x)
    return x @ arrays["weights"], arrays["noise"] * (1 + leverage)


def _attention(arrays: Arrays, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """The mean of an ensemble of `lop.predictor.general_training.CurveNetwork`, all at once."""
    x = ((layer_inputs(features) - arrays["centre"]) / arrays["scale"]).clip(-4, 4)
    hidden = _linear(arrays, "enter", x[None])
    query, key, value = np.split(_linear(arrays, "qkv", hidden), 3, axis=-1)
    scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    hidden = hidden + _linear(arrays, "mix", (weights / weights.sum(-1, keepdims=True)) @ value)
    found = _linear(arrays, "out", np.tanh(_linear(arrays, "inner", np.tanh(hidden))))
    means, logs = np.split(found, 2, axis=-1)
    variance = np.exp(logs.clip(-6, 4)).mean(0) + means.var(0)
    return means.mean(0), variance * arrays["noise"]


def _linear(arrays: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    """[members, L, inputs] to [members, L, outputs]."""
    return np.asarray(x @ arrays[f"{name}.weight"].swapaxes(1, 2) + arrays[f"{name}.bias"][:, None])


def _none(arrays: Arrays, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """No correction but a constant: what second order alone is worth."""
    shape = features.curve("fisher").shape
    return np.broadcast_to(arrays["shift"], shape), np.broadcast_to(arrays["noise"], shape)


# The curves of the kind that writes ratios are second order's: for probes, which correct curves.
CORRECTORS: dict[str, Corrector] = {"second-order": _none, "ridge": _ridge, "attention": _attention, "direct": _none}
WRITERS: dict[str, Writer] = {"direct": ratios}
