"""What a model's layers are like, in numbers without units: what a predictor for models that it has never seen reads.

`lop.model.features` measures them.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np

# Pruned shares of a layer at which curves are known; between them they are interpolated.
PRUNED = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 15 / 16)
CURVES = ("energy", "refit", "fisher")
SCALARS = (
    "depth",
    "layers",
    "change",
    "turn",
    "output",
    "sensitivity",
    "decay",
    "outlier",
    "spread",
    "norms",
    "constant",
)


@dataclass(frozen=True)
class Features:
    """Of L layers; all but `depth`, `turn` and `constant` are natural logarithms.

    Attributes:
        curves: [3, L, 9] float64, at each of `PRUNED`: the share of the neurons' energy that is lost (`energy`), the
            share of the FFN's output energy that a ridge refit does not bring back (`refit`), and the KL divergence in
            nats that this error costs by second order (`fisher`).
        scalars: [L, 11] float64: place between 0 and 1 (`depth`); number of layers (`layers`); energy of what the layer
            adds to the residual stream by the stream's (`change`), and the cosine between the stream before and after
            (`turn`); energy of the FFN's output by the stream's (`output`); what a perturbation of the size of the
            stream does to the answers, in nats by second order (`sensitivity`), and how much less the same
            perturbation does after the layer than before the first one (`decay`); the largest neuron's energy by the
            mean (`outlier`), how many neurons share the energy by how many there are (`spread`); the deviation of the
            down projection's column norms by their mean (`norms`); the share of the energy that is the neurons' mean
            (`constant`).
    """

    curves: np.ndarray
    scalars: np.ndarray

    @property
    def layers(self) -> int:
        """`L`."""
        return len(self.scalars)

    def curve(self, name: str) -> np.ndarray:
        """[L, 9], one of `CURVES`."""
        return cast(np.ndarray, self.curves[CURVES.index(name)])
