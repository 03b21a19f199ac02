"""Ways to make a model smaller that leave its FFNs as wide as they are: layers are removed, states made narrower."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lop.methods.method import Need, Side

# The settings of a run name methods, so their registry is read with no torch behind it.
if TYPE_CHECKING:
    from lop.model.backbone import Backbone
    from lop.model.encoding import Encoded


@dataclass(frozen=True)
class Reshaped:
    """A backbone of another shape.

    Attributes:
        places: of each of its layers, which of the dense model's it stands in the place of, for a checkpoint that any
            loader builds; None if no loader can build it.
        removed: parameters that it has less than the dense model, those that were added counted.
    """

    backbone: "Backbone"
    places: tuple[int, ...] | None
    removed: int


@dataclass(frozen=True)
class Reshaping:
    """A way to reshape a model.

    Attributes:
        name: in configs and reports.
        reshape: a dense backbone with an `ElasticFfn` a layer, the calibration samples, parameters to remove at least,
            and whether to refit what stays, to a backbone. Raises a LopError if so many cannot be removed.
        refits: whether recovery `refit` changes anything; others bring a recovery of their own, or have none.
        not_exported: why there is no checkpoint of it; None if there is.
        label: in pictures.
        is_compared: as of any `Method`.
    """

    name: str
    reshape: "Callable[[Backbone, Encoded, int, bool], Reshaped]"
    needs: frozenset[Need]
    label: str
    refits: bool = False
    not_exported: str | None = None
    side: Side = Side.BASELINE
    is_compared: bool = True
