"""LLM-Streamline (Chen et al., ICLR 2025): a run of layers is replaced by a lightweight network, or by nothing.

Of all runs of n layers the one whose states before and after are most alike, `argmax_l mean_t cos(x_l(t), x_{l+n}(t))`,
is removed (layer pruning); what takes its place is trained on the calibration samples' states by mean squared error
(layer replacement):

    llm-streamline          a decoder layer that starts as the run's first (the paper's "Layer")
    llm-streamline-linear   not the paper's: a matrix for the states, by least squares, in closed form
    llm-streamline-none     nothing (the paper's "None")

n is the least with which the run holds the parameters that are asked for and those of what takes its place. With
recovery `refit` the last form has the layer before the run say what the run did (`lop.model.beyond.depth.bridged`); the
others have a recovery of their own. Published training: SlimPajama, 30,000 pieces of text; here the calibration
samples, and the rate and the number of passes are ours (`lop.model.beyond.lightweight`). Not covered: FFNs as
lightweight networks, and fine-tuning with LoRA afterwards.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lop.methods.method import Need
from lop.methods.reshaping import Reshaped, Reshaping

if TYPE_CHECKING:
    from lop.model.backbone import Backbone
    from lop.model.encoding import Encoded


def most_alike(backbone: "Backbone", encoded: "Encoded", span: int) -> int:
    """The first layer of the run of `span` layers whose states before and after are most alike."""
    from lop.model.beyond.depth import similarities

    return int(similarities(backbone, encoded, span).argmax())


def by_layer(backbone: "Backbone", encoded: "Encoded", asked: int, _: bool) -> Reshaped:
    """With one trained layer in the place of the run.

    Raises:
        LopError: the run would be all layers.
    """
    from lop.model.beyond.depth import layer_parameters, layers_to_remove
    from lop.model.beyond.lightweight import fitted_layer

    span = layers_to_remove(backbone, asked, extra=layer_parameters(backbone.layers[0]))
    first = most_alike(backbone, encoded, span)
    layers = backbone.layers
    fitted = fitted_layer(backbone, encoded, first, span)
    found = replace(backbone, layers=(*layers[:first], fitted, *layers[first + span :]))
    return _reshaped(backbone, found, range(first + 1, first + span))


def by_matrix(backbone: "Backbone", encoded: "Encoded", asked: int, _: bool) -> Reshaped:
    """With a matrix in the place of the run.

    Raises:
        LopError: the run would be all layers.
    """
    from lop.model.beyond.depth import layers_to_remove, linear_map, turned, without

    span = layers_to_remove(backbone, asked, extra=len(backbone.norm) ** 2)
    first = most_alike(backbone, encoded, span)
    gone = range(first, first + span)
    found = without(turned(backbone, linear_map(backbone, encoded, first, span), first), gone)
    return replace(_reshaped(backbone, found, gone), places=None)


def by_nothing(backbone: "Backbone", encoded: "Encoded", asked: int, refit: bool) -> Reshaped:
    """Without the run.

    Raises:
        LopError: the run would be all layers.
    """
    from lop.model.beyond.depth import bridged, layers_to_remove, without

    span = layers_to_remove(backbone, asked)
    first = most_alike(backbone, encoded, span)
    gone = range(first, first + span)
    return _reshaped(backbone, bridged(backbone, encoded, gone) if refit else without(backbone, gone), gone)


def _reshaped(dense: "Backbone", found: "Backbone", gone: range) -> Reshaped:
    from lop.model.beyond.depth import parameters

    places = tuple(index for index in range(len(dense.layers)) if index not in gone)
    return Reshaped(found, places, parameters(dense) - parameters(found))


def _method(
    end: str,
    reshape: "Callable[[Backbone, Encoded, int, bool], Reshaped]",
    label: str,
    *,
    needs: frozenset[Need] = frozenset({Need.STATES}),
    refits: bool = False,
    not_exported: str | None = None,
) -> Reshaping:
    return Reshaping(f"llm-streamline{end}", reshape, needs, label, refits, not_exported)


METHOD = _method("", by_layer, "LLM-Streamline", needs=frozenset({Need.STATES, Need.TRAINING}))
LINEAR = _method(
    "-linear",
    by_matrix,
    "LLM-Streamline (linear)",
    not_exported="no layer of the architecture multiplies the states by a matrix",
)
NONE = _method("-none", by_nothing, "LLM-Streamline (none)", refits=True)
