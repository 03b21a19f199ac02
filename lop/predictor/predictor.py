"""The predictors of LOP (4.3 and A.1): from a target ratio to each layer's pruning ratio.

Nothing here needs torch: an answer takes milliseconds, and so should the way to it.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lop.errors import LopError
from lop.predictor.inference import DIMENSION, ENCODER_LAYERS, HEADS, predict
from lop.space.allocation import Allocation, Space, parse_space, project
from lop.space.size import ModelSize
from lop.storage.files import atomic_folder, read_json, write_json
from lop.storage.fingerprint import fingerprint

_NETWORK = {"dimension": DIMENSION, "heads": HEADS, "encoder_layers": ENCODER_LAYERS}


@dataclass(frozen=True)
class Predictor:
    """A trained network with all that turns a target into an allocation: no model is needed.

    A network through as few pairs as a search leaves is smooth, and a little beside each of them. What it is beside at
    the targets that were searched is added, and between two of them what lies between: so it says there what the search
    has found (regression and interpolated residuals, as in universal kriging).

    Attributes:
        architecture: a name of `lop.predictor.inference.NETWORKS`.
        weights: the network's parameters by name.
        space: the allocations of the model that it was trained for.
        size: the dense model's numbers.
        fingerprints: what the predictor was made from.
        known: the search's answers, of different budgets; without any the network answers alone.
    """

    architecture: str
    weights: Mapping[str, np.ndarray]
    space: Space
    size: ModelSize
    fingerprints: Mapping[str, str]
    known: tuple[Allocation, ...] = ()

    @property
    def source(self) -> None:
        """None: the model's own search is what it learned from."""

    def ratios(self, target: float) -> np.ndarray:
        """[axes] the pruning ratios for a target in [0, 1], before they are projected onto the budget.

        Raises:
            LopError: the weights are of another network.
        """
        found = self.network_ratios(target)
        if self.known:
            targets, beside = self._beside
            position = float(np.interp(target, targets, np.arange(len(targets))))
            low, high = math.floor(position), math.ceil(position)
            found += beside[low] + (position - low) * (beside[high] - beside[low])
        return found

    def network_ratios(self, target: float) -> np.ndarray:
        """[axes] the network's own.

        Raises:
            LopError: the weights are of another network.
        """
        return predict(self.architecture, self.weights, self.space.axes, target).astype(np.float64)

    @cached_property
    def _beside(self) -> tuple[np.ndarray, np.ndarray]:
        """The targets [n] of what is known, rising, and by how much the network is beside [n, axes]."""
        by_target = {self.space.ratio_of(allocation.widths): allocation for allocation in self.known}
        targets = sorted(by_target)
        beside = [by_target[target].ratios(self.space) - self.network_ratios(target) for target in targets]
        return np.array(targets), np.array(beside)

    def allocate(self, budget: int) -> Allocation:
        """The allocation of `budget` nearest to what is predicted.

        Raises:
            LopError: the budget is not one of the space's.
        """
        return project(self.ratios(self.space.ratio(budget)), self.space, budget)

    def save(self, folder: Path) -> None:
        """Writes `predictor.json` and `weights.safetensors` into a folder, in the place of an older predictor."""
        data = save({name: np.ascontiguousarray(array) for name, array in self.weights.items()})
        about = {
            "architecture": self.architecture,
            "network": _NETWORK,
            "space": self.space.as_dict(),
            "size": asdict(self.size),
            "fingerprints": dict(self.fingerprints),
            # Only where there is any, so that what was trained before keeps its fingerprint.
            **({"known": [list(allocation.widths) for allocation in self.known]} if self.known else {}),
            "weights": hashlib.sha256(data).hexdigest(),
        }
        with atomic_folder(folder, replace=True) as temporary:
            (temporary / "weights.safetensors").write_bytes(data)
            write_json(temporary / "predictor.json", {**about, "fingerprint": fingerprint(about)})


def load_predictor(folder: Path) -> Predictor:
    """Reads what `Predictor.save` wrote.

    Raises:
        LopError: a file is missing, damaged (a single flipped byte is found) or of a network that is not built here.
    """
    if not folder.is_dir():
        raise LopError(f"{folder} is missing: run `lop train` first")
    about: dict[str, Any] = read_json(folder / "predictor.json")
    try:
        if about.pop("fingerprint") != fingerprint(about):
            raise LopError(f"{folder} is damaged: predictor.json is not what was written (its fingerprint differs)")
        data = (folder / "weights.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != about["weights"]:
            raise LopError(f"{folder} is damaged: weights.safetensors is not what was written (SHA-256 differs)")
        if about["network"] != _NETWORK:
            raise LopError(f"{folder} holds a network of {about['network']}, here it is {_NETWORK}: train it again")
        predictor = Predictor(
            architecture=about["architecture"],
            weights=load(data),
            space=parse_space(about["space"]),
            size=ModelSize(**about["size"]),
            fingerprints=about["fingerprints"],
            known=tuple(Allocation(tuple(widths)) for widths in about.get("known", [])),
        )
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise LopError(f"{folder} is damaged: {' '.join(str(error).split())}") from None
    try:
        predictor.ratios(0.5)  # What does not fit the network is found here, not at the first prediction.
    except LopError as error:
        raise LopError(f"{folder} is damaged: {error}") from None
    return predictor
