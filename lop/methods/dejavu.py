"""DejaVu (Liu et al., ICML 2023): each token uses other neurons, those that a small predictor expects most of.

A layer's predictor is two matrices, `B·A·x` with A [r, H] and B [F, r], of what the FFN is given; the k neurons of the
highest values are used, and the others not. It is trained to tell neurons that a token needs from those that it does
not, by binary cross-entropy (`sparse_predictor` of github.com/FMInference/DejaVu). The published models have ReLU, so
that a neuron is needed if it is not zero; with a gate hardly any is, and here the k of the largest
`|h_j|·‖W_down[:, j]‖` are. All layers use as many, those that `uniform` keeps at the ratio. r = H/4, rounded.

It is dynamic: no weight goes, the predictors come on top, and what is saved is computing, so parameters and operations
are told apart. A batch of tokens that each need other neurons saves little of either without a kernel of its own, which
LOP has not. Not covered: attention heads, and predictors that look a layer ahead to hide what they cost.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lop.methods.dropping import Contextual
from lop.methods.method import Need

if TYPE_CHECKING:
    from lop.model.backbone import Backbone
    from lop.model.encoding import Encoded

_RANK = 1 / 4


def predicted_neurons(backbone: "Backbone", encoded: "Encoded", widths: Sequence[int]) -> "Backbone":
    """With a predictor for each layer, which uses so many [L] neurons for a token."""
    from lop.model.beyond.contextual import contextual

    return contextual(backbone, encoded, widths, round(_RANK * len(backbone.norm)))


METHOD = Contextual("dejavu", predicted_neurons, "DejaVu", frozenset({Need.STATES, Need.TRAINING}))
