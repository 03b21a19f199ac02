"""ShortGPT (Men et al., 2024): the layers that change the states least are removed.

The influence of layer l is `BI_l = 1 − mean_t (x_l(t)·x_{l+1}(t)) / (‖x_l(t)‖·‖x_{l+1}(t)‖)`, `x_l(t)` being the state
of token t before it (the paper's eq. 1); those of least influence go, all at once. As many are removed as hold the
parameters that are asked for: with whole layers that is mostly more.

Published without any recovery. With recovery `refit` the layer before each gap says what the gap did
(`lop.model.beyond.depth.bridged`).
"""

from typing import TYPE_CHECKING

from lop.methods.method import Need
from lop.methods.reshaping import Reshaped, Reshaping

if TYPE_CHECKING:
    from lop.model.backbone import Backbone
    from lop.model.encoding import Encoded


def least_influence(backbone: "Backbone", encoded: "Encoded", asked: int, refit: bool) -> Reshaped:
    """Without the layers of least influence.

    Raises:
        LopError: those would be all.
    """
    from lop.model.beyond.depth import bridged, layers_to_remove, parameters, similarities, without

    count = layers_to_remove(backbone, asked)
    influence = 1 - similarities(backbone, encoded, 1)
    gone = frozenset(influence.argsort(kind="stable")[:count].tolist())
    found = bridged(backbone, encoded, gone) if refit else without(backbone, gone)
    places = tuple(index for index in range(len(backbone.layers)) if index not in gone)
    return Reshaped(found, places, parameters(backbone) - parameters(found))


METHOD = Reshaping("shortgpt", least_influence, frozenset({Need.STATES}), "ShortGPT", refits=True)
